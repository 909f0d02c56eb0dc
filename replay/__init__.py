"""The pure domain of Tidegauge: no socket, no clock, no sleep, no randomness of its own.

import replay
run = replay.load_run("runs/20261116-181703")     # pandas frames: run.requests, run.states, run.replicas
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replay.report.load import load_run as load_run

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    """``load_run`` on first use: the data path imports this package and must not pay for pandas."""
    if name == "load_run":
        from replay.report.load import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

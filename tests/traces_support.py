"""Traces for tests: small tables of every shape, and the folder of recorded ones where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import strategies as st

from replay.traces.columns import SCHEMA, by_arrival, numbered

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "traces"


def recorded_file(name: str) -> Path:
    """A file of the folder beside the repository; skips the test where it is missing."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"the folder of recorded traces has no {name} here")
    return path


def table_of(*rows: dict[str, Any]) -> pa.Table:
    """A trace of these rows; what a row does not say is null (1000 prompt and 10 output tokens)."""
    filled = [{"prompt_tokens": 1000, "output_tokens": 10, **row} for row in rows]
    return numbered(by_arrival(pa.Table.from_pylist(filled, SCHEMA)))


def _known(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


# Words as people name models and tenants; any text is legal, so a quote, a line end and an emoji are among the letters.
_names = st.text(alphabet='ab"\\\n\u2028😀 ', min_size=1, max_size=6)
rows = st.fixed_dictionaries(
    {
        "arrival_at_ns": st.integers(0, 2**52),
        "prompt_tokens": st.integers(0, 2**24),
        "output_tokens": st.integers(0, 2**24),
        "model": _known(_names),
        "session_id": _known(st.sampled_from(["s1", "s2", "s3", "🦊"])),
        "turn": _known(st.integers(0, 5)),
        "think_ns": _known(st.integers(0, 10**12)),
        "prefix_hashes": _known(st.lists(st.integers(0, 2**64 - 1), max_size=4)),
        "priority": _known(st.integers(-5, 5)),
        "tenant": _known(_names),
        "deadline_ns": _known(st.integers(0, 10**12)),
    }
)
tables = st.lists(rows, min_size=1, max_size=30).map(lambda drawn: table_of(*drawn))

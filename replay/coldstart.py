"""Cold start of a replica by phase, from the request for a machine to the first token it can give.

May live here: phases, their presets, their sum. The figures are dated inputs; every fleet may declare its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from replay.errors import InputError
from replay.records import NS_PER_S


class ColdStart(NamedTuple):
    """Seconds in each phase. ``weights`` is download and load into the GPU; ``engine_start`` holds trace, compile and capture."""

    provision_s: float = 0.0
    image_s: float = 0.0
    weights_s: float = 0.0
    engine_start_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def total_ns(self) -> int:
        return round(sum(self) * NS_PER_S)


PHASES: Final = tuple(name.removesuffix("_s") for name in ColdStart._fields)

# Measured with an 8B model, on an L40S where nothing else is said; other models and chips take the same seconds unless the
# fleet declares its own.
PRESETS: Final[dict[str, ColdStart]] = {
    # restore of a GPU snapshot (48 -> 7 s, secondary source): what live demonstrations declare
    "snapshot": ColdStart(engine_start_s=7),
    # weights on the node's disk, compile cache warm: load 18; start 34 contains trace 10, compile 13, capture 7
    "cached": ColdStart(weights_s=18, engine_start_s=34),
    # weights: download 61 + load 33; start 94 contains trace, compile and capture
    "uncached": ColdStart(weights_s=94, engine_start_s=94),
    # weights baked into the image on Kubernetes: pull 5.5 min, extract 3.5 min, start 2 min (BentoML, 2025)
    "baked_image": ColdStart(image_s=540, engine_start_s=120),
}


def cold_start(declared: str | Mapping[str, float], where: str = "cold_start") -> ColdStart:
    """A preset by name, or a mapping of phase -> seconds (phases left out take none).

    Raises InputError for an unknown preset or phase, and for seconds that are negative or not finite.
    """
    if isinstance(declared, str):
        if declared not in PRESETS:
            raise InputError(
                f"unknown preset {declared!r}", where=where, rule=f"one of {', '.join(PRESETS)}",
                fix="name one of them or give seconds by phase",
            )  # fmt: skip
        return PRESETS[declared]
    for phase, seconds in declared.items():
        if phase not in PHASES:
            raise InputError(f"unknown phase {phase!r}", where=where, rule=f"one of {', '.join(PHASES)}")
        if not (math.isfinite(seconds) and seconds >= 0):
            raise InputError(f"{seconds} s", where=f"{where}.{phase}", rule="seconds, 0 or more")
    return ColdStart(**{f"{phase}_s": float(seconds) for phase, seconds in declared.items()})

"""A histogram that merges: what workers send to their master instead of rows."""

from __future__ import annotations

import math
from typing import Final

FLOOR_NS: Final = 10_000  # 10 us: below it a client sees the grain of its own event loop
GROWTH: Final = 1.05
CEILING_NS: Final = 600_000_000_000
_SCALE: Final = 1 / math.log(GROWTH)
_LAST: Final = math.ceil(math.log(CEILING_NS / FLOOR_NS) * _SCALE)


class LogHistogram:
    """Counts in buckets 5 % wide from 10 us to 600 s; bucket 0 is everything below, the last everything above.

    Quantiles are the geometric middle of their bucket: at most 2.5 % off.
    """

    __slots__ = ("counts",)

    def __init__(self, counts: list[int] | None = None) -> None:
        self.counts = counts or [0] * (_LAST + 1)

    def add(self, value_ns: int) -> None:
        if value_ns < FLOOR_NS:
            self.counts[0] += 1
        else:
            self.counts[min(int(math.log(value_ns / FLOOR_NS) * _SCALE) + 1, _LAST)] += 1

    def merge(self, counts: list[int]) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]

    def quantile_ns(self, share: float) -> float | None:
        """The value below which ``share`` of what was added lies; None where nothing was."""
        rank, seen = share * sum(self.counts), 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return FLOOR_NS / 2 if index == 0 else FLOOR_NS * GROWTH ** (index - 0.5)
        return None

    def as_json(self) -> dict[str, list[float] | list[int]]:
        """``counts[i]`` lies between ``edges_s[i]`` and ``edges_s[i + 1]``."""
        return {"edges_s": [0.0, *(FLOOR_NS * GROWTH**i / 1e9 for i in range(_LAST + 1))], "counts": self.counts}

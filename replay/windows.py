"""Time-fed windows: what a policy may remember of the past, without ever reading a clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class StepIntegral:
    """The integral over time of a value that changes in steps: time-weighted means without sampling.

    >>> s = StepIntegral(); s.set(0, 2); s.set(10, 4); s.until(20)
    60
    """

    value: int = 0
    area: int = 0
    since_ns: int = 0

    def set(self, now_ns: int, value: int) -> None:
        self.area += self.value * (now_ns - self.since_ns)
        self.value, self.since_ns = value, now_ns

    def until(self, now_ns: int) -> int:
        """Area from the first ``set`` to now, in value x ns."""
        return self.area + self.value * (now_ns - self.since_ns)


@dataclass(slots=True)
class WindowMax:
    """The largest value of the last ``length_ns``: a monotone deque, O(1) amortised (Lemire 2006)."""

    length_ns: int
    _held: deque[tuple[int, int]] = field(default_factory=deque)

    def add(self, now_ns: int, value: int) -> int:
        """Take a value and return the maximum over [now - length, now]."""
        held = self._held
        while held and held[-1][1] <= value:
            held.pop()
        held.append((now_ns, value))
        while held[0][0] < now_ns - self.length_ns:
            held.popleft()
        return held[0][1]

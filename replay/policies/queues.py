"""Queue disciplines: who waits, in which order, how long, and who is turned away.

A request that waits too long is shed: failing fast beats failing slow, since the client has long given up.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from replay.errors import InputError
from replay.policies.protocols import QueueDiscipline
from replay.records import NS_PER_S
from replay.requests import Request


@dataclass(slots=True)
class Fifo:
    """First in, first out; at most ``length_max`` wait, none longer than ``timeout_s`` (0: for ever).

    A full queue turns the newcomer away.
    """

    length_max: int = 1000
    timeout_s: float = 60.0
    _waiting: OrderedDict[int, tuple[int, Request]] = field(default_factory=OrderedDict, init=False, repr=False)
    _timeout_ns: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.length_max < 0:
            raise InputError(f"is {self.length_max}", where="length_max", rule="0 or more")
        if self.timeout_s < 0:
            raise InputError(f"is {self.timeout_s}", where="timeout_s", rule="0 (for ever) or more")
        self._timeout_ns = round(self.timeout_s * NS_PER_S)

    def push(self, now_ns: int, request: Request) -> Request | None:
        # With length_max 0 a request that finds a free replica still passes: the fleet pushes only those that must wait.
        if len(self._waiting) >= self.length_max:
            return request
        self._waiting[request.request_id] = (now_ns, request)
        return None

    def next_expiry_ns(self) -> int | None:
        if not self._timeout_ns or not self._waiting:
            return None
        return next(iter(self._waiting.values()))[0] + self._timeout_ns

    def expire(self, now_ns: int) -> Request | None:
        expiry = self.next_expiry_ns()
        return self.pop(now_ns) if expiry is not None and expiry <= now_ns else None

    def peek(self, now_ns: int) -> Request | None:
        return next(iter(self._waiting.values()))[1] if self._waiting else None

    def pop(self, now_ns: int) -> Request | None:
        return self._waiting.popitem(last=False)[1][1] if self._waiting else None

    def remove(self, request_id: int) -> bool:
        return self._waiting.pop(request_id, None) is not None

    def __len__(self) -> int:
        return len(self._waiting)


QUEUES: dict[str, type[QueueDiscipline]] = {"fifo": Fifo}

"""Balancers: which ready replica gets the request at the head of the queue.

Parameters are the dataclass fields. Algorithms and defaults as upstream has them; the source stands in the docstring.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from random import Random

from replay.policies.protocols import Balancer, Event, ReplicaView
from replay.requests import Request

Note = list[tuple[int, float]] | None
_replica_id = attrgetter("replica_id")


@dataclass(slots=True)
class _Stateless:
    """For balancers that learn nothing from members and outcomes."""

    def members(self, now_ns: int, replicas: Sequence[ReplicaView]) -> None:
        pass

    def observe(self, now_ns: int, replica: ReplicaView, request: Request, event: Event, output_tokens: int = 0) -> None:
        pass


@dataclass(slots=True)
class RoundRobin(_Stateless):
    """The next replica in order, whatever it is doing: the naive baseline of every comparison.

    Known failure: requests of 10 and of 10,000 tokens count the same, so one replica drowns while others idle.
    """

    _last: int = field(default=-1, init=False)

    def pick(self, now_ns: int, request: Request, replicas: Sequence[ReplicaView], note: Note = None) -> int | None:
        # By replica id, not by index: the list shrinks and grows as slots fill and replicas come and go.
        chosen = bisect_right(replicas, self._last, key=_replica_id) % len(replicas)
        self._last = replicas[chosen].replica_id
        return chosen


@dataclass(slots=True)
class LeastOutstanding(_Stateless):
    """The fewest requests in flight. Ties go round, not to index 0 (else one replica warms up alone).

    Known failure: blind to length, so it misjudges mixed prompts; and a replica that fails fast looks idle.
    """

    _last: int = field(default=-1, init=False)

    def pick(self, now_ns: int, request: Request, replicas: Sequence[ReplicaView], note: Note = None) -> int | None:
        least, best, first_after = replicas[0].outstanding, 0, replicas[0].replica_id > self._last
        for i in range(1, len(replicas)):
            load = replicas[i].outstanding
            if load < least:
                least, best, first_after = load, i, replicas[i].replica_id > self._last
            elif load == least and not first_after and replicas[i].replica_id > self._last:
                best, first_after = i, True
        if note is not None:
            note.extend((replica.replica_id, float(replica.outstanding)) for replica in replicas)
        self._last = replicas[best].replica_id
        return best


@dataclass(slots=True)
class PowerOfTwo(_Stateless):
    """P2C: two distinct uniform draws, the less loaded wins (Mitzenmacher 2001; Finagle's picking rule).

    Known failure: with two replicas it is least_outstanding with a coin for ties; with stale loads it is what keeps herds apart.
    """

    rng: Random = field(init=False, repr=False)

    def pick(self, now_ns: int, request: Request, replicas: Sequence[ReplicaView], note: Note = None) -> int | None:
        n = len(replicas)
        if n == 1:
            return 0
        first = int(self.rng.random() * n)
        second = (first + 1 + int(self.rng.random() * (n - 1))) % n
        if note is not None:
            note.extend((replicas[i].replica_id, float(replicas[i].outstanding)) for i in (first, second))
        return second if replicas[second].outstanding < replicas[first].outstanding else first


BALANCERS: dict[str, type[Balancer]] = {
    "round_robin": RoundRobin,
    "least_outstanding": LeastOutstanding,
    "p2c": PowerOfTwo,
}

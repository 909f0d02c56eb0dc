"""A tiny virtual-time driver of a Fleet for stories: constant service time per token, no engine."""

from __future__ import annotations

import heapq
from typing import Any

from replay.effects import Dispatch, Effect, StartReplica
from replay.fleet import Fleet
from replay.policies import spec
from replay.records import NS_PER_S
from replay.requests import Request

S = NS_PER_S


def request(request_id: int, *, prompt: int = 100, cap: int | None = 10, tenant: str = "", model: str = "m") -> Request:
    return Request(request_id, tenant, model, 0, "", None, prompt * 4, prompt, (), cap)


class Story:
    """``at(seconds, ...)`` plans inputs, ``run(until)`` plays them; ``log`` holds (seconds, effect)."""

    def __init__(self, policy: dict[str, Any], *, cold_start_s: float = 5.0, service_s: float = 1.0, seed: int = 0) -> None:
        self.fleet = Fleet(spec.build(spec.from_dict(policy), seed))
        self.cold_start_ns, self.service_ns = round(cold_start_s * S), round(service_s * S)
        self.log: list[tuple[float, Effect]] = []
        self.now_ns = 0
        self._heap: list[tuple[int, int, str, tuple[Any, ...]]] = []
        self._n = 0
        self._input("start")

    def at(self, second: float, name: str, *arguments: Any) -> None:
        self._push(round(second * S), name, *arguments)

    def arrivals(self, times_s: list[float], **request_fields: Any) -> None:
        for n, second in enumerate(times_s):
            self.at(second, "arrive", request(n, **request_fields))

    def run(self, until_s: float) -> Story:
        while True:
            wake_ns = self.fleet.next_wake_ns()
            planned_ns = self._heap[0][0] if self._heap else None
            due_ns = min(t for t in (wake_ns, planned_ns, round(until_s * S)) if t is not None)
            if due_ns >= round(until_s * S):
                self.now_ns = round(until_s * S)
                return self
            self.now_ns = max(due_ns, self.now_ns)
            if planned_ns is not None and planned_ns <= self.now_ns:
                _, _, name, arguments = heapq.heappop(self._heap)
                self._input(name, *arguments)
            else:
                self._input("wake")

    def ready(self) -> int:
        return self.fleet.state(self.now_ns, 0.0).ready

    def effects(self, kind: type) -> list[tuple[float, Any]]:
        return [(second, effect) for second, effect in self.log if isinstance(effect, kind)]

    def _push(self, at_ns: int, name: str, *arguments: Any) -> None:
        self._n += 1
        heapq.heappush(self._heap, (at_ns, self._n, name, arguments))

    def _input(self, name: str, *arguments: Any) -> None:
        getattr(self.fleet, name)(self.now_ns, *arguments)
        self.fleet.check()
        for effect in self.fleet.drain():
            self.log.append((self.now_ns / S, effect))
            if isinstance(effect, StartReplica):
                self._push(self.now_ns + self.cold_start_ns, "replica_ready", effect.replica_id)
            elif isinstance(effect, Dispatch):
                self._push(self.now_ns + self.service_ns, "finish", effect.request_id, 100, 10)

"""Autoscalers: how many replicas there should be. A decision is a pure function of time-fed samples.

The fleet applies replicas.min/max, availability and draining; stabilisation belongs here and is off where upstream has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from replay.errors import InputError
from replay.policies.protocols import Autoscaler, FleetSample, Want
from replay.records import NS_PER_S
from replay.windows import WindowMax


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"is {value}", where=name, rule="above 0")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise InputError(f"is {value}", where=name, rule="0 or more")


@dataclass(slots=True)
class Fixed:
    """Always ``replicas``: the baseline, and what a team without an autoscaler has. A dead replica is replaced."""

    replicas: int = 1

    def __post_init__(self) -> None:
        _not_negative(replicas=self.replicas)

    @property
    def interval_ns(self) -> int:
        return 10 * NS_PER_S  # only to replace what died

    def decide(self, now_ns: int, sample: FleetSample) -> Want:
        return Want(self.replicas, reason="fixed")


@dataclass(slots=True)
class Concurrency:
    """Requests in the system (running and queued, time-weighted since the last decision) per replica, held at ``target``.

    desired = ceil(mean concurrency / target), as Knative's and Ray Serve's formula without panic and delays. Up at once;
    down to the largest desired of the last ``down_stabilisation_s``, so that a pause between bursts does not cost a cold start.
    Known failure: a long prompt counts as much as a short one (llm-d#2466 saw a factor of 16).
    """

    target: float = 10.0
    interval_s: float = 5.0
    down_stabilisation_s: float = 120.0
    _recent: WindowMax = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _positive(target=self.target, interval_s=self.interval_s)
        _not_negative(down_stabilisation_s=self.down_stabilisation_s)
        self._recent = WindowMax(round(self.down_stabilisation_s * NS_PER_S))

    @property
    def interval_ns(self) -> int:
        return round(self.interval_s * NS_PER_S)

    def decide(self, now_ns: int, sample: FleetSample) -> Want:
        desired = math.ceil(sample.concurrency / self.target)
        return Want(
            self._recent.add(now_ns, desired),
            reason=f"concurrency {sample.concurrency:.1f}, target {self.target:g} a replica",
        )


@dataclass(slots=True)
class QueueDepth:
    """Requests waiting in the gateway's queue per ready replica, held at most at ``target``.

    Needs ``slots_per_replica``: without it everything waits inside the engines, and this queue is always empty.

    Up: as soon as more than ``target`` wait per ready replica, ceil(waiting / target) replicas, at least one more.
    Down: one step when nobody has waited for ``down_stabilisation_s`` and what runs would fit one replica fewer at
    ``running_per_replica`` (the N/(N-1) check, without which it swings 2 <-> 1 under constant load: dynamo#9294).
    Known failure: it sees a burst only once requests already wait.
    """

    target: float = 4.0
    running_per_replica: float = 8.0
    interval_s: float = 5.0
    down_stabilisation_s: float = 120.0
    _busy_at_ns: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _positive(target=self.target, running_per_replica=self.running_per_replica, interval_s=self.interval_s)
        _not_negative(down_stabilisation_s=self.down_stabilisation_s)

    @property
    def interval_ns(self) -> int:
        return round(self.interval_s * NS_PER_S)

    def decide(self, now_ns: int, sample: FleetSample) -> Want:
        have = sample.ready + sample.starting
        waiting = sample.queued
        reason = f"{waiting} waiting, {sample.running} running on {sample.ready}"
        if waiting > 0 or self._busy_at_ns is None:
            self._busy_at_ns = now_ns
        if waiting > self.target * sample.ready:
            # Those starting are on their way to this queue: ask for more only beyond what they will take.
            return Want(max(have if sample.starting else have + 1, math.ceil(waiting / self.target)), reason=reason)
        calm = now_ns - self._busy_at_ns >= self.down_stabilisation_s * NS_PER_S
        if calm and sample.running <= (have - 1) * self.running_per_replica:
            self._busy_at_ns = now_ns  # one step a window
            return Want(have - 1, reason=reason)
        return Want(have, reason=reason)


AUTOSCALERS: dict[str, type[Autoscaler]] = {"fixed": Fixed, "concurrency": Concurrency, "queue_depth": QueueDepth}

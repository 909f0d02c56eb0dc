"""The four roles of a policy, as protocols: clock-free, deterministic, cheap.

A policy is a slotted dataclass whose fields *are* its YAML parameters; ``__post_init__`` validates them. It learns the time
from ``now_ns``, draws only from the ``random.Random`` handed to it, and sees only what a gateway can observe. Each role's
file ends in a table ``kind -> class``; a new policy touches that one file, and the contract suite covers it unasked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from replay.requests import Request


class Signals(NamedTuple):
    """What a replica says of itself, as stale as the scrape that brought it. Null: not reported."""

    measured_at_ns: int
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None  # share of KV blocks in use, 0..1


class ReplicaView(Protocol):
    """A replica as policies see it: one persistent object, updated in place by the fleet (building views costs 20-45 %)."""

    @property
    def replica_id(self) -> int: ...
    @property
    def pool(self) -> str: ...
    @property
    def outstanding(self) -> int: ...  # requests dispatched and not ended
    @property
    def outstanding_tokens(self) -> int: ...  # their estimated prompt tokens
    @property
    def slots(self) -> int | None: ...  # None: unlimited, the engine queues
    @property
    def signals(self) -> Signals | None: ...


Event = Literal["dispatched", "first_token", "finished", "failed"]


class Balancer(Protocol):
    def members(self, now_ns: int, replicas: Sequence[ReplicaView]) -> None:
        """The set of ready replicas changed: rebuild ring, tree, weights."""

    def pick(
        self,
        now_ns: int,
        request: Request,
        replicas: Sequence[ReplicaView],
        note: list[tuple[int, float]] | None = None,
    ) -> int | None:
        """Index into ``replicas`` (ready, with a free slot, never empty), or None to hold the request in the queue.

        ``note``, where given, is filled with (replica_id, score) for ``explain``.
        """

    def observe(self, now_ns: int, replica: ReplicaView, request: Request, event: Event, output_tokens: int = 0) -> None:
        """What happened to a dispatched request; ``output_tokens`` is the true usage and only known at ``finished``."""


class QueueDiscipline(Protocol):
    def push(self, now_ns: int, request: Request) -> Request | None:
        """Take the request; returns the victim where the queue is full, maybe the newcomer itself."""

    def expire(self, now_ns: int) -> Request | None:
        """One request that has waited too long, removed; called until None, before ``peek``."""

    def next_expiry_ns(self) -> int | None:
        """When ``expire`` would next return something, so that the driver wakes then."""

    def peek(self, now_ns: int) -> Request | None:
        """The head, not removed: the fleet picks a replica for it first."""

    def pop(self, now_ns: int) -> Request | None: ...

    def remove(self, request_id: int) -> bool:
        """The client left."""

    def __len__(self) -> int: ...


class Charge(NamedTuple):
    """A question to a limiter outside this process (a global bucket); the answer comes back as the input ``charged``."""

    key: str
    requests: int
    tokens: int


class RateLimiter(Protocol):
    def admit(self, now_ns: int, request: Request) -> int | Charge:
        """0 = admitted and charged; n > 0 = refused, worth another try after n ns; Charge = ask outside."""

    def settle(self, now_ns: int, request: Request, output_tokens: int) -> None:
        """The request ended with this many output tokens (0 where it never ran): correct what the estimate charged."""


class FleetSample(NamedTuple):
    """What an autoscaler decides from. Concurrency counts running and queued requests, time-weighted since the last decide."""

    interval_ns: int
    concurrency: float
    queued: int
    running: int
    ready: int
    starting: int
    draining: int
    arrivals: int  # since the last decide
    finished: int
    output_tokens: int
    signals: tuple[Signals, ...] = ()


class Want(NamedTuple):
    """A decision. ``rung`` names the instance type for vertical scaling; ``reason`` is shown to people."""

    replicas: int
    rung: str | None = None
    reason: str = ""


class Autoscaler(Protocol):
    @property
    def interval_ns(self) -> int: ...

    def decide(self, now_ns: int, sample: FleetSample) -> Want:
        """How many replicas (starting + ready) there should be. The fleet applies min/max and draining, nothing else."""

"""What a Fleet wants done: its effects, in the order in which it asked. The driver carries them out."""

from __future__ import annotations

from typing import NamedTuple

from replay.policies.protocols import Charge

NO_WAIT, NO_SLOT, COLD_START, HELD = range(4)  # indices of records.QUEUE_REASONS


class Dispatch(NamedTuple):
    """Send the request to the replica. The durations are the phases so far, known when the request leaves the gateway."""

    request_id: int
    replica_id: int
    attempt: int
    stage: str = "whole"  # or "prefill", "decode" where the two are split
    resume_tokens: int = 0
    kv_from: int | None = None
    limit_ns: int = 0
    queue_ns: int = 0
    cold_start_ns: int = 0
    retry_ns: int = 0
    queue_reason: int = NO_WAIT


class Reject(NamedTuple):
    """The limiter said no: status ``limited``, HTTP 429."""

    request_id: int
    retry_after_ns: int
    reason: str
    limit_ns: int = 0


class Shed(NamedTuple):
    """The queue turned it away or let it go: status ``shed``, HTTP 503."""

    request_id: int
    retry_after_ns: int
    reason: str
    limit_ns: int = 0
    queue_ns: int = 0
    cold_start_ns: int = 0
    retry_ns: int = 0
    queue_reason: int = NO_WAIT


class Abort(NamedTuple):
    """It failed for good: status ``error``; close the upstream stream and tell the client."""

    request_id: int
    why: str


class AskLimiter(NamedTuple):
    """Ask the limiter outside this process; the answer comes back as the input ``charged``."""

    request_id: int
    charge: Charge


class StartReplica(NamedTuple):
    replica_id: int
    pool: str
    rung: str | None


class DrainReplica(NamedTuple):
    """No new requests; ``StopReplica`` follows once it is empty."""

    replica_id: int


class StopReplica(NamedTuple):
    replica_id: int
    reason: str


Effect = Dispatch | Reject | Shed | Abort | AskLimiter | StartReplica | DrainReplica | StopReplica

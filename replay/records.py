"""What flows through Tidegauge: the records, as row views and as columns.

Time is an int of nanoseconds since the run began. Instants end in ``_at_ns``, durations in ``_ns``.
Null means *not measured*, never 0; in the fixed-size spool, where there is no null, it is -1.

May live here: record types, their fixed-size encoding, ids derived from them. No I/O, no clock.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
import xxhash

NS_PER_S: Final = 1_000_000_000

# A request ends in exactly one of these, and the index is its code in the spool.
STATUSES: Final = ("ok", "limited", "shed", "timeout", "cancelled", "error")
OK, LIMITED, SHED, TIMEOUT, CANCELLED, ERROR = range(6)

# Where the time of a request went. They sum to its end-to-end latency, none is negative.
#   limit         waiting for a rate limiter's answer          queue     waiting for a slot while some replica was ready
#   cold_start    waiting while no replica was ready           route     gateway's own work until the request left it
#   adapter_load, kv_transfer   at the replica                 prefill   dispatch -> first token      decode  -> last byte
#   retry         from a failed dispatch to the next one       network   client's time outside the gateway
#   unexplained   the remainder (a late sender shows up here)
PHASES: Final = (
    "limit", "queue", "cold_start", "route", "adapter_load", "kv_transfer", "prefill", "decode", "retry", "network",
    "unexplained",
)  # fmt: skip

# Why a request had to wait in the gateway's queue; the index is its code.
QUEUE_REASONS: Final = ("none", "no_slot", "cold_start", "held")
ORIGINS: Final = ("online", "batch")


class RecordedRequest(NamedTuple):
    """One row of a recorded trace. Null means the source does not carry it."""

    request_id: int
    arrival_at_ns: int
    prompt_tokens: int
    output_tokens: int
    model: str | None = None
    session_id: str | None = None
    turn: int | None = None
    think_ns: int | None = None
    prefix_hashes: tuple[int, ...] | None = None
    priority: int | None = None
    tenant: str | None = None
    deadline_ns: int | None = None


class Outcome(NamedTuple):
    """What became of one request: the record that rows, spans, metrics and tables are views of.

    Field order is the order of the spool's fixed-size record. -1 is null for integers, b"" for text.
    ``trace_hi``/``trace_lo``/``parent_span`` are 0 where the ids derive from run and request (our own client).
    """

    request_id: int
    scheduled_at_ns: int = -1
    sent_at_ns: int = -1
    gateway_at_ns: int = -1
    first_chunk_at_ns: int = -1
    first_token_at_ns: int = -1
    last_token_at_ns: int = -1
    done_at_ns: int = -1
    longest_gap_ns: int = -1
    limit_ns: int = -1
    queue_ns: int = -1
    cold_start_ns: int = -1
    route_ns: int = -1
    adapter_load_ns: int = -1
    kv_transfer_ns: int = -1
    prefill_ns: int = -1
    decode_ns: int = -1
    retry_ns: int = -1
    network_ns: int = -1
    unexplained_ns: int = -1
    trace_hi: int = 0
    trace_lo: int = 0
    parent_span: int = 0
    chunks: int = -1
    prompt_tokens: int = -1
    output_tokens: int = -1
    cached_tokens: int = -1
    first_chunk_tokens: int = -1
    tokens_lost: int = 0
    replica_id: int = -1
    decode_replica_id: int = -1
    http_status: int = -1
    attempts: int = 0
    status: int = ERROR
    queue_reason: int = 0
    origin: int = 0
    kept_by_client: int = 0  # 1 in a gateway's spool where the client keeps the row and the spans: count it, make none
    tenant: bytes = b""
    model: bytes = b""
    session_id: bytes = b""
    detail: bytes = b""


_TEXT: Final = {"tenant": 32, "model": 64, "session_id": 40, "detail": 96}
_CODES: Final = {
    **dict.fromkeys(("chunks", "prompt_tokens", "output_tokens", "cached_tokens", "first_chunk_tokens"), ("i4", "i")),
    **dict.fromkeys(("tokens_lost", "replica_id", "decode_replica_id", "http_status"), ("i4", "i")),
    **dict.fromkeys(("attempts", "status", "queue_reason", "origin", "kept_by_client"), ("u1", "B")),
    **dict.fromkeys(("request_id", "trace_hi", "trace_lo", "parent_span"), ("u8", "Q")),
    **{name: (f"S{size}", f"{size}s") for name, size in _TEXT.items()},
}  # fmt: skip
# Every field that is not listed above is an instant or a duration: a signed 64-bit integer.
OUTCOME_DTYPE: Final = np.dtype([(name, "<" + _CODES.get(name, ("i8", "q"))[0]) for name in Outcome._fields])
OUTCOME_STRUCT: Final = struct.Struct("<" + "".join(_CODES.get(name, ("i8", "q"))[1] for name in Outcome._fields))
assert OUTCOME_STRUCT.size == OUTCOME_DTYPE.itemsize


class FleetState(NamedTuple):
    """The fleet at one instant, sampled once a second and at every change of the replicas: the time line."""

    at_ns: int
    queued: int
    running: int
    wanted: int
    starting: int
    ready: int
    draining: int
    arrived: int  # so far
    ended: int  # so far, in any status
    usd_per_hour: float  # of all replicas requested and not stopped


FLEET_STATE_DTYPE: Final = np.dtype([(name, "<f8" if name == "usd_per_hour" else "<i8") for name in FleetState._fields])
FLEET_STATE_STRUCT: Final = struct.Struct("<9qd")
assert FLEET_STATE_STRUCT.size == FLEET_STATE_DTYPE.itemsize


class ReplicaLifetime(NamedTuple):
    """One replica from request to stop: what is billed. ``stopped_at_ns`` is null while it lives."""

    replica_id: int
    pool: str
    gpu: str
    gpu_count: int
    requested_at_ns: int
    ready_at_ns: int | None
    stopped_at_ns: int | None
    reason: str


def trace_id(run_id: str, request_id: int) -> int:
    """The 128-bit trace id of a request: a hash, so that a row opens its trace without a lookup table."""
    return xxhash.xxh3_128_intdigest(f"{run_id}/{request_id}".encode()) or 1


def span_id(trace: int, name: str, request_id: int | None = None) -> int:
    """The 64-bit id of the span ``name`` of a trace; the client's span is ``client``.

    A trace of our own client is one request. Somebody else's (an agent's, say) may hold many, so that the gateway tells their
    spans apart by its ``request_id``.
    """
    return xxhash.xxh3_64_intdigest(f"{trace:032x}/{name}{'' if request_id is None else f'/{request_id}'}".encode()) or 1

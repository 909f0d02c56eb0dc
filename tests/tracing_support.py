"""Outcome rows for the tests of tracing and of the run directory: consistent, as the senders write them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from replay.records import NS_PER_S, OK, OUTCOME_DTYPE, OUTCOME_STRUCT, PHASES, Outcome
from replay.runs import Array

STARTED_AT_UNIX_NS = 1_790_000_000 * NS_PER_S
MANIFEST: dict[str, Any] = {
    "schema": 1,
    "id": "run-1",
    "policy": {"name": "p2c"},
    "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
    "started_at_unix_ns": STARTED_AT_UNIX_NS,
}


def outcome(request_id: int = 0, **changes: Any) -> Outcome:
    """A request due at 1 s that waited 2 s, prefilled 0.5 s and decoded 0.9 s; ``changes`` on top."""
    values: dict[str, Any] = {
        "request_id": request_id, "scheduled_at_ns": 1_000_000_000, "sent_at_ns": 1_000_200_000, "gateway_at_ns": 1_000_700_000,
        "limit_ns": 100_000, "queue_ns": 1_500_000_000, "cold_start_ns": 500_000_000, "route_ns": 300_000, "retry_ns": 0,
        "prefill_ns": 500_000_000, "decode_ns": 900_000_000, "network_ns": 600_000, "unexplained_ns": 200_000,
        "first_chunk_at_ns": 3_501_200_000, "first_token_at_ns": 3_501_300_000, "last_token_at_ns": 4_401_100_000,
        "done_at_ns": 4_401_200_000, "chunks": 10, "prompt_tokens": 700, "output_tokens": 10, "first_chunk_tokens": 1,
        "replica_id": 3, "http_status": 200, "attempts": 1, "status": OK, "queue_reason": 2, "model": b"llama", "tenant": b"acme",
    }  # fmt: skip
    return Outcome(**(values | changes))


def quick(request_id: int, **changes: Any) -> Outcome:
    """A request that met its target: 50 ms to the first token, 9 more in 90 ms."""
    due: int = changes.pop("due_at_ns", 1_000_000_000)
    first, last = due + 50_000_000, due + 140_000_000
    values: dict[str, Any] = {
        **dict.fromkeys(("scheduled_at_ns", "sent_at_ns", "gateway_at_ns"), due),
        **dict.fromkeys(("first_chunk_at_ns", "first_token_at_ns"), first),
        **dict.fromkeys(("last_token_at_ns", "done_at_ns"), last),
        **dict.fromkeys((f"{phase}_ns" for phase in PHASES), 0),
        "prefill_ns": first - due,
        "decode_ns": last - first,
        "queue_reason": 0,
    }
    return outcome(request_id, **(values | changes))


def packed(rows: list[Outcome]) -> bytes:
    """The bytes that a sender appends to its spool."""
    return b"".join(OUTCOME_STRUCT.pack(*row) for row in rows)


def records(rows: list[Outcome]) -> Array:
    return np.frombuffer(packed(rows), OUTCOME_DTYPE)


_PHASE_NS = st.one_of(st.just(-1), st.just(0), st.integers(1, 600 * NS_PER_S))


@st.composite
def consistent_rows(draw: st.DrawFn) -> Outcome:
    """Any row whose phases sum to its end-to-end latency, with the gateway somewhere inside it."""
    phases = {f"{name}_ns": draw(_PHASE_NS) for name in PHASES}
    due = draw(st.integers(0, 3600 * NS_PER_S))
    done = due + sum(max(duration, 0) for duration in phases.values())
    outside = max(phases["network_ns"], 0) + max(phases["unexplained_ns"], 0)
    return outcome(
        draw(st.integers(0, 2**40)),
        scheduled_at_ns=due,
        sent_at_ns=due,
        gateway_at_ns=due + draw(st.integers(0, outside)),
        done_at_ns=done,
        first_token_at_ns=draw(st.one_of(st.just(-1), st.integers(due, done))),
        first_chunk_at_ns=-1,
        last_token_at_ns=-1,
        status=draw(st.integers(0, 5)),
        **phases,
    )

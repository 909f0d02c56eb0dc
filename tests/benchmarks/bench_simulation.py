"""Simulated requests a second on one core: the whole simulation with a Python policy; the engine alone against its reference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from replay.engine import Engine
from replay.hardware import FleetSpec, kv_blocks, profile
from replay.policies import spec
from replay.simulation import simulate
from replay.traces import SCHEMA
from tests.engine_reference import Operation
from tests.engine_reference import simulate as simulate_step_by_step

H100 = FleetSpec(kind="stand-in", gpu="h100_sxm")
PER_REPLICA_PER_S = 5.0  # at 100-1500 tokens in and 10-300 out: about half of what one holds
REPEATS = 3
DEMO_PER_S = 12_000  # 80 x 8,819 requests / 2 cores / 30 s


def figures() -> Iterator[dict[str, Any]]:
    """Medians of CPU time; the reference runs the load of one replica in the same process, right after."""
    for replicas, least in ((8, DEMO_PER_S), (64, None)):
        value, virtual = whole(replicas)
        yield {
            "name": f"simulated requests, {replicas} replicas, Python policy",
            "value": value,
            "unit": "1/s",
            "against": "virtual time of the same load",
            "ratio": virtual,
            "target": least and f">= {least} (the demo: 80 runs of the hour in 30 s on two cores)",
            "ok": None if least is None else value >= least,
        }
    operations = load(2000, PER_REPLICA_PER_S)
    compressed = len(operations) / median(timed(lambda: advance(operations)) for _ in range(REPEATS))
    by_step = len(operations) / timed(lambda: step_by_step(operations))
    yield {
        "name": "engine alone, requests advanced in closed form",
        "value": compressed,
        "unit": "1/s",
        "against": f"step by step {by_step:,.0f}",
        "ratio": compressed / by_step,
        "target": "ratio >= 5",
        "ok": compressed / by_step >= 5,
    }


def load(count: int, rate_per_s: float) -> list[Operation]:
    draw = np.random.default_rng(1)
    at_ns = np.cumsum(draw.exponential(1e9 / rate_per_s, count)).astype(np.int64).tolist()
    return [
        Operation(*row)
        for row in zip(
            at_ns, range(count), draw.integers(100, 1500, count).tolist(), draw.integers(10, 300, count).tolist(), strict=True
        )
    ]


def whole(replicas: int) -> tuple[float, float]:
    """Simulated requests per second of CPU, and seconds of virtual time per second of CPU."""
    operations = load(20_000, PER_REPLICA_PER_S * replicas)
    known = {
        "request_id": range(len(operations)),
        "arrival_at_ns": [operation.at_ns for operation in operations],
        "prompt_tokens": [operation.prompt for operation in operations],
        "output_tokens": [operation.output for operation in operations],
    }
    absent = [None] * len(operations)
    plan = pa.table([pa.array(known.get(name, absent), SCHEMA.field(name).type) for name in SCHEMA.names], SCHEMA)
    policy = spec.from_dict(
        {
            "balancer": "least_outstanding",
            "autoscaler": {"kind": "fixed", "replicas": replicas},
            "replicas": {"min": replicas, "max": replicas},
        }
    )
    spent_s = median(timed(lambda: simulate(plan, policy, H100, seed=1)) for _ in range(REPEATS))
    return len(plan) / spent_s, operations[-1].at_ns / 1e9 / spent_s


def timed(work: Any) -> float:
    before_s = time.process_time()
    work()
    return time.process_time() - before_s


def advance(operations: list[Operation]) -> None:
    engine = Engine.of(H100)
    for operation in operations:
        while (due_ns := engine.next_event_ns()) is not None and due_ns <= operation.at_ns:
            engine.advance(due_ns)
        engine.submit(operation.at_ns, operation.request_id, operation.prompt, operation.output)
    while (due_ns := engine.next_event_ns()) is not None:
        engine.advance(due_ns)


def step_by_step(operations: list[Operation]) -> None:
    blocks = kv_blocks(profile(H100))
    events = simulate_step_by_step(
        profile(H100), operations, max_num_seqs=H100.max_num_seqs, token_budget=H100.token_budget, kv_blocks=blocks
    )
    for _ in events:
        pass

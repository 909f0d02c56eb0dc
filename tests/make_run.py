"""Write a run directory from hand-made rows, exactly as a sender and a gateway would have left it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from replay.records import FLEET_STATE_DTYPE, NS_PER_S, OUTCOME_DTYPE, OUTCOME_STRUCT, FleetState, Outcome, ReplicaLifetime
from replay.runs import RunDir, outcomes_to_table


def ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)


def plan_table(arrivals_s: Sequence[float], prompt_tokens: int = 100, output_tokens: int = 10) -> pa.Table:
    """A plan of requests 0..n-1 with the columns that every reader needs."""
    count = len(arrivals_s)
    return pa.table(
        {
            "request_id": pa.array(range(count), pa.int64()),
            "arrival_at_ns": pa.array([ns(at) for at in arrivals_s], pa.int64()),
            "prompt_tokens": pa.array([prompt_tokens] * count, pa.int64()),
            "output_tokens": pa.array([output_tokens] * count, pa.int64()),
        }
    )


def write_run(
    path: Path,
    rows: Iterable[Outcome],
    *,
    plan: pa.Table | None = None,
    policy: str = "a",
    repeat: int = 0,
    lifetimes: Iterable[ReplicaLifetime] = (),
    states: Iterable[FleetState] = (),
    ended_s: float | None = 1e6,
    parts: int = 0,
    **manifest: Any,
) -> RunDir:
    """A run with these rows in its spool, or in ``parts`` Parquet parts. ``ended_s=None`` leaves it as a kill would."""
    described: dict[str, Any] = {
        "id": path.name, "kind": "live", "ground": {"kind": "stand-in", "detail": "llama-8b on a100"},
        "policy": {"name": policy, "spec": {}},
        "trace": {"name": "hand-made", "sha256": "0" * 64, "rows": 0 if plan is None else len(plan), "shaping": {}}, "seed": repeat,
        "repeat": repeat, "started_at_unix_ns": 1_700_000_000 * NS_PER_S, "versions": {"tidegauge": "0.1.0"},
        "validity": {"valid": True, "reasons": []}, **manifest,
    }  # fmt: skip
    if ended_s is not None:
        described["ended"] = {"at_ns": ns(ended_s), "reason": "complete"}
    run = RunDir.create(path, described, plan)
    raw = b"".join(OUTCOME_STRUCT.pack(*row) for row in rows)
    (path / "spool" / "sender-0.outcomes").write_bytes(raw)
    if parts:
        _write_parts(run, np.frombuffer(raw, OUTCOME_DTYPE), plan, parts)
    write_gateway(path, lifetimes, states)
    return run


def _write_parts(run: RunDir, records: Any, plan: pa.Table | None, parts: int) -> None:
    bounds = np.linspace(0, len(records), parts + 1).astype(int)
    for first, end in pairwise(bounds):
        table = outcomes_to_table(records[first:end], run.manifest["id"], plan)
        pq.write_table(table, run.path / "requests" / f"part-sender-0-{first}-{end}.parquet")


def write_gateway(path: Path, lifetimes: Iterable[ReplicaLifetime], states: Iterable[FleetState]) -> None:
    """The gateway's side: life changes as they happened, one line each, and the time line."""
    gateway = path / "gateway"
    gateway.mkdir(exist_ok=True)
    lines = []
    for life in lifetimes:
        seen = {"replica_id": life.replica_id, "pool": life.pool, "gpu": life.gpu, "gpu_count": life.gpu_count}
        lines.append(json.dumps({**seen, "requested_at_ns": life.requested_at_ns, "reason": ""}))
        lines += [json.dumps({"replica_id": life.replica_id, "ready_at_ns": life.ready_at_ns})] * (life.ready_at_ns is not None)
        if life.stopped_at_ns is not None:
            lines.append(json.dumps({"replica_id": life.replica_id, "stopped_at_ns": life.stopped_at_ns, "reason": life.reason}))
    if lines:
        (gateway / "lifetimes.jsonl").write_text("\n".join(lines) + "\n")
    columns = np.array(list(states), FLEET_STATE_DTYPE)
    if len(columns):
        pq.write_table(pa.table({name: columns[name] for name in FLEET_STATE_DTYPE.names or ()}), gateway / "states.parquet")


def write_experiment(path: Path, slo: dict[str, float], runs: Sequence[RunDir], **more: Any) -> Path:
    """experiment.json over runs that lie below ``path``."""
    arms = [
        {"policy": run.manifest["policy"]["name"], "repeat": run.manifest["repeat"], "path": str(run.path.relative_to(path))}
        for run in runs
    ]
    described = {
        "schema": 1,
        "id": path.name,
        "name": path.name,
        "created_unix_ns": 0,
        "spec": {},
        "slo": slo,
        "arms": arms,
        **more,
    }
    (path / "experiment.json").write_text(json.dumps(described))
    return path

"""A realistic experiment made up in code: bursty arrivals, lognormal TTFT, an autoscaler that lags, failures in the bursts.

Not a simulation: it gives reports something to show that looks like traffic, at any size, in milliseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from replay.records import NS_PER_S, OK, SHED, FleetState, Outcome, ReplicaLifetime
from replay.runs import RunDir
from tests.make_run import ns, write_experiment, write_run


def bursty_arrivals(rng: np.random.Generator, span_s: float, rps: float) -> np.ndarray[Any, Any]:
    """Poisson arrivals, ``rps`` on average, whose rate is 8 times higher in bursts of 30 s every 150 s."""
    thinned = 0.2 + 0.8 / 8  # share of a Poisson stream at the rate of the bursts that is kept
    at_s = np.sort(rng.uniform(0, span_s, rng.poisson(span_s * rps / thinned)))
    return at_s[rng.random(len(at_s)) < np.where(at_s % 150 < 30, 1.0, 1 / 8)]


def write_arm(
    path: Path, arrivals_s: np.ndarray[Any, Any], *, policy: str, repeat: int, speed: float, ground: dict[str, str], parts: int
) -> RunDir:
    """One run: faster policies (``speed`` above 1) wait less in bursts and shed less."""
    rng = np.random.default_rng([repeat, int(speed * 100)])
    span_s = float(arrivals_s[-1]) + 1
    burst = (arrivals_s % 150) / 30
    queue_s = np.where(burst < 1, rng.gamma(1.2, 0.5 * np.maximum(burst, 0.05), len(arrivals_s)) / speed, 0.0)
    cold_s = np.where((burst > 0.1) & (burst < 0.35), rng.uniform(0, 3, len(arrivals_s)) / speed, 0.0)
    prefill_s = rng.lognormal(-1.6, 0.5, len(arrivals_s))
    tpot_s = rng.lognormal(-3.9, 0.25, len(arrivals_s))
    is_shed = rng.random(len(arrivals_s)) < np.where(queue_s > 2.0, 0.3, 0.001)
    length_rng = np.random.default_rng(repeat)
    tokens = length_rng.lognormal(3, 0.9, len(arrivals_s)).astype(int) + 2
    rows = []
    for i, at_s in enumerate(arrivals_s):
        at, sent = ns(at_s), ns(at_s) + int(rng.integers(200_000, 900_000))
        queue, cold, prefill = ns(queue_s[i]), ns(cold_s[i]), ns(prefill_s[i])
        if is_shed[i]:
            rows.append(Outcome(i, at, sent, sent, done_at_ns=sent + queue, queue_ns=queue, status=SHED, http_status=503))
            continue
        first = sent + queue + cold + prefill + 1_400_000
        last = first + ns(tpot_s[i]) * int(tokens[i] - 1)
        rows.append(
            Outcome(
                i, at, sent, sent + 600_000, first, first, last, last + 300_000, limit_ns=0, queue_ns=queue, cold_start_ns=cold,
                route_ns=300_000, prefill_ns=prefill, decode_ns=last - first, retry_ns=0, network_ns=1_400_000,
                unexplained_ns=sent - at,
                chunks=int(tokens[i]), prompt_tokens=100, output_tokens=int(tokens[i]), first_chunk_tokens=1, replica_id=i % 4,
                http_status=200, attempts=1, status=OK,
            )
        )  # fmt: skip
    plan = pa.table(
        {
            "request_id": pa.array(range(len(arrivals_s)), pa.int64()),
            "arrival_at_ns": pa.array((arrivals_s * NS_PER_S).astype(np.int64)),
            "prompt_tokens": pa.array([100] * len(arrivals_s), pa.int64()),
            "output_tokens": pa.array(tokens.astype(np.int64)),
        }
    )
    lifetimes, states = _fleet(span_s, speed)
    prices = {"usd_per_gpu_hour": 2.74, "gpu": "a100_sxm", "source": "AWS on demand", "date": "2026-11-09"}
    return write_run(
        path, rows, plan=plan, policy=policy, repeat=repeat, lifetimes=lifetimes, states=states, ended_s=span_s + 60, parts=parts,
        kind="simulated" if ground["kind"] == "simulated" else "live", ground=ground, prices=prices, planned_ns=ns(span_s),
        trace={"name": "azure-code-2023", "sha256": "5" * 64, "rows": len(arrivals_s),
               "shaping": {"jitter_s": 2.0, "seed": repeat}},
    )  # fmt: skip


def _fleet(span_s: float, speed: float) -> tuple[list[ReplicaLifetime], list[FleetState]]:
    """Two replicas always, up to four more in each burst, 7 s after they were asked for."""
    extra = round(5 - speed * 1.5)
    lives = [ReplicaLifetime(i, "default", "a100_sxm", 1, 0, ns(0.001), None, "") for i in range(2)]
    states = []
    for burst_s in np.arange(0, span_s, 150.0):
        for i in range(extra):
            lives.append(
                ReplicaLifetime(
                    len(lives), "default", "a100_sxm", 1, ns(burst_s + 3), ns(burst_s + 10), ns(burst_s + 60 + 4 * i), "idle"
                )
            )
    for second in range(int(span_s)):
        since = second % 150
        starting = extra if 3 <= since < 10 else 0
        ready = 2 + (extra if 10 <= since < 56 else 0)
        draining = sum(56 <= since < 60 + 4 * i for i in range(extra))
        queued = round(max(0.0, 40 * np.sin(np.pi * since / 30) / speed)) if since < 30 else 0
        states.append(
            FleetState(ns(second), queued, 3 * ready, ready, starting, ready, draining, second, second, 2.74 * (ready + starting))
        )
    return lives, states


def write_demo(
    path: Path,
    speeds: dict[str, float],
    *,
    repeats: int = 5,
    span_s: float = 900,
    rps: float = 3,
    kind: str = "simulated",
    parts: int = 1,
) -> Path:
    """An experiment folder of ``len(speeds)`` policies x ``repeats``; every policy gets the arrivals of its repeat."""
    path.mkdir(parents=True, exist_ok=True)
    detail = {"simulated": "llama-3.1-8b on a100_sxm, cold start 7 s"}.get(kind, "llama-3.1-8b on a100_sxm")
    runs: list[RunDir] = []
    for repeat in range(repeats):
        arrivals_s = bursty_arrivals(np.random.default_rng(repeat), span_s, rps)
        for name, speed in speeds.items():
            arm = path / "arms" / f"{name}-{repeat}"
            arm.parent.mkdir(exist_ok=True)
            ground = {"kind": kind, "detail": detail}
            runs.append(write_arm(arm, arrivals_s, policy=name, repeat=repeat, speed=speed, ground=ground, parts=parts))
    return write_experiment(path, {"ttft_s": 2.0, "tpot_s": 0.05}, runs, spec={"trace": "azure-code-2023", "repeats": repeats})


def main(arguments: Sequence[str] | None = None) -> None:
    """python -m tests.make_experiment DIR: something to look at."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--span", type=float, default=900)
    parser.add_argument("--kind", default="simulated")
    found = parser.parse_args(arguments)
    speeds = {"round_robin-concurrency": 0.8, "least_outstanding-concurrency": 1.4, "least_outstanding-queue_depth": 2.0}
    write_demo(found.path, speeds, repeats=found.repeats, span_s=found.span, kind=found.kind)


if __name__ == "__main__":
    main()

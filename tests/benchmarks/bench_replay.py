"""On time, through everything: the busiest five minutes of the shipped hour at 1x, by Locust through the gateway onto stand-ins.

Three runs: the median of their lateness p99 is the figure, the worst stands beside it, and every request must be accounted for.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from replay.runs import RunDir
from stack import experiment as experiments
from stack import live

RUNS = 3
FOUR = {"kind": "fixed", "replicas": 4}
EXPERIMENT = {
    "name": "lateness",
    "shaping": {"busiest": "5m"},
    "fleet": {"kind": "stand-in", "gpu": "h100_sxm"},
    "policies": [{"name": "four", "balancer": "least_outstanding", "autoscaler": FOUR, "replicas": {"min": 4, "max": 4}}],
    "repeats": RUNS,
    "slo": {"ttft_s": 1.0},
    "drain_s": 30,
}  # fmt: skip


def figures() -> Iterator[dict[str, Any]]:
    experiment = experiments.from_dict(EXPERIMENT, where="bench_replay")
    p99_ms, lost, answered = [], 0, []
    with tempfile.TemporaryDirectory() as scratch:
        for arm in experiments.arms(experiment):
            plan, folder = experiments.plan(experiment, arm.repeat), Path(scratch) / arm.folder
            live.run_arm(experiment, arm, plan, folder, lambda *_: None)
            rows = RunDir.open(folder).outcomes()
            lost += len(plan) - len(rows)
            statuses = rows["status"].to_pylist()
            answered.append(statuses.count("ok") / len(statuses))
            lateness = sorted(pc.subtract(rows["sent_at_ns"], rows["scheduled_at_ns"]).to_pylist())
            p99_ms.append(lateness[int(0.99 * len(lateness))] / 1e6)
            p50_ms, max_ms = lateness[len(lateness) // 2] / 1e6, lateness[-1] / 1e6
            print(
                f"   run {arm.repeat}: {len(rows)} of {len(plan)} rows, lateness {p50_ms:.2f} / {p99_ms[-1]:.2f} / {max_ms:.2f} ms",
                flush=True,
            )
    median_ms = statistics.median(p99_ms)
    yield figure("send lateness p99, busiest 5 min, median of 3", median_ms, "ms", "the schedule", "<= 2", median_ms <= 2)
    yield figure("send lateness p99, worst of 3", max(p99_ms), "ms", "the schedule", None, None)
    yield figure("requests without a row", float(lost), "requests", "the plan", "0", lost == 0)
    yield figure("answered ok, least of 3", min(answered), "share", "all that arrived", "1", min(answered) == 1)


def figure(name: str, value: float, unit: str, against: str, target: str | None, ok: bool | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": None, "target": target, "ok": ok}

"""What breaks in the middle of a run is counted, named and survived; nothing is lost and nothing is left running."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import loadgen
from replay import inputs, traces
from replay.runs import RunDir
from stack import experiment as experiments
from stack import live
from tests.e2e.processes import NAME, marked, new_mark, none_left

TWO = {
    "name": "two",
    "balancer": "least_outstanding",
    "autoscaler": {"kind": "fixed", "replicas": 2},
    "replicas": {"min": 2, "max": 2},
}
EXPERIMENT = {
    "name": "faults",
    "shaping": {"busiest": "25s"},
    "fleet": {"kind": "stand-in", "gpu": "h100_sxm", "cold_start": {"engine_start": 1.0}},
    "policies": [TWO],
    "slo": {"ttft_s": 1.0},
    "drain_s": 20,
}


def wait_for_rows(folder: Path, rows: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and live._rows(folder) < rows:
        time.sleep(0.05)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(NAME, value := new_mark())
    return value


@pytest.fixture
def experiment() -> experiments.Experiment:
    return experiments.from_dict(EXPERIMENT, where="test_faults")


def test_a_replica_killed_in_the_middle_is_replaced_and_every_request_ends_once(
    experiment: experiments.Experiment, mark: str, tmp_path: Path
) -> None:
    [arm] = experiments.arms(experiment)
    plan, folder = experiments.plan(experiment, 0), tmp_path / "arm"
    killed: list[int] = []

    def kill() -> None:
        wait_for_rows(folder, 50)
        victim = marked(mark, "stack.replica")[0]
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    threading.Thread(target=kill, daemon=True).start()
    live.run_arm(experiment, arm, plan, folder, lambda *_: None)
    assert killed
    run = RunDir.open(folder)
    rows = run.outcomes().to_pylist()
    assert sorted(row["request_id"] for row in rows) == list(range(len(plan)))
    statuses = Counter(row["status"] for row in rows)
    assert set(statuses) <= {"ok", "error"}, "those mid-stream are errors, those without a token went to the other replica"
    assert statuses["ok"] > len(rows) * 0.8
    assert all(row["detail"] for row in rows if row["status"] == "error")
    lifetimes = run.lifetimes()
    assert len(lifetimes) == 3, "the dead one was replaced"
    assert sum(life.ready_at_ns is not None for life in lifetimes) == 3
    assert inputs.verify((folder / "gateway" / "fleet.log").read_bytes()) is None
    assert none_left(mark)


def test_the_gateway_killed_in_the_middle_leaves_rows_and_no_process(
    experiment: experiments.Experiment, mark: str, tmp_path: Path
) -> None:
    [arm] = experiments.arms(experiment)
    plan, folder = experiments.plan(experiment, 0), tmp_path / "arm"

    def kill() -> None:
        wait_for_rows(folder, 30)
        [gateway] = marked(mark, "stack.gateway")
        gateway.kill()

    threading.Thread(target=kill, daemon=True).start()
    live.run_arm(experiment, arm, plan, folder, lambda *_: None)
    rows = RunDir.open(folder).outcomes().to_pylist()
    assert sorted(row["request_id"] for row in rows) == list(range(len(plan)))
    assert Counter(row["status"] for row in rows)["error"] > 0
    assert none_left(mark), "its replicas and its recorder went with it"


def test_a_full_disk_stops_the_run_and_says_at_which_second(experiment: experiments.Experiment, tmp_path: Path) -> None:
    """A real limit of the operating system (RLIMIT_FSIZE, 40 kB a file) stands for the full disk: writing fails in the same way."""
    [arm] = experiments.arms(experiment)
    trace, run = tmp_path / "trace.parquet", tmp_path / "run"
    traces.write(experiments.plan(experiment, 0), trace)
    folder = tmp_path / "arm"
    folder.mkdir()
    with live._gateway(experiment, arm, folder) as url:
        live._wait_ready(experiment, url, lambda *_: None)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "locust", "-f", str(Path(loadgen.__file__).parent), "--headless", "--host", url),
                *("--trace", str(trace), "--run-dir", str(run), "--bytes-per-token", "4", "--drain", "20s"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
            env={**os.environ},
        )
    assert done.returncode == 1, done.stdout[-3000:]
    manifest = RunDir.open(run).manifest
    assert not manifest["validity"]["valid"]
    reasons = " ".join(manifest["validity"]["reasons"])
    assert "could not be written" in reasons
    assert re.search(r"second \d", reasons), "the second of the cut is named"
    assert len(RunDir.open(run).outcomes()) > 10, "flushed rows stay readable"

"""One experiment, live, as a user runs it: gateway, stand-ins and Locust as processes; then the parts that must not be believed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from replay import inputs
from replay.records import PHASES, STATUSES
from replay.runs import RunDir
from tests.e2e.processes import NAME, new_mark, none_left

TIDEGAUGE = [sys.executable, "-c", "from stack.cli import main; main()"]
EXPERIMENT = {
    "name": "cut",
    "trace": "azure-code-2023",
    "shaping": {"busiest": "30s"},
    "fleet": {"kind": "stand-in", "gpu": "h100_sxm", "cold_start": {"engine_start": 1.0}},
    "policies": ["rr-concurrency", "lo-concurrency"],
    "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
    "drain_s": 30,
}


def tidegauge(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TIDEGAUGE, *arguments], capture_output=True, text=True, timeout=300, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "cut.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    mark = new_mark()
    done = tidegauge("run", str(folder / "cut.yaml"), "--out", str(folder / "runs"), env={**os.environ, NAME: mark})
    assert done.returncode == 0, done.stdout + done.stderr
    assert none_left(mark), "nothing is left running"
    assert "lo-concurrency" in done.stdout
    [experiment] = (folder / "runs").iterdir()
    return experiment


def arms(run: Path) -> list[RunDir]:
    listing = json.loads((run / "experiment.json").read_text())["arms"]
    return [RunDir.open(run / arm["path"]) for arm in listing]


def test_every_request_is_accounted_for_and_on_time(run: Path) -> None:
    for arm in arms(run):
        plan, rows = arm.plan(), arm.outcomes()
        assert plan is not None
        assert sorted(rows["request_id"].to_pylist()) == list(range(len(plan)))
        assert set(rows["status"].to_pylist()) <= set(STATUSES)
        assert rows["status"].to_pylist().count("ok") > 0.95 * len(rows)
        lateness = sorted(a - b for a, b in zip(rows["sent_at_ns"].to_pylist(), rows["scheduled_at_ns"].to_pylist(), strict=True))
        assert lateness[0] >= 0, "never early"
        assert arm.manifest["validity"]["valid"], arm.manifest["validity"]


def test_the_phases_sum_to_the_latency_and_none_is_negative(run: Path) -> None:
    for arm in arms(run):
        for row in arm.outcomes().to_pylist():
            if row["status"] != "ok":
                continue
            phases = [row[f"{name}_ns"] or 0 for name in PHASES]
            assert min(phases) >= 0, row
            assert sum(phases) == row["done_at_ns"] - row["scheduled_at_ns"], row


def test_lengths_are_those_of_the_trace(run: Path) -> None:
    for arm in arms(run):
        rows = [row for row in arm.outcomes().to_pylist() if row["status"] == "ok"]
        assert all(row["output_tokens"] == row["recorded_output_tokens"] for row in rows), "forced at the engine"
        off = [
            row
            for row in rows
            if abs(row["prompt_tokens"] - row["recorded_prompt_tokens"]) > 0.1 * row["recorded_prompt_tokens"] + 8
        ]
        assert not off


def test_the_live_fleet_did_what_a_fresh_one_does(run: Path) -> None:
    for arm in arms(run):
        log = (arm.path / "gateway" / "fleet.log").read_bytes()
        assert sum(1 for frame in inputs.frames(log) if inputs.INPUTS[frame[0]] == "arrive") >= len(arm.outcomes())
        assert inputs.verify(log) is None
        assert not re.search(rb"[ -~]{64}", log.split(b"\n", 1)[1]), "sizes and hashes, no text"


def test_the_run_is_reported_from_its_folder_alone(run: Path) -> None:
    done = tidegauge("report", str(run), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"rr-concurrency", "lo-concurrency"} <= set(json.dumps(json.loads(done.stdout)).replace('"', " ").split())


def test_simulated_it_leaves_the_same_files(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    done = tidegauge("run", str(tmp_path / "cut.yaml"), "--simulate", "--out", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    [simulated] = (tmp_path / "runs").iterdir()
    for live, virtual in zip(arms(run), arms(simulated), strict=True):
        assert set(virtual.outcomes().column_names) == set(live.outcomes().column_names)
        assert len(virtual.outcomes()) == len(live.outcomes())
        assert len(virtual.states()) > 0
        assert virtual.lifetimes()


def test_ctrl_c_brings_everything_down_and_leaves_a_readable_run(tmp_path: Path) -> None:
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    mark = new_mark()
    command = [*TIDEGAUGE, "run", str(tmp_path / "cut.yaml"), "--out", str(tmp_path / "runs")]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, NAME: mark})
    deadline = time.monotonic() + 60
    spools: list[Path] = []
    while time.monotonic() < deadline and not any(spool.stat().st_size for spool in spools):
        time.sleep(0.2)
        spools = list((tmp_path / "runs").rglob("spool/*.outcomes"))
        spools = [spool for spool in spools if "gateway" not in spool.parts]
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(120) != 0
    assert none_left(mark), "nothing is left running"
    [arm] = {spool.parent.parent for spool in spools}
    assert len(RunDir.open(arm).outcomes()) > 0


def test_a_plan_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    done = tidegauge("run", str(tmp_path / "cut.yaml"), "--plan", "--json", "--out", str(tmp_path / "runs"))
    planned = json.loads(done.stdout)
    assert [arm["policy"] for arm in planned["arms"]] == ["rr-concurrency", "lo-concurrency"]
    assert planned["warnings"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"polices": []}, "unknown key"),
        ({"trace": "no-such-file.csv"}, "no-such-file.csv"),
        ({"policies": ["no-such-policy"]}, "no-such-policy"),
        ({"fleet": {"kind": "stand-in", "gpu": "abacus"}}, "abacus"),
        ({"shaping": {"busiest": "soon"}}, "soon"),
        ({"repeats": 0}, "repeats"),
        ({"slo": {"ttft": 1}}, "ttft"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(tmp_path: Path, change: dict[str, object], said: str) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**EXPERIMENT, **change}))
    done = tidegauge("run", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "runs"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing half written"


def test_endpoints_that_do_not_answer_are_named(tmp_path: Path) -> None:
    fleet = {"kind": "urls", "urls": ["http://127.0.0.1:9"]}
    (tmp_path / "away.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "fleet": fleet, "policies": ["round-robin"]}))
    done = tidegauge("run", str(tmp_path / "away.yaml"), "--out", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr + done.stdout

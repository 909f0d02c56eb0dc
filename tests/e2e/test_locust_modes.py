"""Locust as users start it: page, headless, --processes, master and worker; what it leaves, prints and returns."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from replay.runs import RunDir
from tests import truth_server
from tests.e2e import processes

LOADGEN = str(Path(__file__).parents[2] / "loadgen")
REQUESTS = 60
KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with truth_server.running() as url:
        yield url


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """60 requests over three seconds, a third of them in sessions."""
    path = tmp_path / "trace.jsonl"
    rows: list[dict[str, Any]] = [{"timestamp": i * 50, "input_length": 100, "output_length": 8} for i in range(REQUESTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def start(tmp_path: Path, url: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Locust in a folder of its own; at the end nothing of it may be left."""
    started: list[subprocess.Popen[str]] = []
    mark = processes.new_mark()
    environment = {**os.environ, "OPENAI_API_KEY": KEY, processes.NAME: mark}

    def locust(*arguments: str, script: str = "plain,ttft=30,gap=2", **more: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "locust", "-f", LOADGEN, "--host", f"{url}/{script}", "--only-summary", *arguments]
        process: subprocess.Popen[str] = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True, **{"cwd": tmp_path, **more},
        )  # fmt: skip
        started.append(process)
        return process

    yield locust
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert processes.none_left(mark)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def rpc_port() -> tuple[str, ...]:
    """--processes: where the master listens and where its children look for it."""
    port = free_port()
    return ("--master-bind-port", port, "--master-port", port)


def finished(process: subprocess.Popen[str], code: int, limit_s: float = 60) -> str:
    text, _ = process.communicate(timeout=limit_s)
    assert process.returncode == code, text
    assert KEY not in text
    return text


def run_of(folder: Path) -> RunDir:
    [path] = (folder / "runs").iterdir()
    for file in path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()
    return RunDir.open(path)


def is_complete(run: RunDir) -> None:
    """Every planned request left exactly one row, in time, and the manifest says so."""
    rows = run.outcomes()
    assert sorted(rows["request_id"].to_pylist()) == list(range(REQUESTS))
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert set(rows["output_tokens"].to_pylist()) == {8}
    assert run.manifest["ended"]["reason"] == "complete"
    assert run.manifest["validity"]["rows"] == REQUESTS
    assert sum(json.loads((run.path / "gaps.json").read_text())["counts"]) == REQUESTS * 7


def test_headless_ends_by_itself_and_leaves_a_complete_run(
    start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path
) -> None:  # fmt: skip
    process = start(
        "--headless", "--trace", str(trace), "--csv", "out/x", "--html", "out/x.html", "-u", "50", "-t", "1s", "--slo", "ttft<=1ms",
        "--run-id", "mine",
    )  # fmt: skip
    text = finished(process, 0)
    assert "have no impact on LoadShapes" in text  # -u and -t: Locust says that they are ignored
    assert "users, spawn rate and run time are set for you" in text
    assert text.rstrip().endswith("VALID\nrun directory: runs/mine\nnext: tidegauge report runs/mine")
    run = run_of(tmp_path)
    is_complete(run)
    assert run.manifest["id"] == "mine"
    assert run.manifest["slo"] == {"ttft_s": 0.001}
    assert run.manifest["model"] == "truth-7b"
    assert "recorder: 60 rows" in text
    assert list((run.path / "requests").glob("part-*.parquet"))
    assert (run.path / "spans.jsonl").stat().st_size  # every request missed that target, and the slow are kept
    stats = (tmp_path / "out" / "x_stats.csv").read_text()
    assert f"POST,/v1/chat/completions,{REQUESTS},0" in stats
    assert f"POST,TTFT,{REQUESTS},0" in stats
    assert f"POST,TPOT,{REQUESTS},0" in stats
    assert f",Aggregated,{REQUESTS},0" in stats  # the two beside do not inflate the totals
    assert "TTFT" in (tmp_path / "out" / "x.html").read_text()


def test_processes_share_the_trace(start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path) -> None:
    text = finished(start("--headless", "--trace", str(trace), "--processes", "2", *rpc_port()), 0)
    run = run_of(tmp_path)
    is_complete(run)
    assert len(list((run.path / "spool").glob("*.outcomes"))) == 2
    assert all(spool.stat().st_size for spool in (run.path / "spool").glob("*.outcomes"))
    assert text.count("\nVALID\n") == 1


def test_master_and_workers_start_together(start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path) -> None:
    port = free_port()
    master = start("--headless", "--master", "--expect-workers", "2", "--master-bind-port", port, "--trace", str(trace))
    workers = [start("--worker", "--master-port", port) for _ in range(2)]
    finished(master, 0)
    for worker in workers:
        finished(worker, 0)
    is_complete(run_of(tmp_path))


def test_a_killed_worker_makes_the_run_invalid(start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path) -> None:
    port = free_port()
    master = start("--headless", "--master", "--expect-workers", "2", "--master-bind-port", port, "--trace", str(trace))
    workers = [start("--worker", "--master-port", port) for _ in range(2)]
    spools = tmp_path / "runs"
    wait_for(lambda: any(spool.stat().st_size for spool in spools.glob("*/spool/*.outcomes")))
    workers[0].kill()
    text = finished(master, 1)
    assert "was lost, with the rows that it had not written" in text
    run = run_of(tmp_path)
    assert not run.manifest["validity"]["valid"]
    finished(workers[1], 0)


def get(url: str, **form: str) -> str:
    data = urllib.parse.urlencode(form).encode() if form else None
    with urllib.request.urlopen(url, data=data, timeout=10) as response:  # noqa: S310 (our own Locust)
        text: str = response.read().decode()
        return text


def wait_for(holds: Callable[[], Any], limit_s: float = 30.0) -> Any:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if found := holds():
                return found
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("did not happen in time")


def test_the_page_starts_shows_and_restarts_a_replay(
    start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path
) -> None:
    port = free_port()
    process = start("--web-port", port)
    page = f"http://127.0.0.1:{port}"
    html = wait_for(lambda: get(page))
    assert '"trace"' in html  # our options are fields of the page's form
    assert KEY not in html
    addresses = {c.laddr.ip for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}

    def tab() -> dict[str, str]:
        [extended] = json.loads(get(f"{page}/stats/requests"))["extended_stats"]
        return {row["name"]: row["value"] for row in extended["data"]}

    assert tab() == {"Replay": "not started"}
    form = {"user_count": "1", "spawn_rate": "1", "host": "", "trace": str(tmp_path / "no-such-file")}
    host = json.loads(get(f"{page}/swarm", **{**form, "host": "http://127.0.0.1:1"}))
    assert host["success"]
    wait_for(lambda: "no-such-file" in tab().get("Replay", ""))  # a wrong path is said in the page, which lives on
    wait_for(lambda: json.loads(get(f"{page}/stats/requests"))["state"] == "stopped")

    url = psutil.Process(process.pid).cmdline()[psutil.Process(process.pid).cmdline().index("--host") + 1]
    for run_id in ("one", "two"):
        get(f"{page}/swarm", user_count="1", spawn_rate="1", host=url, trace=str(trace), run_id=run_id, run_dir="")
        wait_for(lambda name=run_id: tab().get("Verdict") and tab()["Run directory"].endswith(name))
        shown = tab()
        assert shown["Verdict"].startswith(("valid", "INVALID: the sender was late"))
        assert shown["Statuses"] == f"{REQUESTS} ok"
        assert shown["Progress"].startswith(f"{REQUESTS} of {REQUESTS} ended (100%)")
        wait_for(lambda: json.loads(get(f"{page}/stats/requests"))["state"] == "stopped")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]
    process.send_signal(signal.SIGINT)
    finished(process, 0)


def test_the_stop_button_ends_a_run_that_then_is_invalid(
    start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path
) -> None:  # fmt: skip
    port = free_port()
    process = start("--web-port", port, "--autostart", "--trace", str(trace), "--bytes-per-token", "4", script="hang")
    page = f"http://127.0.0.1:{port}"
    wait_for(lambda: re.search(r"[2-9]\d inside", get(f"{page}/stats/requests")))
    get(f"{page}/stop", stop="1")
    process.send_signal(signal.SIGTERM)
    finished(process, 1)
    run = run_of(tmp_path)
    assert run.manifest["validity"]["reasons"][0] == "the run was stopped by hand"
    assert set(run.outcomes()["status"].to_pylist()) == {"cancelled"}


def test_autostart_and_autoquit(start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path) -> None:
    finished(start("--autostart", "--autoquit", "0", "--web-port", free_port(), "--trace", str(trace)), 0)
    is_complete(run_of(tmp_path))


@pytest.mark.parametrize(
    ("sent", "mode"), [(signal.SIGTERM, "--headless"), (signal.SIGINT, "--headless"), (signal.SIGTERM, "--autostart")]
)
def test_a_signal_ends_a_run_with_its_rows(
    start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path, sent: signal.Signals, mode: str
) -> None:  # fmt: skip
    process = start(mode, "--trace", str(trace), "--bytes-per-token", "4", "--web-port", free_port(), script="hang")
    wait_for(lambda: list(tmp_path.glob("runs/*/spool/*.outcomes")))
    time.sleep(3)  # until some are inside: the spool does not tell
    process.send_signal(sent)
    text = finished(process, 1)
    assert re.search("INVALID: (the run was stopped by hand|Locust was told to quit)", text)
    run = run_of(tmp_path)
    assert set(run.outcomes()["status"].to_pylist()) == {"cancelled"}
    assert not run.manifest["validity"]["valid"]


def test_the_drain_ends_a_run_whose_answers_do_not_come(
    start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path
) -> None:  # fmt: skip
    finished(start("--headless", "--trace", str(trace), "--bytes-per-token", "4", "--drain", "1s", "--to", "1s", script="hang"), 0)
    assert run_of(tmp_path).outcomes()["status"].to_pylist() == ["timeout"] * 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--trace: no trace given"),
        (("--processes", "2"), "--trace: no trace given"),
        (("--trace", "no-such-file.csv"), "no-such-file.csv"),
        (("--trace", "azure-code-2023", "--from", "soon"), "--from"),
        (("--trace", "azure-code-2023", "--host", "http://127.0.0.1:1"), "nobody listens at http://127.0.0.1:1"),
        (("--trace", "azure-code-2023", "--host", "ftp://x"), "--host"),
    ],
)
def test_bad_input_is_one_clear_error(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:  # fmt: skip
    if "--processes" in arguments:
        arguments += rpc_port()
    text = finished(start("--headless", *arguments), 2)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


def test_a_worker_that_cannot_read_the_trace_ends_the_run(
    start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path
) -> None:  # fmt: skip
    port = free_port()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    master = start("--headless", "--master", "--master-bind-port", port, "--trace", trace.name)
    worker = start("--worker", "--master-port", port, cwd=elsewhere)
    assert "trace.jsonl" in finished(master, 2)
    finished(worker, 0)


def test_a_full_disk_stops_the_run_and_keeps_what_was_written(
    start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path
) -> None:  # fmt: skip
    limit = 20 * 1024  # as good as a full disk for every file that wants to be larger: 60 rows do
    process = start(
        "--headless", "--trace", str(trace), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    text = finished(process, 1)
    assert re.search(r"INVALID: rows could not be written \(.*File too large\): they are complete up to second [12]\.\d\d", text)
    run = run_of(tmp_path)
    rows = run.outcomes()
    assert 20 < len(rows) < REQUESTS
    assert not run.manifest["validity"]["valid"]


def test_a_run_is_never_overwritten(start: Callable[..., subprocess.Popen[str]], trace: Path, tmp_path: Path) -> None:
    finished(start("--headless", "--trace", str(trace), "--to", "200ms", "--run-dir", "r"), 0)
    before = (tmp_path / "r" / "run.json").read_text()
    assert "a run is never overwritten" in finished(start("--headless", "--trace", str(trace), "--run-dir", "r"), 2)
    assert (tmp_path / "r" / "run.json").read_text() == before


def test_the_options_stand_beside_locusts_in_its_help(start: Callable[..., subprocess.Popen[str]]) -> None:
    text = finished(start("--replay-help"), 0)
    assert "Trace replay" in text
    for flag in ("--trace", "--busiest", "--bytes-per-token", "--drain", "--slo"):
        assert flag in text

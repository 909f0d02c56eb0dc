"""The gateway as a process over stand-in replicas: users' own client library, signals, sudden deaths, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from replay import inputs
from replay.runs import RunDir

FLEET = {"kind": "stand-in", "cold_start": {}}
POLICY = {"name": "e2e", "balancer": "least_outstanding", "replicas": {"min": 2, "max": 2}}


def wait_for(condition: Callable[[], Any], limit_s: float = 20.0) -> Any:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s} s: {condition}")


class Running:
    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path) -> None:
        assert process.stdout is not None
        self.process, self.run_dir = process, run_dir
        self.url: str = json.loads(process.stdout.readline())["url"]

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:  # noqa: S310 (our own gateway)
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def gateway(folder: Path, **config: Any) -> Iterator[Running]:
    document = {"run_dir": str(folder / "gateway"), "policy": POLICY, "fleet": FLEET, **config}
    path = folder / "gateway.json"
    path.write_text(json.dumps(document))
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "stack.gateway", "--config", str(path)], stdout=subprocess.PIPE, stderr=log
        )
    running = Running(process, folder / "gateway")
    children: list[psutil.Process] = []
    try:
        wait_for(lambda: running.get("/readyz")[0] == 200)
        children = running.children()
        yield running
        children += running.children() if process.poll() is None else []
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"left running: {alive}"


def test_users_client_library_works_unchanged(tmp_path: Path) -> None:
    with gateway(tmp_path, api_keys={"sk-team": "team"}) as running:
        client = running.client(api_key="sk-team")
        assert [model.id for model in client.models.list()] == ["meta-llama/Meta-Llama-3.1-8B"]
        asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Say something"}], "max_tokens": 5}
        whole = client.chat.completions.create(**asked)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 5
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)  # no chunk without choices comes unasked
        assert text
        usage = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))[-1].usage
        assert usage is not None
        assert usage.completion_tokens == 5
        assert client.completions.create(model="m", prompt="Say something", max_tokens=3).choices[0].text
        with pytest.raises(openai.AuthenticationError):
            running.client(api_key="sk-wrong").chat.completions.create(**asked)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="m", input="x")
    run = RunDir.open(running.run_dir)
    rows = run.outcomes().to_pylist()
    assert [(row["status"], row["tenant"], row["output_tokens"]) for row in rows] == [("ok", "team", n) for n in (5, 5, 5, 3)]
    assert run.manifest["ended"]["statuses"]["ok"] == 4
    assert run.manifest["ended"]["refused"] == 1
    assert run.manifest["recorder"]["rows"] == 4
    assert inputs.verify((running.run_dir / "fleet.log").read_bytes()) is None


def test_limits_raise_the_library_s_own_errors_and_say_when_to_come_back(tmp_path: Path) -> None:
    policy = {**POLICY, "limiter": {"kind": "token_bucket", "requests_per_min": 1, "burst_requests": 1}}
    with gateway(tmp_path, policy=policy) as running:
        asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        running.client().chat.completions.create(**asked)
        with pytest.raises(openai.RateLimitError) as caught:
            running.client().chat.completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) > 30
        assert caught.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_a_stream_in_flight(tmp_path: Path, signum: signal.Signals) -> None:
    with gateway(tmp_path) as running:
        stream = running.client().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], max_tokens=40, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(iter(stream))
        running.process.send_signal(signum)
        rest = list(stream)
        assert first.choices
        assert rest[-1].choices[0].finish_reason == "length"
        assert running.process.wait(30) == 0
    lives = [json.loads(line) for line in (running.run_dir / "lifetimes.jsonl").read_text().splitlines()]
    assert sorted(life["replica_id"] for life in lives if life.get("stopped_at_ns")) == [0, 1]


def test_a_replica_killed_in_the_middle_costs_its_stream_and_is_replaced(tmp_path: Path) -> None:
    with gateway(tmp_path, policy={**POLICY, "replicas": {"min": 1, "max": 1}}) as running:
        stream = running.client().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], max_tokens=5000, stream=True, extra_body={"ignore_eos": True}
        )
        iterator = iter(stream)
        next(iterator)
        replica = next(child for child in running.children() if "stack.replica" in " ".join(child.cmdline()))
        replica.kill()
        with pytest.raises(openai.APIError, match="the replica failed"):
            list(iterator)
        wait_for(lambda: running.get("/readyz")[1]["ready"] == 1)
        answer = running.client().chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": "x"}], max_tokens=2
        )
        assert answer.headers["x-tidegauge-replica"] == "1"
    statuses = RunDir.open(running.run_dir).outcomes()["status"].to_pylist()
    assert statuses == ["error", "ok"]


def test_a_gateway_killed_outright_leaves_nothing_running_and_its_rows_readable(tmp_path: Path) -> None:
    with gateway(tmp_path) as running:
        running.client().chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], max_tokens=2)
        time.sleep(0.6)  # more than the spool's 0.25 s: what may be lost
        os.kill(running.process.pid, signal.SIGKILL)
    assert len(RunDir.open(running.run_dir).outcomes()) == 1
    assert inputs.verify((running.run_dir / "fleet.log").read_bytes()) is None


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "is not JSON"),
        ('{"run_dir": "x"}', "policy: is missing"),
        ('{"run_dir": "x", "policy": {"balancer": "nope"}, "fleet": {"kind": "stand-in"}}', "unknown kind 'nope'"),
        ('{"run_dir": "x", "policy": {"name": "x"}, "fleet": {"kind": "stand-in"}, "prot": 1}', "prot: unknown key"),
        ('{"run_dir": "x", "policy": {"name": "x"}, "fleet": {"kind": "stand-in"}, "limits": {"drain": 1}}', "limits.drain"),
        (
            '{"run_dir": "x", "policy": {"name": "x"}, "fleet": {"kind": "stand-in"}, "api_keys": {"sk-secret": 1}}',
            "api_keys, entry 1",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(tmp_path: Path, document: str, said: str) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(document)
    done = subprocess.run(
        [sys.executable, "-m", "stack.gateway", "--config", str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "sk-secret" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_serves_until_interrupted(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text("kind: stand-in\ncold_start: {}\n")
    code = "import stack.cli.serve; from stack.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "gateway",
        "--policy",
        "round-robin",
        "--fleet",
        "fleet.yaml",
        "--run-dir",
        "run",
        "--json",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        running = Running(process, tmp_path / "run")
        wait_for(lambda: running.get("/readyz")[0] == 200)
        assert running.get("/healthz")[1]["policy"] == "round-robin"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr

"""Recorded bursts onto real engines: llama.cpp with continuous batching behind our gateway, and users' own client library on it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

import loadgen
from replay import traces
from replay.runs import RunDir
from stack import experiment as experiments
from stack import live

pytest.importorskip("xllamacpp", reason="the extra 'llama' is not installed")

POLICY = {
    "name": "two",
    "balancer": "least_outstanding",
    "autoscaler": {"kind": "fixed", "replicas": 2},
    "replicas": {"min": 2, "max": 2},
    "slots_per_replica": 8,
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> experiments.Experiment:
    """The busiest 30 s of the shipped hour, thinned and with lengths cut to a sixteenth: what two cores hold."""
    folder = tmp_path_factory.mktemp("llama")
    table = traces.shape(traces.read("azure-code-2023"), traces.Shaping(busiest_s=30, rate_scale=0.2))
    rows = [
        {
            "timestamp": row.arrival_at_ns / 1e6,
            "input_length": max(row.prompt_tokens // 16, 32),
            "output_length": min(max(row.output_tokens // 4, 4), 40),
        }
        for row in traces.recorded(table)
    ]
    (folder / "small.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    document = {
        "name": "llama",
        "trace": "small.jsonl",
        "fleet": {"kind": "llama"},
        "policies": [POLICY],
        "slo": {"ttft_s": 5.0},
        "drain_s": 60,
    }
    (folder / "llama.yaml").write_text(yaml.safe_dump(document))
    return experiments.load(folder / "llama.yaml")


def test_a_recorded_burst_is_replayed_onto_real_engines(experiment: experiments.Experiment, tmp_path: Path) -> None:
    [arm] = experiments.arms(experiment)
    plan = experiments.plan(experiment, 0)
    live.run_arm(experiment, arm, plan, tmp_path / "arm", lambda *_: None)
    run = RunDir.open(tmp_path / "arm")
    rows = run.outcomes().to_pylist()
    assert sorted(row["request_id"] for row in rows) == list(range(len(plan)))
    assert run.manifest["ground"]["kind"] == "random-weights"
    answered = [row for row in rows if row["status"] == "ok"]
    assert len(answered) == len(rows), [row for row in rows if row["status"] != "ok"][:3]
    assert {row["replica_id"] for row in answered} == {0, 1}, "both engines worked"
    for row in answered:
        assert row["output_tokens"] == row["recorded_output_tokens"], "the length is forced by ignore_eos"
        assert abs(row["prompt_tokens"] - row["recorded_prompt_tokens"]) <= 0.1 * row["recorded_prompt_tokens"] + 8
        assert 0 < row["first_token_at_ns"] - row["sent_at_ns"] <= row["done_at_ns"] - row["sent_at_ns"]
    assert all(life.ready_at_ns is not None and life.stopped_at_ns is not None for life in run.lifetimes())


@contextlib.contextmanager
def gateway(experiment: experiments.Experiment, folder: Path) -> Iterator[str]:
    folder.mkdir()
    with live._gateway(experiment, next(experiments.arms(experiment)), folder) as url:
        live._wait_ready(experiment, url, lambda *_: None)
        yield url


def test_the_openai_package_works_unchanged_against_the_gateway(experiment: experiments.Experiment, tmp_path: Path) -> None:
    with gateway(experiment, tmp_path / "arm") as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none")
        [model, *_] = client.models.list().data
        asked = {"model": model.id, "messages": [{"role": "user", "content": "say something"}], "max_tokens": 12}
        whole = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
        assert whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12

        stream = client.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert all(chunk.usage is None for chunk in chunks), "usage was not asked for, so the gateway's own question stays its own"

        counted = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
            )
        )
        assert counted[-1].usage is not None
        assert counted[-1].usage.completion_tokens == 12

        text = client.completions.create(model=model.id, prompt="once upon a time", max_tokens=5)
        assert text.choices[0].text

        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=model.id, messages="not a list", stream=False)  # type: ignore[call-overload]


def test_locust_alone_replays_against_any_openai_url(experiment: experiments.Experiment, tmp_path: Path) -> None:
    """``locust -f loadgen/ --host URL --trace FILE`` is all that a user needs."""
    traces.write(experiments.plan(experiment, 0).slice(0, 10), tmp_path / "ten.jsonl")
    command = [sys.executable, "-m", "locust", "-f", "loadgen/", "--headless", "--drain", "30s"]
    with gateway(experiment, tmp_path / "arm") as url:
        done = subprocess.run(
            [*command, "--host", url, "--trace", str(tmp_path / "ten.jsonl"), "--run-dir", str(tmp_path / "run")],
            cwd=Path(loadgen.__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(RunDir.open(tmp_path / "run").outcomes()) == 10
    assert "tidegauge report" in done.stdout + done.stderr

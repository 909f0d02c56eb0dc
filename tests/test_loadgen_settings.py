"""Options, requests, questions and verdict: what a replay is told, and what it says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from loadgen import _requests as requests
from loadgen import _settings as settings
from loadgen._openai import resolve
from loadgen._requests import Questions, RequestWriter, Row, Server
from loadgen._settings import Settings
from loadgen._verdict import COLUMNS, summary, verdict
from replay.errors import InputError
from replay.records import OUTCOME_DTYPE
from replay.slo import Slo
from tests import truth_server


def options(**given: str) -> argparse.Namespace:
    defaults = {destination: default for _, destination, default, _, _ in settings._OPTIONS}
    return argparse.Namespace(**{**defaults, "trace": "azure-code-2023", **given})


def test_every_option_has_a_reading() -> None:
    read = Settings.read(
        options(from_time="1m", to_time="5m", busiest="90s", time_scale="2", rate_scale="0.5", jitter="250ms", seed="7",
                timeout="30s", drain="10", slo="ttft<=2s", bytes_per_token="3.5", run_id="exp/arm-0"),
        "http://h:1",
    )  # fmt: skip
    shaping = read.shaping
    assert (shaping.from_s, shaping.to_s, shaping.busiest_s) == (60, 300, 90)
    assert (shaping.time_scale, shaping.rate_scale, shaping.jitter_s, shaping.seed) == (2, 0.5, 0.25, 7)
    assert (read.timeout_s, read.drain_s, read.slo, read.bytes_per_token) == (30, 10, {"ttft_s": 2.0}, 3.5)
    assert read.run_dir == "runs/exp/arm-0"
    assert Settings.read(options(), "http://h").bytes_per_token is None


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"trace": ""}, "--trace"), ({"endpoint": "chats"}, "--endpoint"), ({"from_time": "soon"}, "--from"),
        ({"time_scale": "fast"}, "--time-scale"), ({"seed": "1.5"}, "--seed"), ({"slo": "ttft>2"}, "--slo"),
        ({"slo": "speed<=2"}, "--slo"), ({"slo": "<=3"}, "--slo"), ({"slo": "ttft<=soon"}, "--slo ttft"),
        ({"drain": "-1"}, "--drain"),
        ({"run_id": "a b\r\nx: y"}, "--run-id"), ({"bytes_per_token": "nan"}, "--bytes-per-token"),
    ],
)  # fmt: skip
def test_bad_options_name_themselves(given: dict[str, str], where: str) -> None:
    with pytest.raises(InputError) as error:
        Settings.read(options(**given), "http://h")
    assert error.value.where == where


def test_a_missing_host_is_said() -> None:
    with pytest.raises(InputError, match="--host"):
        Settings.read(options(), None)


def test_the_slo_is_read_with_either_sign() -> None:
    assert Slo.parse("ttft<=2s, tpot=50ms,e2e <= 1m").terms() == {"ttft_s": 2.0, "tpot_s": 0.05, "e2e_s": 60.0}
    assert Slo.parse("").terms() == {}


def test_the_key_is_not_part_of_what_is_printed_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert settings.api_key(options()) == "sk-secret"
    assert settings.api_key(options(api_key="sk-other")) == "sk-other"
    assert "sk-" not in repr(Settings.read(options(api_key="sk-other"), "http://h"))
    with pytest.raises(InputError) as error:
        settings.api_key(options(api_key="sk-secret\r\nhost: x"))
    assert "sk-secret" not in str(error.value)


TARGET = resolve("http://127.0.0.1:9/base")


def split(request: bytes) -> tuple[bytes, dict[bytes, bytes], Any]:
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines)
    assert int(headers[b"content-length"]) == len(body)
    return first, headers, json.loads(body)


def test_a_request_says_what_the_row_says() -> None:
    server = Server('meta "x"', bytes_per_token=4.0, template_tokens=7)
    writer = RequestWriter(TARGET, "chat", "run-1", server, 512, "sk-k")
    first, headers, body = split(writer.write(Row(0, 5, 107, 33, None, b"s\r\n1", "tenant ü".encode(), 2)))
    assert first == b"POST /base/v1/chat/completions HTTP/1.1"
    assert (headers[b"authorization"], headers[b"host"]) == (b"Bearer sk-k", b"127.0.0.1:9")
    assert (headers[b"x-tidegauge-run"], headers[b"x-tidegauge-request"]) == (b"run-1", b"5")
    assert headers[b"x-tidegauge-output-cap"] == b"512"
    assert (headers[b"x-tidegauge-session"], headers[b"x-tidegauge-tenant"]) == (b"s__1", b"tenant___")
    assert headers[b"x-tidegauge-priority"] == b"2"
    version, trace, span, flag = headers[b"traceparent"].split(b"-")
    assert (version, len(trace), len(span), flag) == (b"00", 32, 16, b"01")
    assert len(body["messages"][0]["content"]) == 100 * 4
    assert (body["model"], body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == ('meta "x"', 33, 33, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def test_a_server_that_refuses_forced_lengths_is_not_asked_for_them() -> None:
    writer = RequestWriter(TARGET, "completions", "r", Server("m", forced=False), 9, "")
    first, headers, body = split(writer.write(Row(0, 1, 3, 4, None, b"", b"", None)))
    assert first.startswith(b"POST /base/v1/completions ")
    assert not {b"authorization", b"x-tidegauge-session", b"x-tidegauge-tenant", b"x-tidegauge-priority"} & set(headers)
    assert len(body["prompt"]) == 12
    assert body["max_tokens"] == 4
    assert "min_tokens" not in body
    assert "ignore_eos" not in body


def test_shared_prefixes_are_shared_text_and_runs_share_none() -> None:
    def prompt(run: str, request: int) -> str:
        writer = RequestWriter(TARGET, "completions", run, Server("m"), 9, "")
        text: str = split(writer.write(Row(0, request, 1100, 4, [11, request], b"", b"", None)))[2]["prompt"]
        return text

    assert prompt("a", 1)[: 512 * 4] == prompt("a", 2)[: 512 * 4]
    assert prompt("a", 1)[: 600 * 4] != prompt("a", 2)[: 600 * 4]
    assert prompt("a", 1)[:100] != prompt("b", 1)[:100]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with truth_server.running() as url:
        yield url


def ask(url: str, script: str, endpoint: str = "chat") -> Questions:
    return Questions(resolve(f"{url}/{script}"), endpoint, "")


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_two_short_answers_tell_the_bytes_of_a_token_and_the_template(url: str, endpoint: str) -> None:
    server = ask(url, "plain", endpoint).calibrate(Server("m"), "salt")
    assert server.bytes_per_token == pytest.approx(truth_server.BYTES_PER_TOKEN, rel=0.01)
    assert server.template_tokens == truth_server.TEMPLATE_TOKENS
    assert server.forced
    assert not server.notes


def test_a_server_that_refuses_forced_lengths_is_found_out(url: str) -> None:
    server = ask(url, "plain,strict=1").calibrate(Server("m"), "salt")
    assert not server.forced
    assert "measured, not forced: Unrecognized request argument" in server.notes[0]
    assert server.bytes_per_token == pytest.approx(4, rel=0.01)


def test_the_only_model_is_asked_for(url: str) -> None:
    assert ask(url, "plain").model() == ("truth-7b", ())


def test_a_server_without_room_is_not_calibrated(url: str) -> None:
    server = ask(url, "plain,status=503").calibrate(Server("m"), "salt")
    assert server.bytes_per_token == requests.ASSUMED_BYTES_PER_TOKEN
    assert "503" in server.notes[0]


def test_a_server_that_refuses_the_key_ends_it(url: str) -> None:
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        ask(url, "plain,status=401").calibrate(Server("m"), "salt")
    with pytest.raises(InputError, match="does not answer"):
        Questions(resolve("http://127.0.0.1:1"), "chat", "").model()


def rows(late_ms: list[float], status: int = 0) -> dict[str, Any]:
    records = np.zeros(len(late_ms), OUTCOME_DTYPE)
    records["status"] = status
    records["sent_at_ns"] = np.array(late_ms) * 1e6
    records["first_token_at_ns"], records["last_token_at_ns"], records["done_at_ns"] = 10**9, 2 * 10**9, 3 * 10**9
    records["output_tokens"], records["first_chunk_tokens"] = 11, 1
    return {name: records[name] for name in COLUMNS}


def worker(**figures: Any) -> dict[str, Any]:
    return {"rows": 100, "cpu_share": 0.1, "prompt_off": 0, "output_off": 0, **figures}


def judged(rows: dict[str, Any], *workers: dict[str, Any], busy: float = 0.2, problems: tuple[str, ...] = ()) -> dict[str, Any]:
    return verdict(rows, workers, planned=100, host_busy_share=busy, problems=problems)


def test_a_punctual_complete_run_is_valid() -> None:
    assert judged(rows([1.0] * 100), worker())["valid"]


def test_lateness_is_absolute() -> None:
    found = judged(rows([6.0] * 100), worker())  # a constant delay is lateness too
    assert found["reasons"] == ["the sender was late: p99 6.0 ms (limit 5 ms)"]
    assert judged(rows([0.1] * 99 + [400.0]), worker())["lateness_max_s"] == pytest.approx(0.4)


def test_a_busy_sender_a_lost_row_and_a_problem_are_named() -> None:
    on_time = rows([1.0] * 100)
    assert "85% of its core" in judged(on_time, worker(cpu_share=0.1), worker(rows=0, cpu_share=0.85))["reasons"][0]
    assert judged(on_time, worker(rows=98))["reasons"] == ["2 of 100 requests left no row"]
    assert judged(on_time, worker(rows=98), problems=("full disk",))["reasons"] == ["full disk"]


def test_a_busy_host_is_marked_not_judged() -> None:
    found = judged(rows([1.0] * 100), worker(), busy=0.9)
    assert found["valid"]
    assert found["host_bound"]


def test_the_summary_says_what_to_type_next() -> None:
    on_time = rows([1.0] * 100)
    text = "\n".join(summary(on_time, judged(on_time, worker(output_off=3)), run_dir="runs/x", seconds=9, notes=["a note"]))
    assert "100 of 100 requests in 9.0 s: 100 ok" in text
    assert "TTFT          1.00 s" in text
    assert "TPOT       100.00 ms" in text
    assert "0 prompts, 3 outputs" in text
    assert "a note" in text
    assert text.endswith("VALID\nrun directory: runs/x\nnext: tidegauge report runs/x")


def test_a_run_without_a_single_answer_is_summed_up_too() -> None:
    none = {name: column[:0] for name, column in rows([1.0]).items()}
    found = judged(none, problems=("stopped",))
    assert "INVALID: stopped" in "\n".join(summary(none, found, run_dir="r", seconds=0, notes=()))

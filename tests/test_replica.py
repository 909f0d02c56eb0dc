"""The stand-in, live: as its Engine says, to the token and nearly to the millisecond."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import time
from collections.abc import Iterator

import httptools
import openai
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from replay.engine import FRONT_END_NS, Engine
from replay.hardware import fleet_spec
from tests.replica_process import FLEET, command, get, replica

# What this machine adds to the modelled instants while other things run on it: the same allowance as for the simulation.
SLACK_TTFT_S, SLACK_TPOT_S = 0.010, 0.0003


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with replica({"max_num_seqs": 8}) as base:
        yield base


def metric(url: str, name: str) -> float:
    """The sum over a metric's samples of that name."""
    families = text_string_to_metric_families(get(url, "/metrics")[1].decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


async def stream(url: str, prompt_tokens: int, output_tokens: int, at_s: float = 0.0) -> list[float]:
    """One streamed completion; the instants (monotonic) of its send and of each token."""
    await asyncio.sleep(max(at_s - time.monotonic(), 0))
    host, port = url.removeprefix("http://").split(":")
    source, sink = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": "abcd" * prompt_tokens, "max_tokens": output_tokens, "ignore_eos": True, "stream": True}).encode()
    sent = time.monotonic()
    sink.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    times = [sent]
    try:
        while data := await source.read(65536):
            times += [time.monotonic()] * data.count(b'"text":')
    finally:
        sink.close()
    return times


def expected(submissions: list[tuple[float, int, int]], **spec: int) -> dict[int, tuple[float, float]]:
    """(first token, last token) of each (seconds, prompt, output), by the pure engine."""
    engine = Engine.of(fleet_spec({**FLEET, **spec}))
    now_ns = 0
    for number, (at_s, prompt, output) in enumerate(submissions):
        now_ns = round(at_s * 1e9) + FRONT_END_NS
        engine.submit(now_ns, number, prompt, output)
    seen: dict[int, dict[str, float]] = {}
    while (due := engine.next_event_ns()) is not None:
        for event in engine.advance(max(due, now_ns)):
            seen.setdefault(event.request_id, {})[event.kind] = event.at_ns / 1e9
    return {number: (kinds["first_token"], kinds["finished"]) for number, kinds in seen.items()}


def test_live_times_are_the_engines(url: str) -> None:
    """Twelve requests on eight places, prompts up to several steps long: queueing, chunked prefill and decode together."""
    plan = [(0.05 * number, 500 + 700 * (number % 5), 40 + 5 * number) for number in range(12)]

    async def live() -> list[list[float]]:
        start = time.monotonic() + 0.1
        return await asyncio.gather(*(stream(url, prompt, output, start + at_s) for at_s, prompt, output in plan))

    measured = asyncio.run(live())
    start = min(times[0] - at_s for times, (at_s, _, _) in zip(measured, plan, strict=True))
    model = expected(
        [(times[0] - start, prompt, output) for times, (_, prompt, output) in zip(measured, plan, strict=True)], max_num_seqs=8
    )
    for number, (times, (_, _, output)) in enumerate(zip(measured, plan, strict=True)):
        first, last = model[number]
        sent, *tokens = times
        assert len(tokens) == output
        ttft, model_ttft = tokens[0] - sent, first - (sent - start)
        assert ttft == pytest.approx(model_ttft, rel=0.03, abs=SLACK_TTFT_S), f"request {number}"
        tpot, model_tpot = (tokens[-1] - tokens[0]) / (output - 1), (last - first) / (output - 1)
        assert tpot == pytest.approx(model_tpot, rel=0.03, abs=SLACK_TPOT_S), f"request {number}"


def test_a_client_that_leaves_frees_its_place(url: str) -> None:
    """Eight long streams fill the batch; a ninth gets its first token only because they hang up."""

    async def story() -> float:
        full = [asyncio.create_task(stream(url, 10, 5000)) for _ in range(8)]
        while (await asyncio.to_thread(metric, url, "vllm:num_requests_running")) < 8:
            await asyncio.sleep(0.01)
        ninth = asyncio.create_task(stream(url, 10, 2))
        while (await asyncio.to_thread(metric, url, "vllm:num_requests_waiting")) < 1:
            await asyncio.sleep(0.01)
        for task in full:
            task.cancel()
        _, first, _ = await asyncio.wait_for(ninth, 5)
        return first

    before = metric(url, "vllm:request_success_total")
    asyncio.run(story())
    while metric(url, "vllm:num_requests_running"):
        pass
    assert metric(url, "vllm:request_success_total") == before + 9
    assert metric(url, "vllm:kv_cache_usage_perc") == 0


def test_openais_client_works_unchanged(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    question = [{"role": "user", "content": "How are you?"}]
    whole = client.chat.completions.create(model="any", messages=question, max_tokens=9, extra_body={"ignore_eos": True})
    assert whole.usage.completion_tokens == 9
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.chat.completions.create(
            model="any", messages=question, max_tokens=9, stream=True, stream_options={"include_usage": True},
            extra_body={"min_tokens": 9}, extra_headers={"x-request-id": "mine"},
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 9)
    assert {chunk.id for chunk in chunks} == {"chatcmpl-mine"}
    phases = chunks[-1].metrics
    assert 5 < phases["time_to_first_token_ms"] < 20
    assert phases["generation_time_ms"] == pytest.approx(8 * phases["mean_itl_ms"], rel=0.01)
    assert client.completions.create(model="any", prompt="one", max_tokens=3).usage.total_tokens <= 4
    assert [card.owned_by for card in client.models.list()] == ["tidegauge-stand-in"]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="any", prompt="one", max_tokens=10**7)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="one")


def test_it_says_what_it_is_and_echoes_the_request_id(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", default_headers={"x-request-id": "abc"})
    raw = client.completions.with_raw_response.create(model="m", prompt="one", max_tokens=1)
    assert raw.headers["x-request-id"] == "abc"
    assert raw.headers["x-tidegauge-stand-in"] == "h100_sxm"
    status, body = get(url, "/health")
    assert status == 200
    assert "h100_sxm" in json.loads(body)["stand_in"]


def test_pipelined_and_abandoned_requests_leave_nothing_behind(url: str) -> None:
    """Three requests in one write are answered in order; a connection that closes in the front end costs no step."""

    async def story() -> bytes:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"prompt":"abcd","max_tokens":2,"ignore_eos":true}'
        request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: %d\r\ncontent-length: %d\r\n\r\n%b"
        source, sink = await asyncio.open_connection(host, int(port))
        sink.write(b"".join(request % (number, len(body), body) for number in range(3)))
        answers = b""
        while answers.count(b'"usage"') < 3:
            answers += await source.read(65536)
        sink.close()
        _, gone = await asyncio.open_connection(host, int(port))
        gone.write(request % (9, len(body), body))
        await gone.drain()
        gone.transport.abort()
        return answers

    ended = metric(url, "vllm:request_success_total")
    answers = asyncio.run(story())
    assert re.findall(rb"x-request-id: (\d)", answers) == [b"0", b"1", b"2"]
    while metric(url, "vllm:num_requests_running"):
        pass
    assert metric(url, "vllm:request_success_total") - ended in (3, 4)


def test_metrics_add_up() -> None:
    with replica() as url:
        asyncio.run(_two(url))
        assert metric(url, "vllm:prompt_tokens_total") == 300
        assert metric(url, "vllm:generation_tokens_total") == 30
        assert metric(url, "vllm:inter_token_latency_seconds_count") == 28
        for name in (
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prompt_tokens",
        ):
            assert metric(url, f"vllm:{name}_count") == 2
        whole, parts = metric(url, "vllm:e2e_request_latency_seconds_sum"), ("queue", "prefill", "decode")
        inside = sum(metric(url, f"vllm:request_{part}_time_seconds_sum") for part in parts)
        assert whole - inside == pytest.approx(2 * FRONT_END_NS / 1e9, abs=1e-6)
        assert metric(url, "tidegauge_stand_in_step_lateness_seconds_count") > 15


async def _two(url: str) -> None:
    await asyncio.gather(stream(url, 100, 10), stream(url, 200, 20))


def test_a_cold_start_takes_the_time_that_was_declared() -> None:
    began = time.monotonic_ns()
    with replica({"cold_start": {"weights": 0.7, "engine_start": 0.8}}, asked_at_ns=began) as url:
        took_s = (time.monotonic_ns() - began) / 1e9
        assert took_s == pytest.approx(1.5, abs=0.15)
        assert json.loads(get(url, "/health")[1])["cold_start"] == {"weights_s": 0.7, "engine_start_s": 0.8}


def test_until_then_it_answers_503_and_says_which_phase() -> None:
    async def story() -> None:
        process = await asyncio.create_subprocess_exec(
            *command({"cold_start": {"weights": 60}}), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{json.loads(await process.stdout.readline())['port']}"
            status, body = await asyncio.to_thread(get, url, "/health")
            health = json.loads(body)
            assert (status, health["phase"]) == (503, "weights")
            assert 50 < health["remaining_s"] <= 60
            with pytest.raises(openai.InternalServerError, match="still starting"):
                await asyncio.to_thread(_complete, url)
        finally:
            process.terminate()
            await process.wait()

    asyncio.run(story())


def _complete(url: str) -> None:
    openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).completions.create(model="m", prompt="one", max_tokens=1)


def test_bad_configuration_ends_with_its_reason() -> None:
    done = subprocess.run(command({"gpu": "abacus"}), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "abacus" in done.stderr
    assert "Traceback" not in done.stderr


def test_answers_are_well_formed_http(url: str) -> None:
    """The chunked body ends where it should: the parser of the clients accepts it to the last byte."""

    class Seen:
        complete = False

        def on_message_complete(self) -> None:
            self.complete = True

    async def story() -> Seen:
        host, port = url.removeprefix("http://").split(":")
        source, sink = await asyncio.open_connection(host, int(port))
        body = b'{"prompt":"abcd","max_tokens":5,"ignore_eos":true,"stream":true}'
        sink.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        seen = Seen()
        parser = httptools.HttpResponseParser(seen)
        while not seen.complete:
            parser.feed_data(await asyncio.wait_for(source.read(65536), 5))
        sink.close()
        return seen

    assert asyncio.run(story()).complete


def test_clients_that_come_and_go_at_random_disturb_nobody(url: str) -> None:
    """Eighty requests on eight places, every other one abandoned somewhere between its first byte and its last token."""
    chance = random.Random(7)

    async def one(number: int) -> None:
        await asyncio.sleep(chance.random())
        output = chance.randint(1, 40)
        task = asyncio.create_task(stream(url, chance.randint(1, 3000), output))
        if number % 2:
            await asyncio.sleep(chance.random() * 0.4)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            _, *tokens = await task
            assert len(tokens) == output

    async def story() -> None:
        await asyncio.gather(*(one(number) for number in range(80)))

    uvloop.run(asyncio.wait_for(story(), 30))
    while metric(url, "vllm:num_requests_running"):
        pass
    assert metric(url, "vllm:num_requests_waiting") == 0
    assert metric(url, "vllm:kv_cache_usage_perc") == 0

"""llama.cpp for real: our model loads, requests are batched, streams and usage are what clients expect, and it ends when told."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from replay.hardware import fleet_spec
from stack import llama
from stack.pool import ProcessPool

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A llama.cpp replica of the pool, in a loop of its own that lives as long as the module."""
    with asyncio.Runner() as runner:
        pool = ProcessPool(fleet_spec({"kind": "llama", "max_num_seqs": 4}), tmp_path_factory.mktemp("run"))
        address = runner.run(pool.start(0))
        base = f"http://{address.host}:{address.port}"
        yield base
        runner.run(pool.close())
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(base, timeout=1)


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def stream(url: str, prompt: str, tokens: int) -> tuple[list[float], openai.types.CompletionUsage, str]:
    """Instants of the chunks with text, usage, and the text."""
    times, usage, text = [], None, ""
    chunks = await client(url).chat.completions.create(
        model="any", messages=[{"role": "user", "content": prompt}], max_tokens=tokens, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.monotonic())
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    assert usage is not None
    return times, usage, text


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:  # noqa: S310 (the replica started above)
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}


def test_the_model_is_the_same_wherever_it_is_written(tmp_path: Path, cache: Path, url: str) -> None:
    llama.write_model(tmp_path / "again.gguf", llama.Shape())
    [written] = (cache / "tidegauge").iterdir()
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (written, tmp_path / "again.gguf")}
    assert len(digests) == 1
    assert written.stat().st_size < 10e6


def test_two_characters_are_a_token_and_the_answer_has_the_length_asked_for(url: str) -> None:
    prompt = "We say {odd} things, 100 times over!"
    times, usage, text = asyncio.run(stream(url, prompt, 50))
    assert usage.prompt_tokens == len(prompt) / 2
    assert usage.completion_tokens == 50
    assert len(times) == 50, "one chunk a token"
    assert set(text) <= llama.SPOKEN
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    assert gaps[len(gaps) // 2] < 0.02, "written at once, not held back for an ACK (40 ms)"


def test_not_streaming_and_by_prompt(url: str) -> None:
    async def story() -> openai.types.Completion:
        return await client(url).completions.create(model="any", prompt="ab" * 300, max_tokens=7, extra_body={"ignore_eos": True})

    answer = asyncio.run(story())
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (300, 7)


def test_requests_are_batched(url: str) -> None:
    """Four at once: each decode step serves several of them, and all run at the same time."""

    async def story() -> list[tuple[list[float], openai.types.CompletionUsage, str]]:
        return await asyncio.gather(*(stream(url, f"{number} " + "word " * 100, 300) for number in range(4)))

    before = metrics(url)
    runs = asyncio.run(story())
    assert max(times[0] for times, _, _ in runs) < min(times[-1] for times, _, _ in runs), "side by side, not one after the other"
    after = metrics(url)
    steps = after["llamacpp:n_decode_total"] - before["llamacpp:n_decode_total"]
    assert steps < 0.6 * 4 * 300
    assert after["llamacpp:tokens_predicted_total"] - before["llamacpp:tokens_predicted_total"] == 4 * 300


def test_more_requests_than_slots_wait_and_are_served(url: str) -> None:
    async def story() -> list[int]:
        runs = await asyncio.gather(*(stream(url, f"number {number}", 20) for number in range(12)))
        return [usage.completion_tokens for _, usage, _ in runs]

    assert asyncio.run(story()) == [20] * 12


def test_a_client_that_leaves_frees_its_slot(url: str) -> None:
    async def story() -> None:
        tasks = [asyncio.create_task(stream(url, f"long {number}", 8000)) for number in range(4)]
        while (await asyncio.to_thread(metrics, url))["llamacpp:requests_processing"] < 4:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.wait_for(stream(url, "next", 5), 5)

    asyncio.run(story())

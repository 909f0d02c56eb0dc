"""The stand-in under many streams: what a token costs it, and how late it wakes for its steps.

The fastest profile there is (a B200's) is the hardest to keep time for. Streams are read by this process, on another core.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from tests.replica_process import command, get

SECONDS = 3.0  # of 900 steps, as many as the KV cache of a B200 holds for 1,024 requests
FLEET = {"gpu": "b200_sxm", "max_num_seqs": 1024, "token_budget": 8192}
LATENESS = "tidegauge_stand_in_step_lateness_seconds"


def figures() -> Iterator[dict[str, Any]]:
    for streams in (256, 1024):
        cpu, tokens_per_s, p50_ms, p99_ms = uvloop.run(_stand_in(streams))
        bare = uvloop.run(_bare(streams, step_s=streams / tokens_per_s))
        name, us, bare_us = f"stand-in, {streams} streams", cpu / tokens_per_s * 1e6, bare / tokens_per_s * 1e6
        yield _figure(f"{name}: tokens/s", tokens_per_s, "tokens/s", "the profile")
        yield _figure(f"{name}: of a core", cpu, "core", f"a bare uvloop writer: {bare:.2f}")
        against = f"a bare uvloop writer: {bare_us:.1f}"
        yield _figure(
            f"{name}: CPU per token", us, "us", against, ratio=us / bare_us, target="ratio <= 1.5", ok=us <= 1.5 * bare_us
        )
        yield _figure(f"{name}: step lateness p50", p50_ms, "ms", "the engine's instants")
        yield _figure(f"{name}: step lateness p99", p99_ms, "ms", "the engine's instants", target="<= 2", ok=p99_ms <= 2)


class _Drain(asyncio.Protocol):
    """Sends one request and throws its answer away."""

    BODY = json.dumps({"prompt": "abcd" * 16, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(self.BODY)
        transport.write(head + self.BODY)


async def _stand_in(streams: int) -> tuple[float, float, float, float]:
    """Share of a core, tokens/s, lateness p50 and p99 in ms, with all streams decoding."""
    with _process(command(FLEET)) as (server, line):
        port = json.loads(line)["port"]
        url = f"http://127.0.0.1:{port}"
        while (await asyncio.to_thread(get, url, "/health"))[0] != 200:
            await asyncio.sleep(0.05)
        await _connect(streams, port)
        while (await asyncio.to_thread(_samples, url))["vllm:num_requests_running", ""] < streams:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)  # the last prefill is over
        before, began = await asyncio.to_thread(_samples, url), time.monotonic()
        cpu = await _cpu(server)
        after, took = await asyncio.to_thread(_samples, url), time.monotonic() - began
        tokens = after["vllm:generation_tokens_total", ""] - before["vllm:generation_tokens_total", ""]
        buckets = [(float(le), after[name, le] - before[name, le]) for name, le in after if name == f"{LATENESS}_bucket"]
        return cpu, tokens / took, 1e3 * _quantile(buckets, 0.5), 1e3 * _quantile(buckets, 0.99)


async def _bare(streams: int, step_s: float) -> float:
    """The share of a core that writing alone takes: as many chunks as often, made once and the same for all."""
    with _process([sys.executable, "-m", "tests.benchmarks._bare_writer", str(step_s)]) as (server, line):
        await _connect(streams, int(line))
        await asyncio.sleep(0.5)
        return await _cpu(server)


@contextlib.contextmanager
def _process(arguments: list[str]) -> Iterator[tuple[psutil.Process, bytes]]:
    """A server and the line it prints when it listens."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield psutil.Process(process.pid), process.stdout.readline()
    finally:
        process.kill()
        process.wait()


async def _connect(streams: int, port: int) -> None:
    for _ in range(streams):
        await asyncio.get_running_loop().create_connection(_Drain, "127.0.0.1", port)


async def _cpu(server: psutil.Process) -> float:
    used, began = sum(server.cpu_times()[:2]), time.monotonic()
    await asyncio.sleep(SECONDS)
    return (sum(server.cpu_times()[:2]) - used) / (time.monotonic() - began)


def _samples(url: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(get(url, "/metrics")[1].decode())
    return {(sample.name, sample.labels.get("le", "")): sample.value for family in families for sample in family.samples}


def _quantile(buckets: list[tuple[float, float]], share: float) -> float:
    """As Prometheus does it: linear inside the bucket."""
    wanted, below, bound = share * buckets[-1][1], 0.0, 0.0
    for upper, count in buckets:
        if count >= wanted:
            return bound + (upper - bound) * (wanted - below) / (count - below)
        below, bound = count, upper
    raise AssertionError("the last bucket holds all")


def _figure(
    name: str,
    value: float,
    unit: str,
    against: str,
    *,
    ratio: float | None = None,
    target: str | None = None,
    ok: bool | None = None,
) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio, "target": target, "ok": ok}

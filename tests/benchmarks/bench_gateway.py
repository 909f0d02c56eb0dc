"""What the gateway adds: latency at 100 requests/s, and the SSE events/s it holds, with policy, records, metrics and sampled traces
switched on; beside a bare pass-through of ours, Debian's nginx where it is installed, and no proxy at all.

All of it in one run, in turns, so that the machine's mood is shared; a proxy has a core of its own where there are two.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop

RATE_PER_S, LATENCY_S, ROUNDS = 100, 3.0, 3
STREAM_EVENTS_PER_S = 100  # of one stream: a token every 10 ms
STEP_S, SETTLE_S = 1.5, 0.5
DELAY_P99_MS, DELIVERED = 25.0, 0.97  # "held": no more than this behind, no less than this delivered
FIRST_RATE, STEP, TRIES = 10_000, 1.25, 3  # the best of three tries: a neighbour's burst is not the proxy's limit
COST_RATE = 20_000
STAMP = re.compile(rb'"at":(\d{19})')

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream replica {{ server 127.0.0.1:{upstream}; keepalive 1024; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096; keepalive_requests 1000000;
    location / {{ proxy_pass http://replica; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""


def figures() -> Iterator[dict[str, Any]]:
    with ExitStack() as running:
        upstream = running.enter_context(_source())
        proxies = {"pass-through": running.enter_context(_passthrough(upstream))}
        if shutil.which("nginx"):
            proxies["nginx"] = running.enter_context(_nginx(upstream))
        proxies["gateway"] = running.enter_context(_gateway(upstream))
        targets = {"direct": upstream, **{name: proxy.port for name, proxy in proxies.items()}}
        latency = uvloop.run(_latencies(targets))
        costs = {name: _cpu_us(proxy) for name, proxy in proxies.items()}
        held = {name: uvloop.run(_held(port)) for name, port in targets.items()}
    yield from _latency_figures(latency)
    for name, cost in costs.items():
        yield _figure(
            f"CPU per SSE event at {COST_RATE}/s, {name}", cost, "us", "pass-through",
            cost / costs["pass-through"] if name != "pass-through" else None, None, None,
        )  # fmt: skip
    for name, (rate, cause) in held.items():
        ratio = rate / held["pass-through"][0] if held["pass-through"][0] else None
        is_ours = name == "gateway"
        yield _figure(
            f"SSE events/s held, {name}", float(rate), "events/s", cause if name == "direct" else f"pass-through; {cause}",
            None if name in ("direct", "pass-through") else ratio, "at least 0.6 of the pass-through" if is_ours else None,
            ratio is not None and ratio >= 0.6 if is_ours else None,
        )  # fmt: skip


def _latency_figures(latency: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    floor = {q: _quantile(latency["direct"], q) for q in (0.5, 0.99)}
    bare = {q: _quantile(latency["pass-through"], q) - floor[q] for q in floor}
    for name, values in latency.items():
        for q, word in ((0.5, "p50"), (0.99, "p99")):
            found = _quantile(values, q)
            if name == "direct":
                yield _figure(f"latency {word} at {RATE_PER_S}/s, direct", found, "ms", "the floor", None, None, None)
                continue
            target = name == "gateway" and q == 0.5
            added = found - floor[q]
            yield _figure(
                f"added latency {word} at {RATE_PER_S}/s, {name}", added, "ms", f"direct; pass-through adds {bare[q]:.3f}",
                added / bare[q] if name != "pass-through" and bare[q] > 0 else None,
                "at most 0.5 ms" if target else None, added <= 0.5 if target else None,
            )  # fmt: skip


def _figure(
    name: str, value: float, unit: str, against: str, ratio: float | None, target: str | None, ok: bool | None
) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio, "target": target, "ok": ok}


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(q * len(values)) - 1)]


# --- what is measured


class _Proxy(NamedTuple):
    port: int
    process: psutil.Process


def _cpu_us(proxy: _Proxy) -> float:
    """CPU of the proxy's own process for each event, in us: what a busy machine changes least."""
    before = proxy.process.cpu_times()
    delivered, _ = uvloop.run(_offer(proxy.port, COST_RATE))
    after = proxy.process.cpu_times()
    spent_s = after.user + after.system - before.user - before.system
    return spent_s * 1e6 / (COST_RATE * delivered * (SETTLE_S + STEP_S))


@contextmanager
def _process(command: list[str], own_core: bool) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if own_core and (os.cpu_count() or 1) > 1:
            psutil.Process(process.pid).cpu_affinity([1])
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextmanager
def _source() -> Iterator[int]:
    with _process([sys.executable, "-m", "tests.benchmarks._event_source"], own_core=False) as process:
        yield _first_line(process, int)


@contextmanager
def _passthrough(upstream: int) -> Iterator[_Proxy]:
    with _process([sys.executable, "-m", "tests.benchmarks._passthrough", str(upstream)], own_core=True) as process:
        yield _Proxy(_first_line(process, int), psutil.Process(process.pid))


def _first_line(process: subprocess.Popen[bytes], read: Callable[[bytes], Any]) -> Any:
    assert process.stdout is not None
    return read(process.stdout.readline())


@contextmanager
def _nginx(upstream: int) -> Iterator[_Proxy]:
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        config = Path(folder) / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, upstream=upstream, port=port))
        with _process(["nginx", "-p", folder, "-c", str(config)], own_core=True) as process:
            _wait_until_listening(port)
            yield _Proxy(port, psutil.Process(process.pid))


@contextmanager
def _gateway(upstream: int) -> Iterator[_Proxy]:
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "run_dir": f"{folder}/run",
            "policy": {
                "name": "bench", "balancer": "least_outstanding", "queue": {"kind": "fifo", "length_max": 1000, "timeout_s": 60},
                "limiter": {"kind": "token_bucket", "requests_per_min": 1e9, "tokens_per_min": 1e12},
                "autoscaler": {"kind": "concurrency", "target": 1e6}, "slots_per_replica": 100_000,
            },
            "fleet": {"kind": "urls", "urls": [f"http://127.0.0.1:{upstream}"], "usd_per_gpu_hour": 1.0},
        }  # fmt: skip
        path = Path(folder) / "gateway.json"
        path.write_text(json.dumps(config))
        with _process([sys.executable, "-m", "stack.gateway", "--config", str(path)], own_core=False) as process:
            port = _first_line(process, json.loads)["port"]
            if (os.cpu_count() or 1) > 1:  # the gateway alone: its recorder is elsewhere, as in life
                psutil.Process(process.pid).cpu_affinity([1])
            time.sleep(3)  # the recorder's imports are not what is measured
            yield _Proxy(port, psutil.Process(process.pid))


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_listening(port: int) -> None:
    import socket

    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


# --- the client


def _request(events: int, interval_us: int) -> bytes:
    body = json.dumps(
        {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "bench": [events, interval_us],
         "messages": [{"role": "user", "content": "word " * 200}]}
    ).encode()  # fmt: skip
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class _Probe(asyncio.Protocol):
    """One kept connection: sends a request, tells when its answer is complete, counts events and samples their delay."""

    def __init__(self) -> None:
        self.events = 0
        self.delays_ms: list[float] = []
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        count = data.count(b'"at":')
        if count:
            self.events += count
            if self.events % 16 < count:
                found = STAMP.search(data)
                if found:
                    self.delays_ms.append((time.monotonic_ns() - int(found[1])) / 1e6)
        if data.endswith(b"0\r\n\r\n") and self.done is not None and not self.done.done():
            self.done.set_result(None)


async def _connect(port: int) -> _Probe:
    _, probe = await asyncio.get_running_loop().create_connection(_Probe, "127.0.0.1", port)
    return probe


async def _latencies(targets: dict[str, int]) -> dict[str, list[float]]:
    """ms from the send to the end of a one-event answer, per target; the targets take turns."""
    found: dict[str, list[float]] = {name: [] for name in targets}
    request = _request(1, 0)
    for round_number in range(ROUNDS + 1):
        for name, port in targets.items():
            idle = [await _connect(port) for _ in range(8)]
            values = await _paced(idle, request)
            if round_number:  # the first round opens connections
                found[name] += values
            for probe in idle:
                probe.transport.close()
    return found


async def _paced(idle: list[_Probe], request: bytes) -> list[float]:
    loop, values, running = asyncio.get_running_loop(), [], []

    async def one(probe: _Probe) -> None:
        probe.done = loop.create_future()
        began = time.perf_counter()
        probe.transport.write(request)
        await probe.done
        values.append((time.perf_counter() - began) * 1000)
        idle.append(probe)

    start = loop.time()
    for number in range(int(RATE_PER_S * LATENCY_S)):
        await asyncio.sleep(max(0.0, start + number / RATE_PER_S - loop.time()))
        running.append(loop.create_task(one(idle.pop(0))))
    await asyncio.gather(*running)
    return values


async def _held(port: int) -> tuple[int, str]:
    """The highest rate of events that is held, and what was wrong at the next one."""
    rate, held = FIRST_RATE, 0
    while True:
        for _ in range(TRIES):
            delivered, p99 = await _offer(port, rate)
            if delivered >= DELIVERED and p99 <= DELAY_P99_MS:
                break
        else:
            return held, f"at {rate}/s {delivered:.0%} delivered, delay p99 {p99:.1f} ms"
        held, rate = rate, int(rate * STEP)


async def _offer(port: int, rate: int) -> tuple[float, float]:
    """(share delivered, p99 of the events' delay in ms) at ``rate`` events/s over many even streams."""
    streams = rate // STREAM_EVENTS_PER_S
    request = _request(int((STEP_S + 2 * SETTLE_S) * STREAM_EVENTS_PER_S) + 100, 1_000_000 // STREAM_EVENTS_PER_S)
    probes = [await _connect(port) for _ in range(streams)]
    for probe in probes:
        probe.transport.write(request)
    await asyncio.sleep(SETTLE_S)
    for probe in probes:
        probe.events, probe.delays_ms = 0, []
    began = time.perf_counter()
    await asyncio.sleep(STEP_S)
    took = time.perf_counter() - began
    events, delays = sum(probe.events for probe in probes), [delay for probe in probes for delay in probe.delays_ms]
    for probe in probes:
        probe.transport.abort()
    await asyncio.sleep(SETTLE_S)  # the proxies close their side
    return events / (streams * STREAM_EVENTS_PER_S * took), _quantile(delays, 0.99) if delays else math.inf

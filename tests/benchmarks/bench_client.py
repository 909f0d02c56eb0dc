"""The load generator's client on one core, against bare clients on the same server: what recording everything costs.

Ours is the replay's own path: a request's text is made, sent, read, concluded, spooled and shown in Locust's table, each time. The
bare gevent client does none of that; the bare uvloop client is printed beside. The recorder is another process, on another core.
In turns, in one run; a ratio is the median over the rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROUNDS, STREAMS = 5, 64
SHORT_TOKENS, SHORT_REQUESTS = 16, 8000
LONG_TOKENS, LONG_REQUESTS = 2000, 400
RATE_PER_S, PACED_S, PACED_TOKENS, PACED_ROUNDS = 200, 4.0, 100, 3


def figures() -> Iterator[dict[str, Any]]:
    """From a process of its own: Locust patches the standard library where it is imported."""
    with subprocess.Popen([sys.executable, "-m", "tests.benchmarks.bench_client"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the benchmark's process ended with {process.returncode}")


def figure(name: str, value: float, unit: str, against: str = "", ratio: float | None = None, **held: Any) -> None:
    known = {"name": name, "value": value, "unit": unit, "against": against or None, "ratio": ratio, "target": None, "ok": None}
    print(json.dumps({**known, **held}), flush=True)


def measure() -> None:
    import locust.env  # patches the standard library, so first  # noqa: F401

    from tests import truth_server

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pinned = ("--cpu", str(cores[1])) if len(cores) > 1 else ()
    with tempfile.TemporaryDirectory() as folder, truth_server.running(*pinned) as url:
        if pinned:
            os.sched_setaffinity(0, cores[:1])
        ours = Ours(url, Path(folder))
        throughput(url, ours)
        accuracy(url, ours)


class Ours:
    """The replay's own path over a closed loop (for throughput) and on a schedule (for accuracy)."""

    def __init__(self, url: str, folder: Path) -> None:
        from locust import User
        from locust.env import Environment

        class Nobody(User):
            pass

        self.url, self.folder, self.runs = url, folder, 0
        self.environment = Environment(user_classes=[Nobody])
        self.environment.create_local_runner()

    def parts(self, script: str) -> tuple[Any, Any, Any, Callable[[Any], None]]:
        from loadgen._openai import resolve
        from loadgen._outcomes import Spool
        from loadgen._requests import RequestWriter, Server
        from loadgen._webui import table

        self.runs += 1
        target = resolve(f"{self.url}/{script}")
        writer = RequestWriter(target, "chat", f"bench-{self.runs}", Server("m"), 9, "")
        return target, writer, Spool(self.folder / f"{self.runs}.outcomes"), table(self.environment, "/v1/chat/completions")

    def flood(self, script: str, tokens: int, requests: int) -> tuple[float, int]:
        """(seconds, chunks) of ``requests`` answers over STREAMS connections, every part of the replay's path included."""
        import gevent

        from loadgen._openai import Client
        from loadgen._outcomes import Clock, conclude
        from loadgen._requests import Row
        from loadgen._schedule import TEND_EVERY_S, Tally
        from loadgen._sse import Stream

        target, writer, spool, show = self.parts(script)
        tally, clock, over = Tally(), Clock(time.monotonic_ns(), time.time_ns()), gevent.event.Event()
        numbers, chunks = iter(range(requests)), 0

        def send() -> None:
            if (number := next(numbers, None)) is not None:
                row = Row(number, number, 20, tokens, None, b"", b"", None)
                stream = Stream(number, writer.write(row), time.monotonic_ns())
                stream.row = row
                client.send(stream)
            elif not client.inside:
                over.set()

        def done(stream: Stream) -> None:
            nonlocal chunks
            chunks += stream.chunks
            ended = conclude(stream, clock, model=b"m")
            assert ended.status == 0, ended.detail
            spool.append(ended.row)
            tally.add(ended, 20, tokens)
            show(ended)
            send()

        def flush() -> None:
            while True:
                gevent.sleep(TEND_EVERY_S)
                spool.flush()

        client = Client(target, done)
        client.prepare(STREAMS)
        gevent.sleep(0.2)
        flushing = gevent.spawn(flush)
        started = time.perf_counter()
        for _ in range(STREAMS):
            send()
        over.wait()
        seconds = time.perf_counter() - started
        flushing.kill()
        client.close()
        spool.close()
        return seconds, chunks

    def paced(self, script: str, due_s: list[float], tokens: int) -> Any:
        """Records of a replay of this schedule."""
        import pyarrow as pa

        from loadgen._outcomes import Clock
        from loadgen._schedule import Sender
        from replay.records import OUTCOME_DTYPE
        from replay.runs import read_spool
        from replay.traces import SCHEMA

        target, writer, spool, show = self.parts(script)
        count = len(due_s)
        given = {
            "request_id": range(count), "arrival_at_ns": [int(s * 1e9) for s in due_s], "prompt_tokens": [20] * count,
            "output_tokens": [tokens] * count,
        }  # fmt: skip
        plan = pa.table({field.name: pa.array(given.get(field.name, [None] * count), field.type) for field in SCHEMA})
        self.started_ns = time.monotonic_ns() + 1_000_000_000
        sender = Sender(plan, target, writer, spool, model="m", timeout_s=60, on_ended=show)
        sender.run(Clock(self.started_ns, time.time_ns() + 1_000_000_000), drain_s=20)
        return read_spool(spool.path, OUTCOME_DTYPE)


def bare_request(script: str, tokens: int, number: str = "") -> bytes:
    content = json.dumps({"stream": True, "max_tokens": tokens, "messages": [{"role": "user", "content": "hello " * 13}]}).encode()
    head = f"POST /{script}/v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-tidegauge-request: bare-{number}\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%b" % (len(content), content)


def throughput(url: str, ours: Ours) -> None:
    from tests.benchmarks import _raw_gevent

    port = int(url.rpartition(":")[2])
    for name, tokens, requests, unit, wanted, floor in (
        ("client, 16 tokens", SHORT_TOKENS, SHORT_REQUESTS, "requests/s", 0.4, 12_000),
        ("client, flood", LONG_TOKENS, LONG_REQUESTS, "chunks/s", 0.6, 0),
    ):
        script = f"flood,batch=16,tokens={tokens}"
        request = bare_request(script, tokens)
        rates: dict[str, list[float]] = {"ours": [], "bare": [], "uvloop": []}
        for _ in range(ROUNDS):
            seconds_and_chunks = {
                "bare": _raw_gevent.flood(port, request, STREAMS, requests),
                "ours": ours.flood(script, tokens, requests),
                "uvloop": _uvloop(port, request, requests),
            }
            for side, (seconds, chunks) in seconds_and_chunks.items():
                rates[side].append((requests if unit == "requests/s" else chunks) / seconds)
        ratio = statistics.median(mine / bare for mine, bare in zip(rates["ours"], rates["bare"], strict=True))
        value = {side: statistics.median(found) for side, found in rates.items()}
        target = f"at least {wanted} of bare" + (f", {floor} requests/s" if floor else "")
        figure(
            name, value["ours"], unit, f"bare gevent {value['bare']:.0f}, bare uvloop {value['uvloop']:.0f}", ratio,
            target=target, ok=ratio >= wanted and value["ours"] >= floor,
        )  # fmt: skip


def _uvloop(port: int, request: bytes, requests: int) -> tuple[float, int]:
    command = [sys.executable, "-m", "tests.benchmarks._bare_uvloop", str(port), str(STREAMS), str(requests)]
    seconds, chunks = json.loads(subprocess.run(command, input=request, stdout=subprocess.PIPE, check=True).stdout)
    return seconds, chunks


def accuracy(url: str, ours: Ours) -> None:
    """|instant of the first token - the server's stamp of it|, at 200 requests/s of 100 tokens, and how late we sent."""
    import random

    import numpy as np

    from tests import truth_server
    from tests.benchmarks import _raw_gevent

    draw = random.Random(1)
    due_s, at = [], 0.0
    while (at := at + draw.expovariate(RATE_PER_S)) < PACED_S:
        due_s.append(at)
    script = f"plain,ttft=50,gap=10,tokens={PACED_TOKENS}"

    port = int(url.rpartition(":")[2])
    found: dict[str, list[Any]] = {"ours": [], "bare": [], "late": [], "bare late": []}
    for turn in range(PACED_ROUNDS):
        requests = [bare_request(script, PACED_TOKENS, f"{turn}-{number}") for number in range(len(due_s))]
        start = time.monotonic_ns() + 1_000_000_000
        stamps = _raw_gevent.paced(port, requests, [start + int(s * 1e9) for s in due_s])
        truth = truth_server.stamps_at(url)
        found["bare"].append([abs(first - truth[f"bare-{turn}-{n}"]["first_token"]) / 1e6 for n, (_, first) in enumerate(stamps)])
        found["bare late"].append([(sent - start) / 1e6 - s * 1e3 for (sent, _), s in zip(stamps, due_s, strict=True)])
        records = ours.paced(script, due_s, PACED_TOKENS)
        truth = truth_server.stamps_at(url)
        firsts = {str(row["request_id"]): int(row["first_token_at_ns"]) + ours.started_ns for row in records}
        assert len(firsts) == len(due_s)
        found["ours"].append([abs(first - truth[request]["first_token"]) / 1e6 for request, first in firsts.items()])
        found["late"].append((records["sent_at_ns"] - records["scheduled_at_ns"]) / 1e6)

    def quantiles(side: str, share: float) -> Any:
        return np.array([np.quantile(values, share) for values in found[side]])

    above = float(np.median(quantiles("ours", 0.99) - quantiles("bare", 0.99)))
    p50, p99, bare50, bare99 = (float(np.median(quantiles(side, q))) for side in ("ours", "bare") for q in (0.5, 0.99))
    note = f"bare gevent p50 {bare50:.3f}, p99 {bare99:.3f}"
    figure("TTFT error p50, 200 req/s", p50, "ms", note, target="at most 0.5 ms", ok=p50 <= 0.5)
    figure("TTFT error p99, 200 req/s", p99, "ms", note, target="at most 1 ms above bare", ok=above <= 1)
    note = "bare gevent p50 {:.2f}, p99 {:.2f}".format(*(np.median(quantiles("bare late", share)) for share in (0.5, 0.99)))
    for label, share in (("p50", 0.5), ("p99", 0.99)):
        figure(f"send lateness {label}, 200 req/s", float(np.median(quantiles("late", share))), "ms", note)


if __name__ == "__main__":
    measure()

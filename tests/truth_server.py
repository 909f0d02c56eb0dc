"""A streaming server that knows the truth: scripted streams, and a stamp of what it sent when.

A process of its own (``python tests/truth_server.py``): it prints one JSON line {"port": N} and serves until SIGTERM. The
clock is CLOCK_MONOTONIC, one for all processes of a machine, so a client's stamps can be held against the server's.

    /<script>/v1/chat/completions    stream by a script, e.g. ``/reasoning,ttft=80,gap=5/v1/chat/completions`` (ms)
    /v1/chat/completions             the script ``plain``
    /truth                           {"<x-tidegauge-request>": {"received": ns, "first_token": ns, "last_token": ns, "done": ns,
                                     "body": {...}, "headers": {...}}}
    Options of every script: status=429[,retry=2] refuses, strict=1 answers 400 to forced lengths, unary=1 ignores "stream".

Tokens are counted as: 7 for the chat template, and one for each 4 bytes of the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httptools
import uvloop

TEMPLATE_TOKENS, BYTES_PER_TOKEN = 7, 4


class Step(NamedTuple):
    """Send ``data`` (one TCP write, one HTTP chunk) ``at_ms`` after the request had arrived; None closes the connection."""

    at_ms: float
    data: bytes | None
    mark: str = ""


@dataclass
class Ask:
    """A request and the options of its script."""

    body: dict[str, Any]
    options: dict[str, str]

    def number(self, name: str, default: float) -> float:
        return float(self.options.get(name, default))

    @property
    def tokens(self) -> int:
        return int(self.number("tokens", self.body.get("max_tokens", 16)))

    @property
    def usage(self) -> dict[str, int]:
        prompt = self.body.get("prompt") or "".join(m["content"] for m in self.body.get("messages", ()))
        count = TEMPLATE_TOKENS + -(-len(prompt) // BYTES_PER_TOKEN)
        return {"prompt_tokens": count, "completion_tokens": self.tokens, "total_tokens": count + self.tokens}


def event(payload: dict[str, Any], end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + end


def delta(field_name: str = "content", value: Any = " tok", **beside: Any) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {field_name: value}}], **beside}


def tail(ask: Ask, at_ms: float, end: bytes = b"\n\n", extra: bytes = b"") -> Iterator[Step]:
    """The usage chunk with its empty choices, then [DONE]; each a write of its own."""
    yield Step(at_ms, event({"id": "c", "choices": [], "usage": ask.usage}, end))
    yield Step(at_ms, extra + b"data: [DONE]" + end, "done")


def tokens(ask: Ask, make: Callable[[int], bytes], start: int = 0) -> Iterator[Step]:
    """One write a token from ``ttft`` on, every ``gap`` ms; the first and the last carry their marks."""
    ttft, gap, last = ask.number("ttft", 30), ask.number("gap", 5), ask.tokens - 1
    for index in range(start, ask.tokens):
        mark = " ".join(["first_token"] * (index == 0) + ["last_token"] * (index == last))
        yield Step(ttft + gap * index, make(index), mark)


def end_ms(ask: Ask) -> float:
    return ask.number("ttft", 30) + ask.number("gap", 5) * (ask.tokens - 1) + ask.number("tail", 0)


def plain(ask: Ask) -> Iterator[Step]:
    yield from tokens(ask, lambda _: event(delta()))
    yield from tail(ask, end_ms(ask))


def text(ask: Ask) -> Iterator[Step]:
    yield from tokens(ask, lambda _: event({"object": "text_completion", "choices": [{"index": 0, "text": " tok"}]}))
    yield from tail(ask, end_ms(ask))


def role(ask: Ask) -> Iterator[Step]:
    """An empty role delta long before the first token (vLLM, llama.cpp)."""
    yield Step(1, event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    yield from plain(ask)


def reasoning(ask: Ask) -> Iterator[Step]:
    half = ask.tokens // 2
    key = ask.options.get("key", "reasoning_content")
    yield from tokens(ask, lambda i: event(delta(key) if i < half else delta()))
    yield from tail(ask, end_ms(ask))


def tools(ask: Ask) -> Iterator[Step]:
    call = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": ""}}
    yield Step(1, event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None, "tool_calls": []}}]}))
    yield from tokens(ask, lambda _: event(delta("tool_calls", [call])))
    yield from tail(ask, end_ms(ask))


def several(ask: Ask) -> Iterator[Step]:
    """``per`` tokens in a chunk; ``continuous=1`` adds the usage so far to each, as vLLM does on request."""
    per, ttft, gap = int(ask.number("per", 4)), ask.number("ttft", 30), ask.number("gap", 5)
    counts = range(per, ask.tokens + 1, per)
    for turn, count in enumerate(counts):
        beside = {"usage": {**ask.usage, "completion_tokens": count}} if ask.number("continuous", 0) else {}
        mark = " ".join(["first_token"] * (turn == 0) + ["last_token"] * (turn == len(counts) - 1))
        yield Step(ttft + gap * turn, event(delta(value=" tok" * per, **beside)), mark)
    yield from tail(ask, ttft + gap * (len(counts) - 1))


def ping(ask: Ask) -> Iterator[Step]:
    """Comment lines between the events; some servers send them to keep proxies awake."""
    yield Step(1, b": ping\n\n")
    for step in plain(ask):
        yield step
        if step.mark != "done":
            yield Step(step.at_ms, b": ping - 2026-11-23\n\n")


def crlf(ask: Ask) -> Iterator[Step]:
    yield from tokens(ask, lambda _: event(delta(), b"\r\n\r\n"))
    yield from tail(ask, end_ms(ask), b"\r\n\r\n")


def split(ask: Ask) -> Iterator[Step]:
    """Every event in two TCP writes, cut ``at`` bytes from its start, the second 3 ms after the first."""
    cut = int(ask.number("at", 70))
    for step in plain(ask):
        assert step.data
        place = min(cut, len(step.data) - 1)
        yield Step(step.at_ms, step.data[:place])
        yield Step(step.at_ms + 3, step.data[place:], step.mark)


def loose(ask: Ask) -> Iterator[Step]:
    """No space after ``data:``, spaces inside the JSON, ``usage: null`` in every chunk, content that quotes the protocol."""
    nasty = 'data: [DONE] "content":"" "error":{ \n\ndata: {"usage":{"completion_tokens":9}}'
    yield from tokens(ask, lambda _: b"data:" + json.dumps(delta(value=nasty, usage=None, error=None)).encode() + b"\n\n")
    yield Step(end_ms(ask), b"data:" + json.dumps({"choices": [], "usage": ask.usage}, indent=None).encode() + b"\n\n")
    yield Step(end_ms(ask), b"data:[DONE]\n\n", "done")


def error(ask: Ask) -> Iterator[Step]:
    yield from list(tokens(ask, lambda _: event(delta())))[:3]
    yield Step(end_ms(ask), event({"error": {"message": "engine died", "type": "server_error", "code": 500}}))
    yield Step(end_ms(ask), b"data: [DONE]\n\n", "done")


def nodone(ask: Ask) -> Iterator[Step]:
    yield from tokens(ask, lambda _: event(delta()))


def cut(ask: Ask) -> Iterator[Step]:
    yield from list(tokens(ask, lambda _: event(delta())))[:3]
    yield Step(end_ms(ask), None, "done")


def reported(ask: Ask) -> Iterator[Step]:
    """As our gateway ends a stream: the phase comment before [DONE]; 2 ms each of queue and route, 10 of network."""
    yield from tokens(ask, lambda _: event(delta()))
    ttft, total = ask.number("ttft", 30), end_ms(ask) - 10
    phases = [0, 2, -1, 2, ttft - 4, total - ttft, -1]  # limit, queue, cold_start, route, prefill, decode, retry (ms)
    numbers = [time.time_ns(), int(total * 1e6), *(int(p * 1e6) if p >= 0 else -1 for p in phases), 3, 1, 1]
    yield from tail(ask, end_ms(ask), extra=b": tidegauge " + b" ".join(b"%d" % n for n in numbers) + b"\n\n")


def unclosed(ask: Ask) -> Iterator[Step]:
    """[DONE], but the HTTP message never ends."""
    yield from plain(ask)
    yield Step(3_600_000, b"")


def hang(ask: Ask) -> Iterator[Step]:
    yield Step(3_600_000, b"")


SCRIPTS: dict[str, Callable[[Ask], Iterator[Step]]] = {
    f.__name__: f for f in (plain, text, role, reasoning, tools, several, ping, crlf, split, loose, error, nodone, cut,
                            reported, unclosed, hang)
}  # fmt: skip


@dataclass
class Truth:
    """What was sent when, by request number; and the bytes of floods, made once."""

    stamps: dict[str, dict[str, Any]] = field(default_factory=dict)
    flood_bytes: dict[tuple[str, int, int], bytes] = field(default_factory=dict)


class Server(asyncio.Protocol):
    def __init__(self, truth: Truth) -> None:
        self.truth, self.loop = truth, asyncio.get_running_loop()
        self.parser = httptools.HttpRequestParser(self)
        self.pending: asyncio.TimerHandle | None = None
        self.may_write = True
        self.waiting: Iterator[bytes] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.pending:
            self.pending.cancel()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def pause_writing(self) -> None:
        self.may_write = False

    def resume_writing(self) -> None:
        self.may_write = True
        if self.waiting:
            self._pump(self.waiting)

    def on_message_begin(self) -> None:
        self.url, self.body, self.headers = b"", b"", {}

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        path = self.url.decode()
        if path == "/truth":
            return self._answer(200, self.truth.stamps)
        if path.endswith("/v1/models"):
            return self._answer(200, {"object": "list", "data": [{"id": "truth-7b", "object": "model"}]})
        name, _, options = path.lstrip("/").partition("/")[0].partition(",")
        ask = Ask(json.loads(self.body), dict(o.split("=") for o in options.split(",") if o))
        if "status" in ask.options:
            return self._refuse(int(ask.number("status", 500)), ask)
        if "strict" in ask.options and ("min_tokens" in ask.body or "ignore_eos" in ask.body):
            return self._answer(400, {"error": {"message": "Unrecognized request argument supplied: min_tokens"}})
        if not ask.body.get("stream") or "unary" in ask.options:
            return self._answer(200, {"choices": [{"message": {"content": "x"}, "text": "x"}], "usage": ask.usage})
        if name == "flood":
            return self._flood(ask)
        return self._play(SCRIPTS[name if name != "v1" else "plain"](ask), ask)

    def _refuse(self, status: int, ask: Ask) -> None:
        headers = "server-timing: gateway;dur=0.02, queue;dur=0.05\r\n"
        if "retry" in ask.options:
            headers += f"retry-after: {ask.options['retry']}\r\n"
        self._answer(status, {"error": {"message": "refused by script", "type": "x"}}, headers)

    def _answer(self, status: int, payload: Any, headers: str = "") -> None:
        body = json.dumps(payload).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)

    def _head(self) -> bytes:
        return (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            b"server-timing: gateway;dur=0.5, queue;dur=0\r\n\r\n"
        )

    def _play(self, steps: Iterator[Step], ask: Ask) -> None:
        """Every step at its time after the arrival of the request, in their order, stamped right before its write."""
        stamps = self.truth.stamps.setdefault(self.headers.get("x-tidegauge-request", "?"), {})
        stamps.update(received=time.monotonic_ns(), body=ask.body, headers=self.headers)
        self.transport.write(self._head())
        self._advance(self.loop.time(), list(steps), 0, stamps)

    def _advance(self, started: float, steps: list[Step], at: int, stamps: dict[str, Any]) -> None:
        while at < len(steps):
            due = started + steps[at].at_ms / 1e3
            if due > self.loop.time():
                self.pending = self.loop.call_at(due, self._advance, started, steps, at, stamps)
                return
            self._send(steps[at], stamps, ends=at == len(steps) - 1)
            at += 1

    def _send(self, step: Step, stamps: dict[str, Any], *, ends: bool) -> None:
        for mark in step.mark.split():
            stamps[mark] = time.monotonic_ns()
        if step.data is None:
            self.transport.close()
            return
        self.transport.write(b"%x\r\n%b\r\n" % (len(step.data), step.data) + (b"0\r\n\r\n" if ends else b""))

    def _flood(self, ask: Ask) -> None:
        """Throughput: every event an HTTP chunk of its own, as engines send them, ``batch`` of them in one write."""
        usage = ask.usage
        key = ("flood", ask.tokens, int(ask.number("batch", 16)))
        if not (made := self.truth.flood_bytes.get(key)):
            one = event(delta())
            made = self.truth.flood_bytes[key] = (b"%x\r\n%b\r\n" % (len(one), one)) * key[2]
        end = event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
        close = b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        whole, rest = divmod(ask.tokens, key[2])
        rest_bytes = made[: len(made) // key[2] * rest]
        if whole <= 1:
            self.transport.write(head + made * whole + rest_bytes + close)
            return

        def pieces() -> Iterator[bytes]:
            yield head
            for _ in range(whole):
                yield made
            yield rest_bytes + close

        self._pump(pieces())

    def _pump(self, pieces: Iterator[bytes]) -> None:
        self.waiting = pieces
        for piece in pieces:
            self.transport.write(piece)
            if not self.may_write:
                return
        self.waiting = None


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """The server as a process; yields its URL."""
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        finally:
            process.terminate()


def stamps_at(url: str) -> dict[str, dict[str, Any]]:
    """What the server at ``url`` sent when, by request number."""
    with urllib.request.urlopen(f"{url}/truth") as response:  # noqa: S310 (our own server)
        found: dict[str, dict[str, Any]] = json.load(response)
        return found


async def serve(port: int) -> None:
    truth = Truth()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(truth), "127.0.0.1", port, backlog=4096)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--cpu", type=int, default=-1, help="pin to this core")
    chosen = options.parse_args()
    if chosen.cpu >= 0 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {chosen.cpu})
    uvloop.install() if sys.version_info < (3, 12) else None
    asyncio.run(serve(chosen.port))

"""An upstream that costs little: it answers at once, or streams events at an even pace, each stamped with its time.

    python -m tests.benchmarks._event_source

The body's field ``bench`` = [events, interval_us] says which. Prints its port.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from typing import Any

import httptools
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"m","at":%019d,'
    b'"choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
)
END = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
)
BENCH = re.compile(rb'"bench": ?\[(\d+), ?(\d+)\]')
TICK_S = 0.001


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Source(asyncio.Protocol):
    def __init__(self, due: dict[int, list[Source]]) -> None:
        self.due = due
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def on_url(self, url: bytes) -> None:
        self.body = b""

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        asked = BENCH.search(self.body)
        if asked is None:  # a probe
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            return
        self.left, interval_us = int(asked[1]), int(asked[2])
        self.count = self.left
        if interval_us == 0:
            events = b"".join(EVENT % time.monotonic_ns() for _ in range(self.left))
            self.transport.write(HEAD + chunk(events + END % self.count) + b"0\r\n\r\n")
            return
        self.transport.write(HEAD)
        self.every = interval_us // 1000  # ticks
        self.plan(now_tick() + 1 + hash(id(self)) % self.every)

    def plan(self, tick: int) -> None:
        self.tick = tick
        self.due.setdefault(tick, []).append(self)

    def beat(self) -> None:
        if self.transport.is_closing():
            return
        self.left -= 1
        if self.left:
            self.transport.write(chunk(EVENT % time.monotonic_ns()))
            self.plan(self.tick + self.every)
        else:
            self.transport.write(chunk(EVENT % time.monotonic_ns() + END % self.count) + b"0\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)


def now_tick() -> int:
    return int(time.monotonic() / TICK_S)


async def main() -> None:
    due: dict[int, list[Source]] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Source(due), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    done = now_tick()
    while True:
        await asyncio.sleep(TICK_S)
        for tick in range(done + 1, now_tick() + 1):
            done = tick
            for source in due.pop(tick, ()):
                source.beat()


if __name__ == "__main__":
    uvloop.run(main())

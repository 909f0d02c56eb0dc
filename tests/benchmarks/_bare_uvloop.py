"""A bare client on uvloop + httptools, for the benchmark to print beside ours: what the other event loop would give.

Run as a process: ``python tests/benchmarks/_bare_uvloop.py PORT STREAMS REQUESTS < request``; prints seconds and chunks as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httptools
import uvloop


class Bare(asyncio.Protocol):
    def __init__(self, request: bytes, left: list[int], chunks: list[int], gone: asyncio.Semaphore) -> None:
        self.request, self.left, self.chunks, self.gone = request, left, chunks, gone
        self.bodies: list[bytes] = []
        self.on_body = self.bodies.append
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._next()

    def _next(self) -> None:
        if self.left[0] > 0:
            self.left[0] -= 1
            self.transport.write(self.request)
        else:
            self.transport.close()
            self.gone.release()

    def data_received(self, data: bytes) -> None:
        self.complete = False
        self.parser.feed_data(data)
        self.chunks[0] += b"".join(self.bodies).count(b"data: ")
        self.bodies.clear()
        if self.complete:
            self._next()

    def on_message_complete(self) -> None:
        self.complete = True


async def flood(port: int, request: bytes, streams: int, requests: int) -> tuple[float, int]:
    left, chunks, gone = [requests], [0], asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    for _ in range(streams):
        await loop.create_connection(lambda: Bare(request, left, chunks, gone), "127.0.0.1", port)
    for _ in range(streams):
        await gone.acquire()
    return time.perf_counter() - started, chunks[0]


if __name__ == "__main__":
    port, streams, requests = map(int, sys.argv[1:4])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(flood(port, sys.stdin.buffer.read(), streams, requests))))

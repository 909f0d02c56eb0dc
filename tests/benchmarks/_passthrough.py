"""What a gateway in Python can be at best: bytes from client to replica and back, parsed only to find where messages end.

    python -m tests.benchmarks._passthrough UPSTREAM_PORT

No policy, no records, no headers of its own; one pooled upstream connection per request in flight. Prints its port.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import httptools
import uvloop


class Downstream(asyncio.Protocol):
    """A client's connection: whole requests go to an upstream connection as they came."""

    def __init__(self, pool: list[Upstream], port: int) -> None:
        self.pool, self.port = pool, port
        self.raw: list[bytes] = []
        self.complete = False
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def on_message_complete(self) -> None:
        self.complete = True

    def data_received(self, data: bytes) -> None:
        self.raw.append(data)
        self.parser.feed_data(data)
        if self.complete:
            request, self.raw, self.complete = b"".join(self.raw), [], False
            if self.pool:
                self.pool.pop().forward(request, self)
            else:
                asyncio.get_running_loop().create_task(self.connect(request))

    async def connect(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: Upstream(self.pool), "127.0.0.1", self.port)
        upstream.forward(request, self)


class Upstream(asyncio.Protocol):
    """A connection to the replica: its bytes go to the client as they come."""

    def __init__(self, pool: list[Upstream]) -> None:
        self.pool = pool
        self.complete = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def forward(self, request: bytes, client: Downstream) -> None:
        self.client = client
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(request)

    def on_message_complete(self) -> None:
        self.complete = True

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        self.client.transport.write(data)
        if self.complete:
            self.complete = False
            self.pool.append(self)


async def main(port: int) -> None:
    pool: list[Upstream] = []
    server = await asyncio.get_running_loop().create_server(lambda: Downstream(pool, port), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))

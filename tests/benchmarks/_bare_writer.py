"""The least a server of streams can do: write the same chunk to every connection, once a step, and nothing else.

``python -m tests.benchmarks._bare_writer STEP_S`` prints its port.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

EVENT = b"data: " + b"x" * 190 + b"\n\n"  # as long as a chunk of the stand-in
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


async def main(step_s: float) -> None:
    transports: list[asyncio.WriteTransport] = []

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.WriteTransport) -> None:
            transports.append(transport)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    due = loop.time()
    while True:
        due += step_s
        await asyncio.sleep(due - loop.time())
        for transport in transports:
            transport.write(CHUNK)


uvloop.run(main(float(sys.argv[1])))

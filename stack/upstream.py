"""Connections to replicas: kept open, reused newest first, one request at a time on each.

What comes back is handed on once per read, already joined and never looked into. May live here: sockets to replicas and the
framing of their answers. What an answer means is the gateway's business.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Final, NamedTuple, Protocol, cast

import httptools

from stack.exchange import HeaderList

IDLE_MAX_S: Final = 60.0  # an engine closes idle connections itself (uvicorn after 5 s); ours go at the latest then
HEADER_BYTES_MAX: Final = 256 * 1024
SWEEP_S: Final = 1.0


class Address(NamedTuple):
    """Where a replica listens; ``base_path`` comes before every path (``/serving`` of ``http://host/serving/v1``)."""

    host: str
    port: int
    base_path: str = ""

    @property
    def authority(self) -> bytes:
        """As a Host header says it."""
        return (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}").encode()


class Waits(NamedTuple):
    """How long a replica may take, in seconds."""

    connect_s: float = 5.0
    silence_s: float = 600.0  # without a byte: a long prefill behind a long engine queue is still alive


class Sink(Protocol):
    """Who takes an answer. ``sent`` once per attempt, then ``head``, ``data`` for each read, the last one with ``last``;
    or ``failed`` at any point, and nothing after it."""

    def sent(self, now_ns: int) -> None:
        """The request has left: its bytes were handed to the socket."""

    def head(self, status: int, headers: HeaderList) -> None: ...

    def data(self, data: bytes, last: bool) -> None: ...

    def failed(self, kind: str, detail: str) -> None:
        """``kind`` is one of connect, gone, timeout."""


class Pending:
    """A request on its way: the handle to stop it, or to slow it down."""

    __slots__ = ("_connection", "_task", "address", "closed", "payload", "sink")

    def __init__(self, address: Address, payload: bytes, sink: Sink) -> None:
        self.address, self.payload, self.sink = address, payload, sink
        self.closed = False
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None

    def abort(self) -> None:
        """Close the connection, so that the replica stops generating; the sink hears nothing more."""
        self.closed = True
        if self._connection is not None:
            self._connection.transport.abort()
        elif self._task is not None:
            self._task.cancel()

    def flow(self, may_read: bool) -> None:
        """Stop or go on reading: the client's socket is full, or has room again."""
        connection = self._connection
        if connection is None or connection.transport.is_closing():
            return
        connection.paused = not may_read
        if may_read:
            connection.active_at = connection.upstreams.loop.time()  # its silence was ours
            connection.transport.resume_reading()
        else:
            connection.transport.pause_reading()


class Upstreams:
    """All connections to all replicas."""

    def __init__(self, waits: Waits | None = None) -> None:
        self.waits = waits or Waits()
        self.loop = asyncio.get_running_loop()
        self.idle: dict[Address, list[_Connection]] = {}
        self.busy: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    def send(self, address: Address, payload: bytes, sink: Sink) -> Pending:
        """Send a whole request (head and body); the answer goes to ``sink``, never from within this call."""
        pending = Pending(address, payload, sink)
        idle = self.idle.get(address)
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.begin(pending, reused=True)
                return pending
        self._connect(pending)
        return pending

    def _connect(self, pending: Pending) -> None:
        task = pending._task = self.loop.create_task(self._open(pending))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _open(self, pending: Pending) -> None:
        address = pending.address
        try:
            async with asyncio.timeout(self.waits.connect_s):
                _, connection = await self.loop.create_connection(lambda: _Connection(self, address), address.host, address.port)
        except (OSError, TimeoutError) as error:
            if not pending.closed:
                pending.closed = True
                pending.sink.failed("connect", f"{address.host}:{address.port}: {error or 'no answer'}")
            return
        if pending.closed:
            connection.transport.abort()
        else:
            connection.begin(pending, reused=False)

    def forget(self, address: Address) -> None:
        """The replica is gone: close what is idle."""
        for connection in self.idle.pop(address, []):
            connection.transport.abort()

    def close(self) -> None:
        self._sweeper.cancel()
        for task in self._connecting:
            task.cancel()
        for connection in [*self.busy, *(one for group in self.idle.values() for one in group)]:
            connection.transport.abort()

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in [one for one in self.busy if now - one.active_at > self.waits.silence_s and not one.paused]:
            connection.fail("timeout", f"no byte for {self.waits.silence_s:.0f} s")
        for connection in [one for group in self.idle.values() for one in group if now - one.active_at > IDLE_MAX_S]:
            connection.transport.close()
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)


class _Connection(asyncio.Protocol):
    """One connection to a replica."""

    transport: asyncio.Transport

    def __init__(self, upstreams: Upstreams, address: Address) -> None:
        self.upstreams, self.address = upstreams, address
        self.pending: Pending | None = None
        self.active_at = 0.0
        self.paused = False
        self._parts: list[bytes] = []
        self.on_body = self._parts.append  # httptools calls it for each piece: no frame of Python in between
        self._begin_answer()

    def _begin_answer(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.headers: HeaderList = []
        self.in_head, self.head_told, self.ended, self.keep_alive = True, False, False, False
        self.status = self.head_bytes = 0
        self._parts.clear()

    def begin(self, pending: Pending, *, reused: bool) -> None:
        self.pending, pending._connection, pending._task = pending, self, None
        self.reused, self.paused = reused, False
        self.transport.write(pending.payload)  # first: all else can be done while the replica reads
        pending.sink.sent(time.monotonic_ns())
        if reused:
            self._begin_answer()
        self.active_at = self.upstreams.loop.time()
        self.upstreams.busy.add(self)

    def fail(self, kind: str, detail: str) -> None:
        pending, self.pending = self.pending, None
        self.transport.abort()
        if pending is not None and not pending.closed:
            pending.closed = True
            pending.sink.failed(kind, detail)

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstreams.busy.discard(self)
        pending, self.pending = self.pending, None
        if pending is None or pending.closed:
            idle = self.upstreams.idle.get(self.address, [])
            if self in idle:
                idle.remove(self)
        elif self.reused and self.head_bytes == 0:
            # The replica closed an idle connection just as we took it: the request never began there, so it goes out again.
            pending._connection = None
            self.upstreams._connect(pending)
        elif not self.in_head and not self.ended and self._until_close():
            pending.closed = True
            pending.sink.data(b"", last=True)
        else:
            pending.closed = True
            pending.sink.failed("gone", f"connection lost: {exc or 'closed by the replica'}")

    def _until_close(self) -> bool:
        """Neither length nor chunks: the body ends with the connection (HTTP/1.0 style)."""
        return not any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def data_received(self, data: bytes) -> None:
        pending = self.pending
        if pending is None or pending.closed:
            self.transport.abort()  # bytes that nobody asked for
            return
        self.active_at = self.upstreams.loop.time()
        if self.in_head:
            self.head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:  # also upgrades, and what came after a complete answer
            self.keep_alive = False
            if not self.ended:
                self.fail("gone", f"not HTTP: {error}")
                return
        if self.in_head:
            if self.head_bytes > HEADER_BYTES_MAX:
                self.fail("gone", f"headers above {HEADER_BYTES_MAX} bytes")
            return
        if not self.head_told:
            self.head_told = True
            pending.sink.head(self.status, self.headers)
            if pending.closed:
                return
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self.ended:
            self._complete(pending, body)
        elif body:
            pending.sink.data(body, False)

    def _complete(self, pending: Pending, body: bytes) -> None:
        """The connection is free before the sink hears of it, so that its next request can take it."""
        pending.closed, pending._connection, self.pending = True, None, None
        self.upstreams.busy.discard(self)
        if self.keep_alive and not self.transport.is_closing():
            self.transport.resume_reading()
            self.upstreams.idle.setdefault(self.address, []).append(self)
        else:
            self.transport.close()
        pending.sink.data(body, True)

    # --- httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:  # trailers are dropped
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        if self.status < 200:  # 100 Continue and the like: the answer itself follows
            self.headers = []
        else:
            self.in_head = False

    def on_message_complete(self) -> None:
        if not self.in_head:
            self.ended, self.keep_alive = True, self.parser.should_keep_alive()

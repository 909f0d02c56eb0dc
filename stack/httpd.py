"""A small HTTP/1.1 server on asyncio and httptools: what the gateway and the stand-in replica listen with.

A handler is a plain function that gets an ``Exchange`` once the whole request is here, and answers it then or later.
Strict on purpose: framing that two servers could read differently is refused (llhttp refuses most of it, the rest is
checked here), every size and every wait has a limit, and a refusal speaks OpenAI's error shape.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, cast

import httptools

from stack.exchange import Exchange, HeaderList, answer_head, error_body

__all__ = ["Exchange", "Handler", "Limits", "Server", "serve"]

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], None]

BACKLOG: Final = 4096  # a burst of connects must not wait for SYN retries (1 s each); the kernel caps it at somaxconn
SWEEP_S: Final = 0.25  # how often deadlines are looked at: one timer for all connections instead of two per request
PIPELINE_MAX: Final = 64  # requests that one connection may send ahead of their answers


class Limits(NamedTuple):
    """Sizes in bytes, waits in seconds."""

    header_bytes: int = 64 * 1024
    body_bytes: int = 32 * 1024 * 1024
    header_s: float = 10.0  # from the first byte of a request to the end of its headers
    body_s: float = 60.0  # from there to its last byte
    idle_s: float = 300.0  # between requests
    write_s: float = 60.0  # a client that takes nothing for so long is gone


class _RefusedError(Exception):
    """The request is not served: what to answer before closing the connection."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Connection(asyncio.Protocol):
    """One client connection: parses requests, hands them over one at a time, in order."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.parser = httptools.HttpRequestParser(self)
        self.active: Exchange | None = None
        self.pending: deque[Exchange] = deque()
        self.refusal: _RefusedError | None = None  # answered once the requests before it are
        self.in_headers = self.in_body = False
        self.version = ""
        self.deadline = 0.0
        self.read_at_ns = 0
        self._reset()

    def _reset(self) -> None:
        self.target = b""
        self.headers: HeaderList = []
        self.parts: list[bytes] = []
        self.header_bytes = self.body_bytes = 0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class is not a subclass of it
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.connections.add(self)
        self.deadline = self.server.loop.time() + self.server.limits.idle_s

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        exchange, self.active = self.active, None
        self.pending.clear()
        if exchange is not None:
            gone = exchange.on_gone
            exchange.detach()
            if gone is not None:
                gone()

    def pause_writing(self) -> None:
        self.deadline = self.server.loop.time() + self.server.limits.write_s
        if self.active is not None and self.active.on_flow is not None:
            self.active.on_flow(False)

    def resume_writing(self) -> None:
        self.deadline = float("inf") if self.active is not None else self.server.loop.time() + self.server.limits.idle_s
        if self.active is not None and self.active.on_flow is not None:
            self.active.on_flow(True)

    def data_received(self, data: bytes) -> None:
        if self.refusal is not None:
            return  # draining what the client still sends
        self.read_at_ns = time.monotonic_ns()
        try:
            self.parser.feed_data(data)
            if self.in_headers:  # they go on in the next read; those that are whole are counted when they are complete
                self.header_bytes += len(data)
                if self.header_bytes > self.server.limits.header_bytes:
                    raise _too_long(self.server.limits)
        except _RefusedError as refusal:
            self.refusal = refusal
        except httptools.HttpParserUpgrade:
            # Declined by answering in HTTP/1.1; what follows might be the other protocol, so the connection ends.
            self._last_request_closes()
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self.refusal = cause if isinstance(cause, _RefusedError) else _RefusedError(500, "internal error")
            if self.refusal is not cause:
                log.error("while parsing a request", exc_info=error)
        except httptools.HttpParserError as error:
            self.refusal = _RefusedError(400, f"not HTTP: {error}")
        self._next()

    # --- httptools callbacks

    def on_message_begin(self) -> None:
        self._reset()
        self.in_headers = True
        if self.active is None:
            self.deadline = self.server.loop.time() + self.server.limits.header_s

    def on_url(self, url: bytes) -> None:
        self.target += url  # comes in pieces where the line is split across reads
        if len(self.target) > self.server.limits.header_bytes:
            raise _too_long(self.server.limits)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_headers:  # trailers of a chunked body are dropped: merging them is a smuggling form
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.in_headers, self.in_body = False, True
        if self.active is None:
            self.deadline = self.server.loop.time() + self.server.limits.body_s
        self.version = self.parser.get_http_version()
        expects = _check_headers(self.version, self.headers, self.server.limits)
        if expects and self.active is None and not self.pending:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        if self.body_bytes > self.server.limits.body_bytes:
            raise _RefusedError(413, f"body above {self.server.limits.body_bytes} bytes")
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.in_body = False
        if len(self.pending) >= PIPELINE_MAX:
            raise _RefusedError(400, f"more than {PIPELINE_MAX} requests ahead of their answers")
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        exchange = Exchange(
            self, self.parser.get_method(), self.target, self.headers, body, received_at_ns=self.read_at_ns,
            chunked=self.version == "1.1",
            keep_alive=self.parser.should_keep_alive() and not self.server.draining,
        )  # fmt: skip
        self.pending.append(exchange)

    # --- one request at a time

    def _last_request_closes(self) -> None:
        if self.pending:
            self.pending[-1].keep_alive = False

    def _next(self) -> None:
        """Hand over the next request, or answer the refusal that ends the connection."""
        while self.active is None and not self.transport.is_closing():
            if self.pending:
                exchange = self.active = self.pending.popleft()
                self.deadline = float("inf")
                try:
                    self.server.handler(exchange)
                except Exception:  # a handler's bug must cost one request, not the server
                    log.exception("handler failed on %s", exchange.path)
                    self._handler_failed(exchange)
            elif self.refusal is not None:
                body = error_body(self.refusal.status, str(self.refusal))
                framing = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
                self.transport.write(answer_head(self.refusal.status, (), framing, keep_alive=False) + body)
                self._close_soon()
                return
            else:
                return
        if self.active is not None and self.pending:
            self.transport.pause_reading()

    def _handler_failed(self, exchange: Exchange) -> None:
        if exchange.started:
            exchange.break_off()
        else:
            exchange.error(500, "internal error")

    def _close_soon(self) -> None:
        """Close after a refusal. The client may still be sending (a body too large): closing at once would reset the
        connection and take our answer with it, so what still comes is read and dropped for a second."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.deadline = self.server.loop.time() + 1.0
        self.in_headers = self.in_body = False

    def answered(self, keep_alive: bool) -> None:
        """The active exchange is complete."""
        self.active = None
        if not keep_alive or self.server.draining:
            self.pending.clear()
            self.transport.close()
            return
        if self.pending or self.refusal is not None:
            self.server.loop.call_soon(self._resume)  # not from here: a long pipeline would recurse
        elif not self.transport.is_closing():
            self.deadline = self.server.loop.time() + self.server.limits.idle_s

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self._next()

    def overdue(self) -> None:
        """The deadline has passed."""
        if self.active is not None:
            self.transport.abort()  # takes nothing any more; connection_lost tells the handler
        elif self.refusal is None and (self.in_headers or self.in_body):
            self.refusal = _RefusedError(408, "the request did not arrive in time")
            self._next()
        else:
            self.transport.close()


def _too_long(limits: Limits) -> _RefusedError:
    return _RefusedError(431, f"request line or headers above {limits.header_bytes} bytes")


def _check_headers(version: str, headers: HeaderList, limits: Limits) -> bool:
    """Refuse what is too long, and what two servers could frame differently (RFC 9112 3.2, 6.3).

    True: the client waits for 100 Continue.
    """
    if version not in ("1.1", "1.0"):
        raise _RefusedError(505, f"HTTP/{version} is not spoken here")
    hosts, expects, size = 0, False, 0
    for name, value in headers:
        size += len(name) + len(value) + 4
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            if version == "1.0":
                raise _RefusedError(400, "transfer-encoding in HTTP/1.0")
            if value.strip().lower() != b"chunked":
                raise _RefusedError(501, "the only transfer-encoding understood is chunked")
        elif name == b"content-length" and int(value) > limits.body_bytes:
            raise _RefusedError(413, f"body above {limits.body_bytes} bytes")
        elif name == b"expect":
            expects = value.lower() == b"100-continue"
    if size > limits.header_bytes:
        raise _too_long(limits)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise _RefusedError(400, "exactly one host header is needed")
    return expects


class Server:
    """A listening server. ``port`` is the real one where 0 was asked for."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self.handler, self.limits = handler, limits
        self.loop = asyncio.get_running_loop()
        self.connections: set[_Connection] = set()
        self.draining = False
        self.port = 0
        self._listener: asyncio.Server | None = None
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in [one for one in self.connections if one.deadline < now]:
            connection.overdue()
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    async def listen(self, host: str, port: int) -> None:
        self._listener = await self.loop.create_server(lambda: _Connection(self), host, port, backlog=BACKLOG)
        self.port = self._listener.sockets[0].getsockname()[1]

    def stop_accepting(self) -> None:
        """No new connections; idle ones close, the others after the answer they wait for."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.connections):
            if connection.active is None and not connection.in_headers and not connection.in_body:
                connection.transport.close()

    def close(self) -> None:
        """Close everything now; clients that still wait are told by their connection ending."""
        self.stop_accepting()
        self._sweeper.cancel()
        for connection in list(self.connections):
            connection.transport.abort()


async def serve(handler: Handler, host: str, port: int, limits: Limits | None = None) -> Server:
    """Listen on ``host:port`` (0: any free port); ``handler`` is called in the loop with each complete request."""
    server = Server(handler, limits or Limits())
    await server.listen(host, port)
    return server

"""One request and its answer, as a handler sees them; and what a refusal looks like to OpenAI's clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Final, Protocol

HeaderList = list[tuple[bytes, bytes]]
Headers = Iterable[tuple[bytes, bytes]]

CHUNK_END: Final = b"0\r\n\r\n"
STATUS_LINES: Final = {s.value: b"HTTP/1.1 %d %s\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}

# OpenAI's own `type` by status; anything else is a server_error.
_ERROR_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> bytes:
    """An error as OpenAI's API words it, so that its client libraries raise the right exception."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "code": code, "param": param}}).encode()


class Connection(Protocol):
    """What an exchange needs of the connection it came on."""

    transport: asyncio.Transport

    def answered(self, keep_alive: bool) -> None: ...


class Exchange:
    """One request and its answer. After the client has left, writing is harmless and does nothing.

    ``on_gone()`` is called when the client leaves before its answer is complete; ``on_flow(may_write)`` when its socket
    falls behind (False) and catches up (True).
    """

    __slots__ = (
        "_chunked", "_conn", "_head", "body", "headers", "keep_alive", "method", "on_flow", "on_gone",
        "received_at_ns", "started", "target",
    )  # fmt: skip

    def __init__(
        self, conn: Connection, method: bytes, target: bytes, headers: HeaderList, body: bytes, *,
        chunked: bool, keep_alive: bool, received_at_ns: int,
    ) -> None:  # fmt: skip
        self._conn: Connection | None = conn
        self.method, self.target, self.headers, self.body = method, target, headers, body
        self.received_at_ns = received_at_ns  # time.monotonic_ns() when the read that brought the last byte began
        self.keep_alive = keep_alive
        self._chunked = chunked  # an HTTP/1.0 client gets a body that ends with the connection
        self._head: bytes | None = None  # made, not sent yet
        self.started = False
        self.on_gone: Callable[[], None] | None = None
        self.on_flow: Callable[[bool], None] | None = None

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition(b"?")[0].decode("latin-1")

    @property
    def open(self) -> bool:
        """The client is there and its answer is not complete."""
        return self._conn is not None

    def get(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer, in one write."""
        conn = self.detach()
        if conn is not None:
            head = answer_head(status, headers, b"content-length: %d\r\n" % len(body), self.keep_alive)
            conn.transport.write(head if self.method == b"HEAD" else head + body)
            conn.answered(self.keep_alive)

    def error(self, status: int, message: str, *, code: str | None = None, headers: Headers = ()) -> None:
        """A refusal in OpenAI's shape."""
        self.respond(status, [(b"content-type", b"application/json"), *headers], error_body(status, message, code=code))

    def start(self, status: int, headers: Headers) -> None:
        """Begin an answer of unknown length. The head leaves with the first ``write``, or with ``flush``."""
        if self._chunked:
            framing = b"transfer-encoding: chunked\r\n"
        else:
            framing, self.keep_alive = b"", False
        self._head = answer_head(status, headers, framing, self.keep_alive)
        self.started = True

    def flush(self) -> None:
        """Send a head that is still held back."""
        if self._head is not None and self._conn is not None:
            self._conn.transport.write(self._head)
            self._head = None

    def write(self, data: bytes) -> None:
        """One piece of the body: one chunk, one write."""
        conn = self._conn
        if conn is None or not data or self.method == b"HEAD":
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head is not None:
            data, self._head = self._head + data, None
        conn.transport.write(data)

    def end(self, data: bytes = b"") -> None:
        """The last piece of the body and its end, in one write."""
        conn = self.detach()
        if conn is None:
            return
        if self.method == b"HEAD":
            data = b""
        elif self._chunked:
            data = b"%x\r\n%b\r\n%b" % (len(data), data, CHUNK_END) if data else CHUNK_END
        if self._head is not None:
            data, self._head = self._head + data, None
        conn.transport.write(data)
        conn.answered(self.keep_alive)

    def break_off(self) -> None:
        """Close the connection without a proper end, so that no client takes half an answer for a whole one."""
        self.flush()
        conn = self.detach()
        if conn is not None:
            conn.answered(False)

    def detach(self) -> Connection | None:
        """The connection, which this exchange gives up: its answer is complete, or its client has left."""
        conn, self._conn = self._conn, None
        self.on_gone = self.on_flow = None
        return conn


def answer_head(status: int, headers: Headers, framing: bytes, keep_alive: bool) -> bytes:
    fields = [b"%b: %b\r\n" % field for field in headers]
    return b"".join((STATUS_LINES[status], *fields, framing, b"\r\n" if keep_alive else b"connection: close\r\n\r\n"))

"""The streaming client: HTTP/1.1 on raw sockets, one greenlet a connection, connections opened before they are needed.

``Client.send`` writes a request at once, in the greenlet that calls it; the connection's own greenlet, always waiting to
read, feeds what comes back to the request's ``Stream`` and calls ``on_done`` exactly once. It never waits for anyone.

Why not geventhttpclient: its ``iter_lines`` reads blocks of 1024 bytes, which adds several token intervals to TTFT.
"""

from __future__ import annotations

import _socket  # the bare sockets: gevent's wrapper tries a read before every wait, one failed system call a chunk
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import gevent
import gevent.socket
import httptools
from gevent.hub import get_hub

from loadgen._sse import Shared, Stream
from replay.errors import InputError
from replay.records import CANCELLED, TIMEOUT
from replay.wire import H_REPLICA, H_SERVER_TIMING

READ_BYTES: Final = 65_536
# A kept connection is closed after 4 s without use: servers close theirs after 5 s (uvicorn), and a request must not meet that.
IDLE_NS: Final = 4_000_000_000
CONNECT_TIMEOUT_S: Final = 10.0
_READ, _WRITE = 1, 2


class Target(NamedTuple):
    """Where to send: what ``--host`` said, resolved once."""

    host: str  # as the Host header says it
    base: str  # path before /v1, without a slash at its end
    family: int
    address: tuple[str, int]


def resolve(url: str) -> Target:
    """The target of ``--host``; InputError where it is no http URL or its name is unknown."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise InputError(
            f"{url!r} is no address to send to",
            where="--host",
            rule="http://name[:port][/base]",
            fix="--host http://127.0.0.1:8000",
        )
    try:
        port = parts.port or 80
        found = gevent.socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot resolve {url!r}: {error}", where="--host", fix="check the name and the port") from error
    family, _, _, _, address = found[0]
    base = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.netloc.rpartition("@")[2], base, family, address[:2])


def connect(target: Target) -> _socket.socket:
    """A connected, non-blocking socket without Nagle's delay; OSError with the reason where that fails."""
    sock = _socket.socket(target.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(target.address)
        if code == errno.EINPROGRESS:
            with gevent.Timeout(CONNECT_TIMEOUT_S, TimeoutError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s")):
                _wait(sock, _WRITE)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _wait(sock: _socket.socket, events: int) -> None:
    hub = get_hub()
    watcher = hub.loop.io(sock.fileno(), events)
    try:
        hub.wait(watcher)
    finally:
        watcher.close()


class Connection:
    """One kept-alive connection and the greenlet that reads from it for as long as it lives."""

    def __init__(self, client: Client, sock: _socket.socket) -> None:
        self.client, self.sock = client, sock
        self.stream: Stream | None = None
        self.idle_since_ns = monotonic_ns()
        self.open = True
        self.sending: gevent.Greenlet | None = None
        self.bodies: list[bytes] = []
        self.complete = self.is_stream = self.keep_alive = False
        self.headers: dict[bytes, bytes] = {}
        # The parser calls these for every header and every piece of a body: as methods of ours they would cost ten times as much.
        self.on_header, self.on_body = self.headers.__setitem__, self.bodies.append
        self.parser = httptools.HttpResponseParser(self)
        self.greenlet = gevent.spawn(self._read)

    def send(self, stream: Stream) -> None:
        """Write the request now; what the kernel does not take at once follows from a greenlet of its own."""
        self.stream, stream.connection = stream, self
        stream.sent_ns = monotonic_ns()
        try:
            sent = self.sock.send(stream.request)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._lose(f"while sending: {error}")
            return
        if sent < len(stream.request):
            self.sending = gevent.spawn(self._send_rest, stream, memoryview(stream.request)[sent:])
        stream.request = b""  # prompts of hundreds of requests in flight would be most of the memory

    def _send_rest(self, stream: Stream, rest: memoryview) -> None:
        while rest and self.stream is stream:
            _wait(self.sock, _WRITE)
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                if self.stream is stream:
                    self._lose(f"while sending: {error}")
                return
        self.sending = None

    def _read(self) -> None:
        hub, recv, parser, bodies = get_hub(), self.sock.recv, self.parser, self.bodies
        watcher = hub.loop.io(self.sock.fileno(), _READ)
        # Started once, since this greenlet waits for nothing else: ``hub.wait`` starts, stops and makes a Waiter for each read.
        watcher.start(gevent.getcurrent().switch)
        shared = self.client.shared
        try:
            while True:
                hub.switch()
                try:
                    data = recv(READ_BYTES)
                except BlockingIOError:
                    continue
                now = monotonic_ns()
                stream = self.stream
                if not data or stream is None:
                    break
                parser.feed_data(data)
                if bodies:
                    body = bodies[0] if len(bodies) == 1 else b"".join(bodies)
                    bodies.clear()
                    if self.is_stream:
                        stream.feed(body, now, shared)
                    else:
                        stream.keep(body)
                if self.complete:
                    self.complete = False
                    if not self._finish(stream, now):
                        break
            self._lose("the connection was closed before the answer was complete")
        except OSError as error:
            self._lose(error.strerror or str(error))
        except httptools.HttpParserError as error:
            self._lose(f"not HTTP: {error}")
        finally:
            watcher.close()
            self.open = False
            if self.sending:
                self.sending.kill()  # it waits for a socket that is about to go, and whose number another will get
            self.sock.close()
            if self in self.client.idle:
                self.client.idle.remove(self)

    def on_headers_complete(self) -> None:
        """Hand the stream what it needs of the headers; most servers send lower-case names, the others' are lowered here."""
        self.keep_alive = self.parser.should_keep_alive()
        headers, stream = self.headers, self.stream
        if b"content-type" not in headers:
            headers = {name.lower(): value for name, value in headers.items()}
        if stream:
            stream.http_status = self.parser.get_status_code()
            stream.content_type = headers.get(b"content-type", b"")
            stream.server_timing = headers.get(H_SERVER_TIMING, b"")
            stream.replica = headers.get(H_REPLICA, b"")
            stream.retry_after = headers.get(b"retry-after", b"")
            self.is_stream = stream.http_status == 200 and b"json" not in stream.content_type
        self.headers.clear()

    def on_message_complete(self) -> None:
        self.complete = self.parser.get_status_code() >= 200  # 1xx are only heralds

    def _finish(self, stream: Stream, now_ns: int) -> bool:
        """The answer is complete; True where the connection can serve another request (and maybe does so already)."""
        self.stream = None
        # Answered before it was asked in full (a 413, say): what would follow on this connection is no request.
        reusable = self.keep_alive and self.sending is None
        if reusable:
            self.idle_since_ns = now_ns
            self.client.idle.append(self)
        self.client.end(stream, now_ns)
        return reusable

    def _lose(self, cause: str) -> None:
        stream, self.stream = self.stream, None
        self.close()
        if stream:
            if stream.end_ns < 0:  # after [DONE] nothing is missing any more
                stream.cause = stream.cause or cause
            self.client.end(stream, monotonic_ns())

    def close(self) -> None:
        """Let the reading greenlet see the end; it closes the socket, so that no other can be given its number meanwhile."""
        if self.open:
            self.open = False
            with contextlib.suppress(OSError):  # the peer was faster
                self.sock.shutdown(socket.SHUT_RDWR)


class Client:
    """Connections to one target. ``on_done(stream)`` is called once for every stream given to ``send``."""

    def __init__(self, target: Target, on_done: Callable[[Stream], None]) -> None:
        self.target, self.on_done = target, on_done
        self.shared = Shared()
        self.idle: deque[Connection] = deque()  # longest unused first, and used first: they take turns, so none grows stale
        self.inside: dict[int, Stream] = {}  # by request id, in the order of sending
        self.opening = 0
        self.opened = 0

    def send(self, stream: Stream) -> None:
        """Send now on a ready connection; where none is ready, as soon as one is connected."""
        self.inside[stream.request_id] = stream
        while self.idle:
            connection = self.idle.popleft()
            if connection.open:
                connection.send(stream)
                return
        gevent.spawn(self._send_fresh, stream)

    def _send_fresh(self, stream: Stream) -> None:
        try:
            connection = self._open()
        except OSError as error:
            stream.cause = f"no connection: {error.strerror or error}"
            self.end(stream, monotonic_ns())
            return
        if stream.done_ns < 0:
            connection.send(stream)
        else:
            self.idle.append(connection)

    def _open(self) -> Connection:
        sock = connect(self.target)
        self.opened += 1
        return Connection(self, sock)

    def prepare(self, count: int) -> None:
        """See to it that ``count`` connections are ready or on their way; does not wait for them."""
        for _ in range(count - len(self.idle) - self.opening):
            self.opening += 1
            gevent.spawn(self._prepare_one)

    def _prepare_one(self) -> None:
        try:
            self.idle.append(self._open())
        except OSError:
            pass  # a request that needs one will name the reason
        finally:
            self.opening -= 1

    def tend(self, now_ns: int, timeout_ns: int) -> None:
        """Close what was idle too long and end what was inside too long; called a few times a second."""
        while self.idle and now_ns - self.idle[0].idle_since_ns > IDLE_NS:
            self.idle.popleft().close()
        while self.inside:
            stream = next(iter(self.inside.values()))
            begun = stream.sent_ns if stream.sent_ns >= 0 else stream.scheduled_ns
            if now_ns - begun <= timeout_ns:
                return
            self.abort(stream, TIMEOUT, f"no end within {timeout_ns / 1e9:g} s")

    def abort(self, stream: Stream, status: int, cause: str) -> None:
        """End a stream from outside; its connection is closed, as a client that leaves would. After [DONE] it stays what it is."""
        assert status in (TIMEOUT, CANCELLED)
        if stream.end_ns < 0:
            stream.outcome, stream.cause = status, cause
        if isinstance(connection := stream.connection, Connection):
            connection.stream = None
            connection.close()
        self.end(stream, monotonic_ns())

    def end(self, stream: Stream, now_ns: int) -> None:
        if stream.done_ns < 0:
            stream.done_ns = stream.end_ns if stream.end_ns >= 0 else now_ns
            stream.connection = None
            self.inside.pop(stream.request_id, None)
            self.on_done(stream)

    def close(self) -> None:
        """Close every idle connection; streams still inside are the caller's to abort."""
        while self.idle:
            self.idle.popleft().close()

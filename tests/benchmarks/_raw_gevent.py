"""The bare client that ours is held against: a gevent socket, httptools, a byte count; nothing recorded.

One greenlet a connection, the next request as soon as the last answer is complete (closed loop), ``requests`` in all.
``paced`` sends at absolute times instead and returns the instants of each request's first token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import gevent
import gevent.socket
import httptools


class Answer:
    """Parser callbacks: gathers bodies, notices the end."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.complete = False
        self.on_body = self.bodies.append
        self.parser = httptools.HttpResponseParser(self)

    def on_message_complete(self) -> None:
        self.complete = True


def connect(port: int) -> gevent.socket.socket:
    sock = gevent.socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY, 1)
    return sock


def exchange(sock: gevent.socket.socket, request: bytes) -> tuple[int, int]:
    """(chunks, instant of the first token) of one answer."""
    answer, chunks, first = Answer(), 0, -1
    sock.sendall(request)
    while not answer.complete:
        data = sock.recv(65_536)
        now = time.monotonic_ns()
        answer.parser.feed_data(data)
        body = b"".join(answer.bodies)
        answer.bodies.clear()
        chunks += body.count(b"data: ")
        if first < 0 and b'"content":" ' in body:
            first = now
    return chunks, first


def flood(port: int, request: bytes, streams: int, requests: int) -> tuple[float, int]:
    """(seconds, chunks) for ``requests`` answers over ``streams`` connections."""
    left, chunks = [requests], [0]

    def loop() -> None:
        sock = connect(port)
        while left[0] > 0:
            left[0] -= 1
            seen, _ = exchange(sock, request)
            chunks[0] += seen
        sock.close()

    started = time.perf_counter()
    gevent.joinall([gevent.spawn(loop) for _ in range(streams)], raise_error=True)
    return time.perf_counter() - started, chunks[0]


def paced(port: int, requests: Sequence[bytes], due_ns: Sequence[int]) -> list[tuple[int, int]]:
    """(sent, first token) instants of requests sent at ``due_ns``, each by a greenlet on a connection made beforehand."""
    stamps: list[tuple[int, int]] = [(-1, -1)] * len(requests)
    idle = [connect(port) for _ in range(min(len(requests), 512))]

    def one(index: int) -> None:
        sock = idle.pop() if idle else connect(port)
        sent = time.monotonic_ns()
        stamps[index] = (sent, exchange(sock, requests[index])[1])
        idle.append(sock)

    running = []
    for index, due in enumerate(due_ns):
        if (wait := (due - time.monotonic_ns()) / 1e9) > 0:
            gevent.sleep(wait)
        running.append(gevent.spawn(one, index))
    gevent.joinall(running, raise_error=True)
    return stamps

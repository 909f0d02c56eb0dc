"""A bare asyncio HTTP client for tests: exactly the bytes that a test wants to send, and what came back, parsed."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvloop


def scenario(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test written as a coroutine, run on the loop that the servers run on."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(20):
                await test(*args, **kwargs)

        uvloop.run(limited())

    return run


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False  # the answer ended as its framing says

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> Answer:
        """The next answer, or as much of it as came before the connection closed."""
        answer = Answer()
        parser = httptools.HttpResponseParser(answer)
        while not answer.whole:
            data = await self.reader.read(65536)
            if not data:
                break
            parser.feed_data(data)
            answer.status = parser.get_status_code()
        return answer

    async def answers(self, count: int) -> list[Answer]:
        """``count`` answers on one connection, however the reads cut them."""
        found: list[Answer] = []

        class Collect:
            def on_message_begin(self) -> None:
                found.append(Answer())

            def on_header(self, name: bytes, value: bytes) -> None:
                found[-1].on_header(name, value)

            def on_body(self, body: bytes) -> None:
                found[-1].on_body(body)

            def on_message_complete(self) -> None:
                found[-1].status, found[-1].whole = parser.get_status_code(), True

        parser = httptools.HttpResponseParser(Collect())
        while len(found) < count or not found[-1].whole:
            data = await self.reader.read(65536)
            if not data:
                break
            parser.feed_data(data)
        return found

    async def rest(self) -> bytes:
        """Everything until the connection closes."""
        return await self.reader.read()

    def leave(self) -> None:
        self.writer.transport.abort()


def request_bytes(path: str = "/", body: bytes = b"", *, method: str = "", headers: dict[str, str] | None = None) -> bytes:
    lines = [f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1", "Host: test"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


async def ask(port: int, path: str = "/", body: bytes = b"", **options: Any) -> Answer:
    """One request on a connection of its own."""
    client = await Client.connect(port)
    client.send(request_bytes(path, body, **options))
    answer = await client.answer()
    client.leave()
    return answer


async def until(condition: Callable[[], Any], limit_s: float = 5.0) -> None:
    """Wait for a condition; a test that would never see it fails by the clock."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.002)

"""The HTTP server: what a client may send, what it gets, and what is refused. Real sockets throughout."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack import httpd
from tests.http_client import Client, ask, request_bytes, scenario, until

SHORT = httpd.Limits(header_bytes=2048, body_bytes=4096, header_s=0.2, body_s=0.2, idle_s=0.2, write_s=0.3)


def echo(exchange: httpd.Exchange) -> None:
    exchange.respond(200, [(b"x-path", exchange.target)], exchange.method + b" " + exchange.body)


async def refusing_handler_server(limits: httpd.Limits | None = None) -> httpd.Server:
    def never(exchange: httpd.Exchange) -> None:
        raise AssertionError(f"{exchange.target!r} was handed over")

    return await httpd.serve(never, "127.0.0.1", 0, limits)


@scenario
async def test_requests_on_one_connection_are_answered_in_order() -> None:
    waiting: list[httpd.Exchange] = []

    def slow_first(exchange: httpd.Exchange) -> None:
        waiting.append(exchange) if exchange.path == "/slow" else echo(exchange)

    server = await httpd.serve(slow_first, "127.0.0.1", 0)
    client = await Client.connect(server.port)
    client.send(request_bytes("/slow") + request_bytes("/b?q=1", b"hello") + request_bytes("/c"))
    await until(lambda: waiting)
    waiting[0].respond(200, [], b"slow")
    answers = await client.answers(3)
    assert [answer.body for answer in answers] == [b"slow", b"POST hello", b"GET "]
    assert answers[1].headers["x-path"] == "/b?q=1"
    client.leave()
    server.close()


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 200), max_size=6), chunked=st.booleans())
def test_a_request_may_come_in_any_pieces(cuts: list[int], chunked: bool) -> None:
    @scenario
    async def run() -> None:
        server = await httpd.serve(echo, "127.0.0.1", 0)
        if chunked:
            head = b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            raw = head + b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nX-Trailer: dropped\r\n\r\n"
        else:
            raw = request_bytes("/p", b"hello world")
        client = await Client.connect(server.port)
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True):
            client.send(raw[start:end])
            await asyncio.sleep(0)
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"POST hello world")
        client.leave()
        server.close()

    run()


SMUGGLING = {
    "length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "two equal lengths": b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
    "list of lengths": b"Content-Length: 1,1\r\n\r\na",
    "signed length": b"Content-Length: +1\r\n\r\na",
    "hex length": b"Content-Length: 0x1\r\n\r\na",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "gzip, chunked": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "xchunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "vertical tab": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "space before colon": b"Content-Length : 1\r\n\r\na",
    "folded header": b"X: b\r\n c\r\nContent-Length: 1\r\n\r\na",
    "bare line feeds": b"Content-Length: 1\n\na",
    "bare carriage return": b"X: a\rY: b\r\nContent-Length: 1\r\n\r\na",
    "null byte": b"X: a\x00b\r\nContent-Length: 1\r\n\r\na",
    "junk after a chunk size": b"Transfer-Encoding: chunked\r\n\r\n1 x\r\na\r\n0\r\n\r\n",
    "line feeds in chunks": b"Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n",
    "chunk size overflow": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\na\r\n0\r\n\r\n",
    "second host": b"Host: b\r\nContent-Length: 1\r\n\r\na",
}


@pytest.mark.parametrize("form", SMUGGLING)
def test_framing_that_two_servers_could_read_differently_is_refused(form: str) -> None:
    @scenario
    async def run() -> None:
        server = await refusing_handler_server()
        client = await Client.connect(server.port)
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + SMUGGLING[form] + b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
        (answer,) = await client.answers(1)
        assert answer.status in (400, 501)
        assert json.loads(answer.body)["error"]["type"] in ("invalid_request_error", "server_error")
        assert await client.rest() == b""  # closed, and nothing after the refusal was looked at
        server.close()

    run()


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 5000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 5000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 900, 431),
        (b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4097\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1001\r\n" + b"y" * 4097 + b"\r\n0\r\n\r\n", 413),
    ],
)
def test_what_is_refused_gets_its_status_and_the_connection_closes(raw: bytes, status: int) -> None:
    @scenario
    async def run() -> None:
        server = await refusing_handler_server(SHORT)
        client = await Client.connect(server.port)
        client.send(raw)
        (answer,) = await client.answers(1)
        assert answer.status == status
        assert await client.rest() == b""
        server.close()

    run()


@scenario
async def test_a_client_that_sends_a_body_too_large_still_reads_why() -> None:
    server = await refusing_handler_server(SHORT)
    client = await Client.connect(server.port)
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8000000\r\n\r\n" + b"y" * 8_000_000)
    assert (await client.answer()).status == 413
    server.close()


@pytest.mark.parametrize(
    "begun", [b"GET / HT", b"GET / HTTP/1.1\r\nX: y\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab"]
)
def test_a_request_that_does_not_arrive_in_time_is_answered_408(begun: bytes) -> None:
    @scenario
    async def run() -> None:
        server = await refusing_handler_server(SHORT)
        client = await Client.connect(server.port)
        client.send(begun)
        assert (await client.answer()).status == 408
        assert await client.rest() == b""
        server.close()

    run()


@scenario
async def test_dripping_bytes_do_not_extend_the_time() -> None:
    server = await refusing_handler_server(SHORT)
    client = await Client.connect(server.port)

    async def drip() -> None:
        for byte in b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: " + b"y" * 1000:
            client.send(bytes([byte]))
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert (await client.answer()).status == 408
    dripping.cancel()
    server.close()


@scenario
async def test_an_idle_connection_closes_without_a_word() -> None:
    server = await httpd.serve(echo, "127.0.0.1", 0, SHORT)
    fresh, used = await Client.connect(server.port), await Client.connect(server.port)
    used.send(request_bytes("/"))
    assert (await used.answer()).status == 200
    assert await fresh.rest() == b""
    assert await used.rest() == b""
    await until(lambda: not server.connections)
    server.close()


@scenario
async def test_the_handler_hears_that_its_client_left_and_may_go_on_writing() -> None:
    exchanges: list[httpd.Exchange] = []
    gone: list[str] = []

    def stream(exchange: httpd.Exchange) -> None:
        exchange.on_gone = lambda: gone.append(exchange.path)
        exchange.start(200, [])
        exchange.write(b"first")
        exchanges.append(exchange)

    server = await httpd.serve(stream, "127.0.0.1", 0)
    leaver, stayer = await Client.connect(server.port), await Client.connect(server.port)
    leaver.send(request_bytes("/leaves"))
    stayer.send(request_bytes("/stays"))
    await until(lambda: len(exchanges) == 2)
    leaver.leave()
    await until(lambda: gone)
    for exchange in exchanges:
        exchange.write(b"second")
        exchange.end(b"third")
    answer = await stayer.answer()
    assert (answer.body, answer.whole) == (b"firstsecondthird", True)
    stayer.leave()
    await until(lambda: not server.connections)
    assert gone == ["/leaves"]
    server.close()


@scenario
async def test_a_broken_off_answer_is_seen_as_broken() -> None:
    def half(exchange: httpd.Exchange) -> None:
        exchange.start(200, [])
        exchange.write(b"half")
        exchange.break_off()

    server = await httpd.serve(half, "127.0.0.1", 0)
    answer = await ask(server.port)
    assert (answer.body, answer.whole) == (b"half", False)
    server.close()


@scenario
async def test_a_bug_in_the_handler_costs_one_request(caplog: pytest.LogCaptureFixture) -> None:
    def buggy(exchange: httpd.Exchange) -> None:
        if exchange.path == "/bug":
            raise KeyError("bug")
        echo(exchange)

    server = await httpd.serve(buggy, "127.0.0.1", 0)
    client = await Client.connect(server.port)
    client.send(request_bytes("/bug") + request_bytes("/fine"))
    assert [answer.status for answer in await client.answers(2)] == [500, 200]
    assert "KeyError" in caplog.text
    client.leave()
    server.close()


@scenario
async def test_http_1_0_gets_a_body_that_ends_with_the_connection() -> None:
    def stream(exchange: httpd.Exchange) -> None:
        exchange.start(200, [])
        exchange.write(b"to the ")
        exchange.end(b"end")

    server = await httpd.serve(stream, "127.0.0.1", 0)
    client = await Client.connect(server.port)
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert body == b"to the end"
    assert b"transfer-encoding" not in head
    server.close()


@scenario
async def test_expect_continue_is_answered_before_the_body() -> None:
    server = await httpd.serve(echo, "127.0.0.1", 0)
    client = await Client.connect(server.port)
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"hi")
    assert (await client.answer()).body == b"POST hi"
    client.leave()
    server.close()


@scenario
async def test_an_upgrade_is_declined_and_the_connection_ends() -> None:
    server = await httpd.serve(echo, "127.0.0.1", 0)
    client = await Client.connect(server.port)
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nPRI * HTTP/2.0\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.rest() == b""
    server.close()


@scenario
async def test_a_client_that_reads_slowly_holds_back_the_writer_and_one_that_never_reads_is_gone() -> None:
    flows: list[bool] = []
    gone: list[bool] = []
    exchanges: list[httpd.Exchange] = []

    def flood(exchange: httpd.Exchange) -> None:
        exchange.on_flow, exchange.on_gone = flows.append, lambda: gone.append(True)
        exchanges.append(exchange)
        exchange.start(200, [])
        for _ in range(64):
            exchange.write(b"x" * 262144)

    server = await httpd.serve(flood, "127.0.0.1", 0, SHORT)
    slow, never = await Client.connect(server.port), await Client.connect(server.port)
    slow.send(request_bytes("/"))
    await until(lambda: flows == [False])
    while flows == [False]:
        assert await slow.reader.read(1 << 20)
    assert flows == [False, True]
    exchanges[0].end()
    slow.leave()
    never.send(request_bytes("/"))
    never.reader._transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: gone)
    server.close()


@scenario
async def test_sockets_send_at_once_and_a_burst_of_connects_is_not_turned_away() -> None:
    server = await httpd.serve(echo, "127.0.0.1", 0)
    # The loop does not run while these connect: the kernel's queue alone holds them (a queue of 128 would stall the 130th).
    burst = [socket.create_connection(("127.0.0.1", server.port), timeout=0.5) for _ in range(400)]
    await until(lambda: len(server.connections) == 400)
    for connection in server.connections:
        nodelay = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert nodelay
    for connected in burst:
        connected.close()
    server.close()


@scenario
async def test_a_draining_server_finishes_what_it_began_and_takes_nothing_new() -> None:
    exchanges: list[httpd.Exchange] = []
    server = await httpd.serve(exchanges.append, "127.0.0.1", 0)
    idle, busy = await Client.connect(server.port), await Client.connect(server.port)
    busy.send(request_bytes("/"))
    await until(lambda: exchanges)
    server.stop_accepting()
    assert await idle.rest() == b""
    with pytest.raises(OSError):
        await Client.connect(server.port)
    exchanges[0].respond(200, [], b"the last")
    assert (await busy.answer()).body == b"the last"
    assert await busy.rest() == b""
    await until(lambda: not server.connections)
    server.close()

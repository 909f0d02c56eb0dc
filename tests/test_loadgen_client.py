"""The client against a server that knows the truth: every stream shape that is known to break clients, over real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import gevent
import numpy as np
import pytest
from gevent.server import StreamServer

from loadgen._openai import Client, connect, resolve
from loadgen._outcomes import Clock, conclude
from loadgen._sse import Stream
from replay.errors import InputError
from replay.records import ERROR, LIMITED, OK, OUTCOME_DTYPE, PHASES, SHED, TIMEOUT
from tests import truth_server

TOLERANCE_NS = 30_000_000  # of a shared machine; what a shape could be mistaken for lies at least 60 ms away
CLOCK = Clock(0, 1)  # the run's zero is the monotonic clock's, so that both sides' stamps compare


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with truth_server.running() as url:
        yield url


def body(max_tokens: int = 6, **more: Any) -> bytes:
    return json.dumps(
        {"stream": True, "max_tokens": max_tokens, "messages": [{"role": "user", "content": "hello you"}], **more}
    ).encode()


class Caller:
    """Sends requests one by one and keeps their records."""

    def __init__(self, url: str, script: str) -> None:
        self.target = resolve(f"{url}/{script}")
        self.records: list[Any] = []
        self.client = Client(self.target, self._done)
        self.numbers = 0

    def _done(self, stream: Stream) -> None:
        row = conclude(stream, CLOCK, model=b"m").row
        self.records.append(np.frombuffer(row, OUTCOME_DTYPE)[0])

    def send(self, content: bytes) -> int:
        # Numbers are unique in the module's server: its stamps go by them.
        number = time.monotonic_ns()
        head = f"POST {self.target.base}/v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-tidegauge-request: {number}\r\n"
        request = head.encode() + b"content-length: %d\r\n\r\n%b" % (len(content), content)
        self.client.send(Stream(number, request, time.monotonic_ns()))
        return number

    def wait(self, count: int, limit_s: float = 10.0) -> list[Any]:
        with gevent.Timeout(limit_s):
            while len(self.records) < count:
                gevent.sleep(0.005)
        return self.records

    def one(self, content: bytes | None = None) -> Any:
        self.send(content or body())
        return self.wait(len(self.records) + 1)[-1]


def truth(url: str, record: Any) -> dict[str, Any]:
    return truth_server.stamps_at(url)[str(record["request_id"])]


def phases(record: Any) -> dict[str, int]:
    return {phase: int(record[f"{phase}_ns"]) for phase in PHASES}


# script, chunks, tokens in the first chunk: 6 tokens, the first at 100 ms, then one every 60 ms (several: two chunks of 3)
SHAPES = {
    "plain": ("plain", 7, 1),
    "empty role delta first": ("role", 8, 1),
    "reasoning before content": ("reasoning", 7, 1),
    "reasoning, the other name": ("reasoning,key=reasoning", 7, 1),
    "tool calls": ("tools", 8, 1),
    "text completion": ("text", 7, 1),
    "several tokens in a chunk": ("several,per=3", 3, 1),
    "several tokens, usage in each": ("several,per=3,continuous=1", 3, 3),
    "a tail before usage and [DONE]": ("plain,tail=300", 7, 1),
    "comment lines": ("ping", 7, 1),
    "CRLF": ("crlf", 7, 1),
    "events split in the key": ("split,at=60", 7, 1),
    "events split after the prefix": ("split,at=3", 7, 1),
    "events split before their end": ("split,at=96", 7, 1),
    "text that quotes the protocol": ("loose", 7, 1),
    "the gateway's report": ("reported", 7, 1),
}


@pytest.fixture(scope="module")
def measured(url: str) -> dict[str, Any]:
    """The record of every shape; they run side by side."""
    callers = {shape: Caller(url, f"{script},ttft=100,gap=60,tokens=6") for shape, (script, _, _) in SHAPES.items()}
    for caller in callers.values():
        caller.send(body())
    return {shape: caller.wait(1)[0] for shape, caller in callers.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_measured_as_the_server_sent_it(url: str, measured: dict[str, Any], shape: str) -> None:
    script, chunks, first_chunk_tokens = SHAPES[shape]
    record = measured[shape]
    sent = truth(url, record)
    assert (record["status"], record["detail"]) == (OK, b"")
    for mark in ("first_token", "last_token", "done"):
        measured = int(record[f"{mark}_at_ns"])
        assert 0 <= measured - sent[mark] < TOLERANCE_NS, mark
    assert record["output_tokens"] == 6
    assert record["prompt_tokens"] == truth_server.TEMPLATE_TOKENS + 3
    assert record["first_chunk_tokens"] == first_chunk_tokens
    assert record["chunks"] == chunks
    gaps = 1 if script.startswith("several") else 5
    longest = int(record["longest_gap_ns"])
    assert abs(longest - (sent["last_token"] - sent["first_token"]) / gaps) < TOLERANCE_NS
    assert record["first_chunk_at_ns"] - sent["received"] < TOLERANCE_NS or script.split(",")[0] not in ("role", "tools")


def test_tokens_that_came_in_one_read_have_no_time_between_them(url: str) -> None:
    record = Caller(url, "flood,batch=6").one()
    assert record["output_tokens"] == record["first_chunk_tokens"] == 6


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("error", ERROR, b"in the stream: engine died"),
        ("nodone", ERROR, b"the stream ended without [DONE]"),
        ("cut", ERROR, b"the connection was closed before the answer was complete"),
        ("plain,status=429,retry=2", LIMITED, b"http 429: refused by script"),
        ("plain,status=503,retry=2", SHED, b"http 503: refused by script"),
        ("plain,status=503", ERROR, b"http 503: refused by script"),
        ("plain,status=500", ERROR, b"http 500: refused by script"),
        ("plain,unary=1", ERROR, b"answered without a stream: application/json"),
    ],
)
def test_what_is_no_answer_says_why(url: str, script: str, status: int, detail: bytes) -> None:
    record = Caller(url, script).one()
    assert (record["status"], record["detail"]) == (status, detail)
    assert record["done_at_ns"] >= record["sent_at_ns"] >= record["scheduled_at_ns"] > 0


def test_a_cut_stream_keeps_what_it_had(url: str) -> None:
    record = Caller(url, "cut,ttft=100,gap=60").one()
    assert abs(record["first_token_at_ns"] - truth(url, record)["first_token"]) < TOLERANCE_NS
    assert record["output_tokens"] == -1  # no usage came: not measured, never 0


def test_the_report_becomes_phases_that_sum_to_the_whole(url: str) -> None:
    record = Caller(url, "reported,ttft=100,gap=60,tokens=6").one()
    found = phases(record)
    assert found["queue"] == found["route"] == 2_000_000
    assert (found["prefill"], found["decode"], found["cold_start"]) == (96_000_000, 290_000_000, -1)
    assert sum(value for value in found.values() if value > 0) == record["done_at_ns"] - record["scheduled_at_ns"]
    assert (record["replica_id"], record["attempts"], record["queue_reason"]) == (3, 1, 1)


def test_a_refusal_takes_its_phases_from_server_timing(url: str) -> None:
    record = Caller(url, "plain,status=429").one()
    found = phases(record)
    assert (found["route"], found["queue"], found["network"]) == (20_000, 50_000, -1)
    assert sum(value for value in found.values() if value > 0) == record["done_at_ns"] - record["scheduled_at_ns"]


def test_nobody_listening_is_an_error_with_its_reason() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections to it are refused
        record = Caller(f"http://127.0.0.1:{taken.getsockname()[1]}", "plain").one()
    assert (record["status"], record["detail"]) == (ERROR, b"no connection: Connection refused")
    assert record["sent_at_ns"] == -1


def test_a_request_that_takes_too_long_is_a_timeout_and_its_connection_is_closed(url: str) -> None:
    caller = Caller(url, "hang")
    caller.send(body())
    gevent.sleep(0.1)
    caller.client.tend(time.monotonic_ns(), timeout_ns=10_000_000_000)
    assert not caller.records
    caller.client.tend(time.monotonic_ns(), timeout_ns=50_000_000)
    assert caller.records[0]["status"] == TIMEOUT
    gevent.sleep(0.05)
    assert not caller.client.inside
    assert not caller.client.idle


def test_an_answer_is_complete_at_done_even_if_the_message_never_ends(url: str) -> None:
    caller = Caller(url, "unclosed,ttft=10,gap=1")
    caller.send(body())
    gevent.sleep(0.3)
    caller.client.tend(time.monotonic_ns(), timeout_ns=100_000_000)
    [record] = caller.records
    assert record["status"] == OK
    assert 0 <= record["done_at_ns"] - truth(url, record)["done"] < TOLERANCE_NS


def test_connections_are_kept_and_used_again(url: str) -> None:
    caller = Caller(url, "plain,ttft=1,gap=1")
    for _ in range(20):
        assert caller.one()["status"] == OK
    assert caller.client.opened == 1


def test_prepared_connections_take_a_burst(url: str) -> None:
    caller = Caller(url, "plain,ttft=20,gap=1")
    caller.client.prepare(30)
    caller.client.prepare(30)  # those on their way count
    gevent.sleep(0.3)
    assert caller.client.opened == len(caller.client.idle) == 30
    for _ in range(30):
        caller.send(body())
    assert {record["status"] for record in caller.wait(30)} == {OK}
    assert caller.client.opened == 30


def test_a_kept_connection_that_the_server_closed_is_not_used_again(url: str) -> None:
    caller = Caller(url, "cut,ttft=1,gap=1")
    caller.client.prepare(1)
    gevent.sleep(0.1)
    assert caller.one()["status"] == ERROR  # the script closes the connection
    gevent.sleep(0.05)
    assert not caller.client.idle
    healthy = Caller(url, "plain,ttft=1,gap=1")
    healthy.client.idle = caller.client.idle
    assert healthy.one()["status"] == OK


def test_connections_unused_for_long_are_closed(url: str) -> None:
    caller = Caller(url, "plain,ttft=1,gap=1")
    caller.one()
    caller.client.tend(time.monotonic_ns() + 3_900_000_000, 10**12)
    assert len(caller.client.idle) == 1
    caller.client.tend(time.monotonic_ns() + 4_100_000_000, 10**12)
    assert not caller.client.idle


def test_a_prompt_larger_than_the_socket_buffer_arrives_whole(url: str) -> None:
    text = "word " * 2_000_000
    record = Caller(url, "plain,ttft=1,gap=1").one(body(messages=[{"role": "user", "content": text}]))
    assert record["status"] == OK
    assert record["prompt_tokens"] == truth_server.TEMPLATE_TOKENS + len(text) // truth_server.BYTES_PER_TOKEN


def test_a_server_that_leaves_in_the_middle_of_a_prompt_is_an_error(url: str) -> None:
    def hang_up(sock: Any, _: Any) -> None:
        sock.recv(1000)
        sock.close()  # with unread bytes: the client's kernel is told to stop, while megabytes wait to be sent

    server = StreamServer(("127.0.0.1", 0), hang_up)
    server.start()
    caller = Caller(f"http://127.0.0.1:{server.server_port}", "x")
    record = caller.one(b"x" * 20_000_000)
    assert record["status"] == ERROR
    assert record["detail"]
    assert not caller.client.idle
    server.stop()
    assert Caller(url, "plain,ttft=1,gap=1").one()["status"] == OK


@pytest.mark.parametrize("host", ["https://example.org", "ftp://x", "http://", "http://no.such.name.invalid"])
def test_an_address_that_cannot_be_sent_to_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="--host"):
        resolve(host)


@pytest.mark.parametrize("host", ["http://127.0.0.1:8000", "127.0.0.1:8000/", "http://127.0.0.1:8000/v1"])
def test_spellings_of_an_address(host: str) -> None:
    assert resolve(host)[1:] == ("", socket.AF_INET, ("127.0.0.1", 8000))
    assert resolve("http://127.0.0.1/base/v1/").base == "/base"


def test_connect_leaves_no_delay_on(url: str) -> None:
    sock = connect(resolve(url))
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    sock.close()

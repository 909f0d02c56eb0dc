"""From bytes to a record, without a socket: streams in any pieces, reports of any content, and where they end up."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen._histogram import FLOOR_NS, LogHistogram
from loadgen._outcomes import Clock, Phases, Spool, conclude, explain, parse_server_timing
from loadgen._sse import Shared, Stream, read_ending
from replay.records import ERROR, OK, OUTCOME_DTYPE, OUTCOME_STRUCT, Outcome
from replay.wire import PhaseReport, encode_report

LINES = [
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b": ping\n\n",
    *[b'data: {"choices":[{"delta":{"content":" tok"}}]}\n\n'] * 4,
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":8}}}\r\n\r\n',
    encode_report(PhaseReport(5, 4, 0, 1, -1, 1, 1, 1, -1, 7, 2, 3)),
    b"data: [DONE]\n\n",
]
TEXT = b"".join(LINES)
FIRST_TOKEN_ENDS = len(b"".join(LINES[:3])) - 1  # the line's end; the blank line after it says nothing
LAST_TOKEN_ENDS = len(b"".join(LINES[:6])) - 1


def read_in(pieces: list[bytes]) -> Stream:
    """A stream read in these pieces, at 1000 ns, 2000 ns, ..."""
    stream, shared = Stream(1, b"", 0), Shared()
    stream.sent_ns, stream.http_status = 500, 200
    for turn, piece in enumerate(pieces, 1):
        stream.feed(piece, turn * 1000, shared)
    stream.done_ns = len(pieces) * 1000
    return stream


def instant_of(offset: int, pieces: list[bytes]) -> int:
    """When the byte before ``offset`` was read."""
    read = 0
    for turn, piece in enumerate(pieces, 1):
        read += len(piece)
        if read >= offset:
            return turn * 1000
    raise AssertionError(offset)


@given(st.lists(st.integers(1, len(TEXT) - 1), unique=True, max_size=40))
def test_however_a_stream_is_cut_into_reads_it_says_the_same(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in itertools.pairwise(edges)]
    record = np.frombuffer(conclude(read_in(pieces), Clock(0, 1), model=b"m").row, OUTCOME_DTYPE)[0]
    assert (record["status"], record["chunks"]) == (OK, 6)
    assert (record["prompt_tokens"], record["output_tokens"], record["cached_tokens"]) == (9, 4, 8)
    assert (record["replica_id"], record["attempts"], record["queue_reason"]) == (7, 2, 3)
    assert record["first_token_at_ns"] == instant_of(FIRST_TOKEN_ENDS, pieces)
    assert record["last_token_at_ns"] == instant_of(LAST_TOKEN_ENDS, pieces)


def test_every_field_of_the_record_is_where_its_name_says() -> None:
    stream = read_in([TEXT[:FIRST_TOKEN_ENDS], TEXT[FIRST_TOKEN_ENDS:LAST_TOKEN_ENDS], TEXT[LAST_TOKEN_ENDS:]])
    stream.request_id, stream.scheduled_ns, stream.sent_ns = 42, 400, 500
    row = conclude(stream, Clock(100, 2), model=b"m", tenant=b"t", session=b"s").row
    assert Outcome(*OUTCOME_STRUCT.unpack(row))._replace(tenant=b"t", model=b"m", session_id=b"s", detail=b"") == Outcome(
        request_id=42, scheduled_at_ns=300, sent_at_ns=400, gateway_at_ns=3, first_chunk_at_ns=900, first_token_at_ns=900,
        last_token_at_ns=1900, done_at_ns=2900, longest_gap_ns=1000, limit_ns=0, queue_ns=1, cold_start_ns=-1, route_ns=1,
        prefill_ns=1, decode_ns=1, retry_ns=-1, network_ns=2496, unexplained_ns=100, chunks=6, prompt_tokens=9, output_tokens=4,
        cached_tokens=8,
        first_chunk_tokens=1, replica_id=7, http_status=200, attempts=2, status=OK, queue_reason=3, tenant=b"t", model=b"m",
        session_id=b"s",
    )  # fmt: skip
    texts = [text.rstrip(b"\0") for text in OUTCOME_STRUCT.unpack(row)[-4:]]
    assert texts == [b"t", b"m", b"s", b""]


def test_the_last_event_may_lack_its_line_end() -> None:
    stream = read_in([TEXT.rstrip()])
    assert conclude(stream, Clock(0, 1), model=b"m").status == OK


@given(st.lists(st.binary(max_size=80), max_size=10), st.sampled_from([b"", TEXT]))
def test_no_bytes_break_the_reading(pieces: list[bytes], before: bytes) -> None:
    stream = read_in([before, *pieces])
    ended = conclude(stream, Clock(0, 1), model=b"m")
    assert len(ended.row) == OUTCOME_STRUCT.size
    assert ended.status in (OK, ERROR)


@given(st.builds(PhaseReport, *[st.integers(-(2**70), 2**70)] * 12))
def test_no_report_breaks_the_row(report: PhaseReport) -> None:
    stream = read_in([TEXT.replace(LINES[7], encode_report(report))])
    assert len(conclude(stream, Clock(0, 1), model=b"m").row) == OUTCOME_STRUCT.size


def test_absurd_usage_is_not_measured() -> None:
    stream = read_in([b'data: {"usage":{"prompt_tokens":99999999999,"completion_tokens":3}}\n\ndata: [DONE]\n\n'])
    ended = conclude(stream, Clock(0, 1), model=b"m")
    assert (ended.prompt_tokens, ended.output_tokens) == (-1, 3)


def test_an_error_event_is_found_wherever_its_key_stands() -> None:
    assert read_ending(b'data: {"error":{"message":"a\\nb"}}\n\n').error == "a b"
    assert read_ending(b'event: error\ndata: {"oops":1}\n\n').error
    assert not read_ending(b'data: {"choices":[{"delta":{"content":"\\"error\\":{"}}],"error":null}\n\n').error


spans = st.integers(-1, 10**12)


@given(st.builds(PhaseReport, *[spans] * 12), st.integers(0, 10**9), st.integers(0, 10**10), st.integers(0, 10**13))
def test_phases_sum_to_the_whole_and_none_is_negative(report: PhaseReport, late: int, to_send: int, whole: int) -> None:
    scheduled = 1000
    sent = scheduled + late
    done = sent + to_send + whole
    phases = explain(report, scheduled_ns=scheduled, sent_ns=sent, done_ns=done)
    known = [value for value in phases if value != -1]
    assert all(value >= 0 for value in known)
    if known:
        assert sum(known) == done - scheduled
    else:  # it claims more time than passed
        assert sum(max(v, 0) for v in report[2:9]) > done - scheduled


def test_lateness_of_the_sender_is_unexplained_not_network() -> None:
    report = PhaseReport(1, 70, 0, 20, -1, 10, 30, 10, -1, 0, 1, 0)
    phases = explain(report, scheduled_ns=0, sent_ns=50, done_ns=130)
    assert (phases.network_ns, phases.unexplained_ns) == (10, 50)
    assert explain(None, scheduled_ns=0, sent_ns=50, done_ns=130) == Phases()


@given(st.binary(max_size=100))
def test_any_server_timing_is_survived(value: bytes) -> None:
    parse_server_timing(value)
    parse_server_timing(b"gateway;dur=" + value)


def test_foreign_server_timing_is_no_report() -> None:
    assert parse_server_timing(b"cdn-cache;desc=MISS, origin;dur=12") is None


@given(st.lists(st.integers(FLOOR_NS, 600 * 10**9), min_size=1, max_size=200), st.floats(0.01, 1))
def test_histogram_quantiles_are_within_a_bucket_of_the_truth(values: list[int], share: float) -> None:
    halves = LogHistogram(), LogHistogram()
    for index, value in enumerate(values):
        halves[index % 2].add(value)
    halves[0].merge(halves[1].counts)
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    found = halves[0].quantile_ns(share)
    assert found is not None
    assert true / 1.05 <= found <= true * 1.05
    edges = halves[0].as_json()["edges_s"]
    assert len(edges) == len(halves[0].counts) + 1
    assert sorted(edges) == edges


def test_a_bucket_lies_between_its_edges() -> None:
    for value in (1, FLOOR_NS, 10**6, 10**9, 599 * 10**9):
        histogram = LogHistogram()
        histogram.add(value)
        edges, at = histogram.as_json()["edges_s"], histogram.counts.index(1)
        assert edges[at] <= value / 1e9 * 1.0000001
        assert value / 1e9 <= edges[at + 1]


def test_a_full_disk_stops_the_spool_and_keeps_what_was_written(tmp_path: Path) -> None:
    whole = Spool(tmp_path / "w.outcomes")
    whole.append(OUTCOME_STRUCT.pack(*Outcome(7)))
    assert whole.flush()
    assert whole.rows_written == 1
    assert (tmp_path / "w.outcomes").stat().st_size == OUTCOME_STRUCT.size
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    full = Spool(Path("/dev/full"))
    full.append(b"x" * 10)
    assert not full.flush()
    assert full.failure is not None
    full.append(b"x")
    assert not full.flush()
    assert full.rows_written == 0
    full.close()

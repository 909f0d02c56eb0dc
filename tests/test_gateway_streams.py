"""What happens to a stream's bytes on their way: whatever the cuts, nothing is lost, and only the usage chunk is taken out."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from replay.sse import TokenFinder, Usage, last_usage, stream_error, usage_of
from stack.streams import HELD_MAX, Relay
from tests.gateway_rig import DONE, event, usage_event

NULL_USAGE = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"x"}}],"usage":null}\n\n'
CHUNK_WITH_USAGE = event("last", usage={"prompt_tokens": 1, "completion_tokens": 1})
QUOTING = event('"usage":{"choices":[]} data: [DONE]\n\n')
PLAIN = [event(""), event("Hello"), NULL_USAGE, CHUNK_WITH_USAGE, QUOTING, b": ping\n\n", b"event: x\ndata: {}\n\n"]

streams = st.lists(st.sampled_from([*PLAIN, usage_event()]), max_size=8)
endings = st.sampled_from([DONE, b"", b"data: [DONE]", event("cut off")[:-2]])


def cut_at(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def relayed(pieces: list[bytes], *, strip_usage: bool) -> tuple[bytes, Relay]:
    relay = Relay(strip_usage=strip_usage)
    out = b"".join(relay.feed(piece, last=place == len(pieces) - 1) for place, piece in enumerate(pieces))
    return out, relay


@settings(max_examples=300)
@given(events=streams, ending=endings, cuts=st.lists(st.integers(0, 1500), max_size=20), crlf=st.booleans())
def test_only_the_usage_chunk_is_taken_out(events: list[bytes], ending: bytes, cuts: list[int], crlf: bool) -> None:
    def line_ends(data: bytes) -> bytes:
        return data.replace(b"\n", b"\r\n") if crlf else data

    raw = line_ends(b"".join(events) + ending)
    wanted = line_ends(b"".join(one for one in events if one != usage_event()) + ending)
    out, relay = relayed(cut_at(raw, cuts), strip_usage=True)
    assert out == wanted
    assert relay.done == ending.startswith(b"data: [DONE]")


@given(events=streams, ending=endings, cuts=st.lists(st.integers(0, 1500), max_size=20))
def test_without_stripping_nothing_changes(events: list[bytes], ending: bytes, cuts: list[int]) -> None:
    raw = b"".join(events) + ending
    out, relay = relayed(cut_at(raw, cuts), strip_usage=False)
    assert out == raw
    assert relay.done == ending.startswith(b"data: [DONE]")
    assert last_usage(relay.kept) == (
        Usage(9, 2) if usage_event() in events and CHUNK_WITH_USAGE not in events else last_usage(raw)
    )


def test_every_byte_position() -> None:
    raw = event("") + event("Hello") + usage_event() + DONE
    for place in range(len(raw) + 1):
        out, relay = relayed([raw[:place], raw[place:]], strip_usage=True)
        assert out == event("") + event("Hello") + DONE
        assert (relay.done, last_usage(relay.kept)) == (True, Usage(9, 2))
        assert relay.feed(b"") == b""


def test_done_is_a_line_of_its_own_not_text_that_says_so() -> None:
    relay = Relay(strip_usage=False)
    assert relay.feed(QUOTING) == QUOTING
    assert (relay.done, relay.done_at) == (False, -1)
    both = event("x") + DONE
    assert relay.feed(both) == both
    assert both[relay.done_at :] == DONE


def test_half_a_line_waits_and_an_endless_one_does_not() -> None:
    relay = Relay(strip_usage=False)
    assert relay.feed(b"data: {") == b""
    assert relay.feed(b"}\n\ndata") == b"data: {}\n\n"
    assert relay.feed(b"x" * (HELD_MAX + 1)) == b"data" + b"x" * (HELD_MAX + 1)


def test_tokens_are_found_by_any_spelling_and_not_in_text() -> None:
    finder = TokenFinder()
    for data in (
        event("a"),
        b'data: {"choices":[{"delta":{"reasoning_content" : "hm"}}]}\n\n',
        b'data: {"choices":[{"delta":{"reasoning":"hm"}}]}\n\n',
        b'data: {"choices":[{"text":"a"}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}\n\n',
        event("") + event("b"),
    ):
        assert finder.find(data) >= 0, data
    for data in (
        event(""),
        usage_event(),
        b'data: {"choices":[{"delta":{"content":null}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[]}}]}\n\n',
        b'data: {"id":"\\"content\\":\\"x\\""}\n\n',
        DONE,
    ):
        assert finder.find(data) == -1, data


@given(st.binary(max_size=400), st.sampled_from([b'"usage"', b'_tokens"', b'data: {"error":{', b""]))
def test_garbage_is_never_more_than_not_said(garbage: bytes, bait: bytes) -> None:
    for text in (garbage + bait, bait + garbage):
        last_usage(text)
        stream_error(text)
        usage_of(text)
        relayed(cut_at(text, [3, 50]), strip_usage=True)


def test_errors_are_read_in_their_shapes() -> None:
    assert stream_error(event("x") + event(error={"message": "out of\nmemory"})) == "out of memory"
    assert stream_error(b"event: error\ndata: boom\n\n") != ""
    assert stream_error(event(json.dumps({"error": {"message": "quoted"}}))) == ""
    assert usage_of(b'{"usage":{"prompt_tokens":7,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":5}}}') == Usage(
        7, 1, 5
    )

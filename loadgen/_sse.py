"""What one streamed answer says, read from bytes: the first token, the last, the end. Pure: bytes and stamps in, fields out.

Nothing is decoded while the stream runs: a byte search finds the first non-empty delta, chunks are counted, and the last
few kB are kept, from which usage, errors, the phase report and [DONE] are read once, at the end.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import msgspec

from loadgen._outcomes import LogHistogram
from replay.wire import COMMENT_PREFIX, PhaseReport, decode_report

# A delta that carries a token. Inside a JSON string every quote is escaped, so text that quotes the protocol cannot match:
# `\"content\":` holds `"content\`, never `"content"`. Hence also `"content":""` (the role delta) is no token.
TOKEN: Final = re.compile(
    rb'"(?:content|reasoning_content|reasoning|text)"\s*:\s*"(?!")|"tool_calls"\s*:\s*\[\s*(?!\])'
)
CONTINUOUS_USAGE: Final = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
_ERROR: Final = re.compile(rb'"error"\s*:\s*[{"]')

# Kept of the end of a stream: a usage chunk is below 1 kB, llama.cpp's timings too, the phase report below 0.3 kB.
KEPT_BYTES: Final = 4096


class Stream:
    """One request and what came back. Instants are CLOCK_MONOTONIC ns, -1 where nothing was seen."""

    __slots__ = (
        "cause", "chunks", "connection", "content_type", "done_ns", "end_ns", "first_chunk_ns", "first_chunk_tokens",
        "first_token_ns", "http_status", "last_token_ns", "longest_gap_ns", "outcome", "replica", "request", "request_id",
        "retry_after", "scheduled_ns", "sent_ns", "server_timing", "tail", "tail_kept",
    )  # fmt: skip

    def __init__(self, request_id: int, request: bytes, scheduled_ns: int) -> None:
        self.request_id, self.request, self.scheduled_ns = request_id, request, scheduled_ns
        self.sent_ns = self.first_chunk_ns = self.first_token_ns = self.last_token_ns = self.end_ns = self.done_ns = -1
        self.longest_gap_ns = self.first_chunk_tokens = self.http_status = -1
        self.chunks = 0
        self.tail = self.tail_kept = b""
        self.content_type = self.server_timing = self.retry_after = self.replica = b""
        self.outcome = -1  # a status decided from outside (timeout, cancelled, error), before what the stream says
        self.cause = ""
        self.connection: object | None = None

    def feed(self, data: bytes, now_ns: int, shared: Shared) -> None:
        """What one read brought, in whole lines; the rest of a line waits in ``tail`` for the next read."""
        if self.first_chunk_ns < 0:
            self.first_chunk_ns = now_ns
        if self.tail:
            data, self.tail = self.tail + data, b""
        if (cut := data.rfind(b"\n") + 1) != len(data):
            self.tail, data = data[cut:], data[:cut]
            if not data:
                return
        chunks = data.count(b"\ndata:") + data.startswith(b"data:")
        self.chunks += chunks
        if (at := find_token(data, shared)) >= 0:
            if self.first_token_ns < 0:
                self.first_token_ns = now_ns
                self.first_chunk_tokens = tokens_of_line(data, at)
            else:
                gap = now_ns - self.last_token_ns
                shared.gaps.add(gap)
                if gap > self.longest_gap_ns:
                    self.longest_gap_ns = gap
            if chunks > 1:
                shared.gaps.counts[0] += chunks - 1  # read together: no gap between them that a client could see
            self.last_token_ns = now_ns
        if b"[DONE]" in data[-24:]:
            self.end_ns = now_ns
        self.tail_kept = (self.tail_kept + data)[-KEPT_BYTES:]

    def keep(self, data: bytes) -> None:
        """The body of an answer that is no stream: only the beginning, for the error it may name."""
        if len(self.tail_kept) < KEPT_BYTES:
            self.tail_kept += data[:KEPT_BYTES]


class Shared:
    """What the streams of one sender share: the histogram of gaps, and how this server spells a token's key."""

    __slots__ = ("gaps", "spelling")

    def __init__(self) -> None:
        self.gaps = LogHistogram()
        self.spelling = b'"content":"'


def find_token(data: bytes, shared: Shared) -> int:
    """Where the first non-empty delta of these lines starts, or -1.

    One server spells its keys one way, so a plain search for the spelling seen last is tried before the pattern (0.1 against 1 us).
    """
    at = data.find(shared.spelling)
    if at >= 0 and data[at + len(shared.spelling)] != 0x22:
        return at
    match = TOKEN.search(data)
    if match is None:
        return -1
    if match[0].endswith(b'"'):
        shared.spelling = match[0]
    return match.start()


def tokens_of_line(data: bytes, at: int) -> int:
    """Tokens in the chunk around ``at``: what its continuous usage says, else 1."""
    start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
    match = CONTINUOUS_USAGE.search(data, start, end)
    return max(1, int(match[1])) if match else 1


class Ending(NamedTuple):
    """What the last lines of a stream said. -1: not said."""

    done: bool
    error: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    report: PhaseReport | None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


class _Error(msgspec.Struct):
    message: str = ""


_EVENT: Final = msgspec.json.Decoder(_Event)


def read_ending(kept: bytes) -> Ending:
    """Usage, error, phase report and [DONE] out of the last lines of a stream; malformed JSON counts as not said.

    >>> read_ending(b'data: {"usage":{"prompt_tokens":9,"completion_tokens":2}}\\n\\ndata: [DONE]\\n\\n')[:5]
    (True, '', 9, 2, -1)
    """
    prompt = output = cached = -1
    if (usage := _usage(kept)) is not None:
        prompt, output, cached = (
            -1 if n is None else n
            for n in (usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens)
        )  # fmt: skip
    report = None
    if (at := kept.rfind(COMMENT_PREFIX)) >= 0:
        report = decode_report(kept[at : kept.find(b"\n", at)])
    return Ending(_is_done(kept), _error(kept), prompt, output, cached, report)


def _is_done(kept: bytes) -> bool:
    at = kept.rfind(b"[DONE]")
    return at >= 0 and kept[kept.rfind(b"\n", 0, at) + 1 : at].rstrip() == b"data:"


def _error(kept: bytes) -> str:
    """What an error object inside the stream says; "" where there is none. The plain search first: it is 20 times as fast."""
    match = _ERROR.search(kept) if b'"error"' in kept else None
    if match is None:
        return ""
    line = _line(kept, match.start())
    return error_message(line) or line.decode("utf-8", "replace")


def _usage(kept: bytes) -> _Usage | None:
    at = kept.rfind(b'_tokens"')
    event = _decode(_line(kept, at)) if at >= 0 else None
    return event.usage if event else None


def _line(data: bytes, at: int) -> bytes:
    """The line around ``at``, without ``data:``."""
    end = data.find(b"\n", at)
    return data[data.rfind(b"\n", 0, at) + 1 : end if end >= 0 else None].removeprefix(b"data:").strip()


def _decode(line: bytes) -> _Event | None:
    try:
        return _EVENT.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def error_message(body: bytes) -> str:
    """The message of an OpenAI-shaped error object, in one line; "" where there is none."""
    event = _decode(body)
    if event is None or event.error == b"null":
        return ""
    try:
        found = msgspec.json.decode(event.error, type=_Error | str)
    except msgspec.DecodeError:
        return bytes(event.error).decode("utf-8", "replace")
    return " ".join((found if isinstance(found, str) else found.message).split())

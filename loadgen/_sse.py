"""What one streamed answer says, read from bytes: the first token, the last, the end. Pure: bytes and stamps in, fields out.

Nothing is decoded while the stream runs: a byte search finds the first non-empty delta, chunks are counted, and the last
few kB are kept, from which usage, errors, the phase report and [DONE] are read once, at the end.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from loadgen._histogram import LogHistogram
from replay.sse import DONE, KEPT_BYTES, TokenFinder, Usage, last_usage, stream_error
from replay.wire import COMMENT_PREFIX, PhaseReport, decode_report

FLOOD_CHUNKS: Final = 16
_CONTINUOUS_USAGE: Final = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')


class Stream:
    """One request and what came back. Instants are CLOCK_MONOTONIC ns, -1 where nothing was seen."""

    __slots__ = (
        "cause", "chunks", "connection", "content_type", "done_ns", "end_ns", "first_chunk_ns", "first_chunk_tokens",
        "first_token_ns", "http_status", "last_token_ns", "longest_gap_ns", "outcome", "replica", "request", "request_id",
        "retry_after", "row", "scheduled_ns", "sent_ns", "server_timing", "tail", "tail_kept",
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
        self.row: Any = None  # the sender's own note of what the plan says of it

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
        if b"[DONE]" in data[-24:]:
            self.end_ns = now_ns
        if (at := shared.finder.find(data)) >= 0:
            if self.first_token_ns < 0:
                self.first_token_ns = now_ns
                self.first_chunk_tokens = tokens_of_line(data, at)
            else:
                gap = now_ns - self.last_token_ns
                shared.gaps.add(gap)
                if gap > self.longest_gap_ns:
                    self.longest_gap_ns = gap
            if chunks > 1:
                shared.add_together(data, chunks)
            self.last_token_ns = now_ns
        self.tail_kept = (data if len(data) >= KEPT_BYTES else self.tail_kept + data)[-KEPT_BYTES:]

    def keep(self, data: bytes) -> None:
        """The body of an answer that is no stream: only the beginning, for the error it may name."""
        if len(self.tail_kept) < KEPT_BYTES:
            self.tail_kept += data[:KEPT_BYTES]


class Shared:
    """What the streams of one sender share: the histogram of gaps, and how this server spells a token's key."""

    __slots__ = ("finder", "gaps")

    def __init__(self) -> None:
        self.gaps = LogHistogram()
        self.finder = TokenFinder()

    def add_together(self, data: bytes, chunks: int) -> None:
        """Tokens that came in one read have no gap between them that a client could see.

        Chunks without a token (role, usage, [DONE]) do not count; in a flood they do not matter, and looking twice would.
        """
        if chunks < FLOOD_CHUNKS:
            key = self.finder.spelling
            chunks = data.count(key) - data.count(key + b'"')  # with an empty value it is no token
        self.gaps.counts[0] += max(0, chunks - 1)


def tokens_of_line(data: bytes, at: int) -> int:
    """Tokens in the chunk around ``at``: what its continuous usage says, else 1."""
    start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
    match = _CONTINUOUS_USAGE.search(data, start, end)
    return max(1, int(match[1])) if match else 1


class Ending(NamedTuple):
    """What the last lines of a stream said."""

    done: bool
    error: str
    usage: Usage
    report: PhaseReport | None


def read_ending(kept: bytes) -> Ending:
    """Usage, error, phase report and [DONE] out of the last lines of a stream; malformed JSON counts as not said.

    >>> read_ending(b'data: {"usage":{"prompt_tokens":9,"completion_tokens":2}}\\n\\ndata: [DONE]\\n\\n')[:3]
    (True, '', Usage(prompt_tokens=9, output_tokens=2, cached_tokens=-1))
    """
    report = None
    if (at := kept.rfind(COMMENT_PREFIX)) >= 0:
        report = decode_report(kept[at : kept.find(b"\n", at)])
    error = stream_error(kept) if b"error" in kept else ""  # the plain search first: it is 20 times as fast
    return Ending(DONE.search(kept, max(0, kept.rfind(b"[DONE]") - 8)) is not None, error, last_usage(kept), report)

"""What the bytes of an OpenAI answer say: a token, the usage, an error, the end. Pure: whole lines in, facts out.

Gateway and load generator both read with this, so they cannot disagree on what a first token is. Nothing is decoded while a
stream runs: a byte search finds the deltas; usage and errors are read once, at the end, from the last lines.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import msgspec

# A delta that carries a token. Inside a JSON string every quote is escaped, so text that quotes the protocol cannot match:
# `\"content\":` holds `"content\`, never `"content"`. Hence also `"content":""` (the role delta) is no token.
TOKEN: Final = re.compile(
    rb'"(?:content|reasoning_content|reasoning|text)"\s*:\s*"(?!")|"tool_calls"\s*:\s*\[\s*(?!\])'
)  # fmt: skip
DONE: Final = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)
_ERROR: Final = re.compile(rb'^data: ?\{\s*"error"\s*:\s*[{"]|^event: ?error', re.MULTILINE)

# Kept of the end of a stream: a usage chunk is below 1 kB, llama.cpp's timings too, the phase report below 0.3 kB.
KEPT_BYTES: Final = 4096


class TokenFinder:
    """Where the first non-empty delta of some lines starts. One server spells its keys one way, so a plain search for the
    spelling seen last comes before the pattern (0.1 us against 0.8)."""

    __slots__ = ("spelling",)

    def __init__(self) -> None:
        self.spelling = b'"content":"'

    def find(self, data: bytes) -> int:
        """Its place, or -1."""
        at = data.find(self.spelling)
        if at >= 0 and data[at + len(self.spelling)] != 0x22:
            return at
        match = TOKEN.search(data)
        if match is None:
            return -1
        if match[0].endswith(b'"'):
            self.spelling = match[0]
        return match.start()


class Usage(NamedTuple):
    """Tokens as the engine counted them. -1: not said."""

    prompt_tokens: int = -1
    output_tokens: int = -1
    cached_tokens: int = -1


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


def _decode(text: bytes) -> _Event | None:
    try:
        return _EVENT.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def line_around(data: bytes, at: int) -> bytes:
    """The line around ``at``, without ``data:``."""
    end = data.find(b"\n", at)
    return data[data.rfind(b"\n", 0, at) + 1 : end if end >= 0 else None].removeprefix(b"data:").strip()


def usage_of(text: bytes) -> Usage:
    """The usage in one JSON answer or event.

    >>> usage_of(b'{"usage":{"prompt_tokens":9,"completion_tokens":2}}')
    Usage(prompt_tokens=9, output_tokens=2, cached_tokens=-1)
    """
    event = _decode(text)
    if event is None or event.usage is None:
        return Usage()
    found, details = event.usage, event.usage.prompt_tokens_details
    counts = (found.prompt_tokens, found.completion_tokens, details.cached_tokens if details else None)
    return Usage(*(-1 if count is None else count for count in counts))


def last_usage(lines: bytes) -> Usage:
    """The usage in the last event that has one (engines may repeat it in every chunk)."""
    at = lines.rfind(b'_tokens"')
    return usage_of(line_around(lines, at)) if at >= 0 else Usage()


def error_message(text: bytes) -> str:
    """The message of an OpenAI-shaped error object, in one line; "" where there is none."""
    event = _decode(text)
    if event is None or bytes(event.error) == b"null":
        return ""
    try:
        found = msgspec.json.decode(event.error, type=_Error | str)
    except msgspec.DecodeError:
        return bytes(event.error).decode("utf-8", "replace")
    return " ".join((found if isinstance(found, str) else found.message).split())


def stream_error(lines: bytes) -> str:
    """The error that the last lines of a stream report instead of an answer, or ""."""
    match = _ERROR.search(lines)
    if match is None:
        return ""
    line = line_around(lines, match.start())
    return error_message(line) or line.decode("utf-8", "replace")

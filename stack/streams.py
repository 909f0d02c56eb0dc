"""What the gateway does to the bytes of a stream on their way: nothing, but for whole lines, a usage chunk that the client did
not ask for, and the place of ``[DONE]``. Pure: bytes in, bytes out.
"""

from __future__ import annotations

import re
from typing import Final

from replay.sse import DONE, KEPT_BYTES

HELD_MAX: Final = 1 << 20  # a line or an event above this is no stream of tokens: it goes on in pieces
_USAGE_ONLY: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n")


class Relay:
    """One stream. ``feed`` returns what may be forwarded now: whole lines, so that no search ever meets half a token.

    With ``strip_usage`` it is whole events, less those that carry nothing but usage.
    ``kept`` are the last bytes, as they came; ``done_at`` is where ``[DONE]`` starts in what was returned last, else -1.
    """

    __slots__ = ("_held", "_strip_usage", "done", "done_at", "kept")

    def __init__(self, *, strip_usage: bool) -> None:
        self._strip_usage = strip_usage
        self._held = self.kept = b""
        self.done, self.done_at = False, -1

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """``data`` as it was read; with ``last`` nothing is held back any more."""
        self.done_at = -1
        if self._held:
            data, self._held = self._held + data, b""
        cut = _last_event_end(data) if self._strip_usage else data.rfind(b"\n") + 1
        if cut != len(data) and not last:
            if cut == 0 and len(data) > HELD_MAX:
                return data
            self._held, data = data[cut:], data[:cut]
        if not data:
            return data
        self.kept = data[-KEPT_BYTES:] if len(data) >= KEPT_BYTES else (self.kept + data)[-KEPT_BYTES:]
        if self._strip_usage and b'"usage"' in data and _USAGE_ONLY.search(data):
            data = _without_usage(data)
        if b"[DONE]" in data and (match := DONE.search(data)):
            self.done, self.done_at = True, match.start()
        return data


def _last_event_end(data: bytes) -> int:
    """Just after the last blank line; lines may end in LF or CRLF."""
    return max(data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0, data.rfind(b"\n\r\n") + 3 if b"\n\r\n" in data else 0)


def _without_usage(events: bytes) -> bytes:
    """Whole events less those with usage and no choices."""
    kept, start = [], 0
    for end in [*(match.end() for match in _EVENT_END.finditer(events)), len(events)]:
        event = events[start:end]
        if not (b'"usage"' in event and _USAGE_ONLY.search(event)):
            kept.append(event)
        start = end
    return b"".join(kept)

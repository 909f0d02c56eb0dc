"""When each request is due, and which worker sends it.

Open loop: a request is due when it was recorded, however slow the fleet is. The one exception is a conversation: a turn
contains the answer before it, so it waits for that turn to end and, where the trace knows it, for the time its user thought.

May live here: due times, shares of workers, how a duration is written. No clock: the caller says when a turn ended.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from replay.errors import InputError

_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h|d)")


def parse_duration_s(text: str | float, where: str = "") -> float:
    """Seconds of a duration as command line, YAML and load generator write it; a bare number is seconds.

    ``where`` names the option or key in the error. Raises InputError for anything else, negative durations included.

    >>> [parse_duration_s(text) for text in ("90s", "5m", "1h30m", "250ms", "90", 1.5)]
    [90.0, 300.0, 5400.0, 0.25, 90.0, 1.5]
    """
    written = str(text).strip()
    with_unit = written + "s" if written[-1:].isdigit() or written[-1:] == "." else written
    parts = _PART.findall(with_unit)
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        seconds = float(text)
    elif parts and "".join(map("".join, parts)) == with_unit:
        seconds = math.fsum(float(number) * _SECONDS[unit] for number, unit in parts)
    else:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(
            f"{text!r} is no duration", where=where, rule="a number and a unit, not negative", fix="90s, 5m, 1h30m or 250ms"
        )
    return seconds


def session_codes(plan: pa.Table) -> npt.NDArray[np.int64]:
    """A number per row, the same for rows of one session and -1 for a row without one; sessions count from 0."""
    encoded = plan["session_id"].combine_chunks().dictionary_encode()
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


class Schedule:
    """Due times of a plan: ``initial`` gives every request that waits for nobody, ``after`` the turn a finished one released."""

    def __init__(self, plan: pa.Table) -> None:
        """``plan``: the trace columns, sorted by arrival_at_ns; request_id need not be the row number (a worker's share)."""
        self._due_at_ns, self._ids = plan["arrival_at_ns"].to_pylist(), plan["request_id"].to_pylist()
        order, follows = _turn_order(plan)
        think_ns = plan["think_ns"].to_pylist()
        self._waits = np.zeros(len(plan), dtype=bool)
        self._next: dict[int, tuple[int, int, int]] = {}  # request -> recorded arrival, think time and id of the next turn
        for at in np.flatnonzero(follows).tolist():
            before, row = int(order[at - 1]), int(order[at])
            self._waits[row] = True
            self._next[self._ids[before]] = (self._due_at_ns[row], think_ns[row] or 0, self._ids[row])

    def initial(self) -> Iterator[tuple[int, int]]:
        """(due_at_ns, request_id) of lone requests and first turns, in order of their due time."""
        for row in np.flatnonzero(~self._waits).tolist():
            yield self._due_at_ns[row], self._ids[row]

    def after(self, request_id: int, ended_at_ns: int) -> tuple[int, int] | None:
        """(due_at_ns, request_id) of the turn that waited for this one, however it ended; None where none did.

        A turn is due at its recorded time, or later where the previous turn ended, and its user had thought, only then.
        """
        released = self._next.pop(request_id, None)
        if released is None:
            return None
        recorded_at_ns, think_ns, following = released
        return max(recorded_at_ns, ended_at_ns + think_ns), following

    @property
    def waiting(self) -> int:
        """Turns that no ``after`` has released yet."""
        return len(self._next)


def _turn_order(plan: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Rows by session, turn and arrival, and for each place in that order whether it follows the one before it in a session."""
    sessions = session_codes(plan)
    turns = plan["turn"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False)
    order = np.lexsort((np.arange(len(plan)), turns, sessions)).astype(np.int64)
    sorted_sessions = sessions[order]
    follows = np.zeros(len(plan), dtype=bool)
    follows[1:] = (sorted_sessions[1:] == sorted_sessions[:-1]) & (sorted_sessions[1:] >= 0)
    return order, follows


def shard(plan: pa.Table, worker: int, workers: int) -> pa.Table:
    """The rows that worker ``worker`` of ``workers`` sends: by hash, so workers need no word with each other.

    Turns of one session stay with one worker, since they wait for each other. request_id keeps its number of the whole plan.
    """
    if not 0 <= worker < workers:
        raise InputError(f"worker {worker} of {workers}", rule="workers are numbered from 0")
    return plan if workers == 1 else plan.filter(pa.array(_owners(plan, workers) == worker))


def _owners(plan: pa.Table, workers: int) -> npt.NDArray[Any]:
    """The worker of each row."""
    sessions = plan["session_id"].combine_chunks().dictionary_encode()
    codes = session_codes(plan)
    owners = np.empty(len(plan), dtype=np.int64)
    lone = np.flatnonzero(codes < 0)
    ids = plan["request_id"].to_numpy()[lone].tolist()
    owners[lone] = [xxhash.xxh3_64_intdigest(b"%d" % request_id) % workers for request_id in ids]
    by_code = [xxhash.xxh3_64_intdigest(name.encode()) % workers for name in sessions.dictionary.to_pylist()]
    owners[codes >= 0] = np.array(by_code, dtype=np.int64)[codes[codes >= 0]]
    return owners

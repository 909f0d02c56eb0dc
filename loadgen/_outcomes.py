"""One row a request: fixed-size records to the spool, and the histograms that outlive single requests.

The sender only appends bytes; the recorder, a process of its own, makes Parquet parts, spans and metrics from them.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final, NamedTuple

from replay.records import PHASES
from replay.wire import PhaseReport

FLOOR_NS: Final = 10_000  # 10 us: below it a client sees the grain of its own event loop
GROWTH: Final = 1.05
CEILING_NS: Final = 600_000_000_000
_SCALE: Final = 1 / math.log(GROWTH)
_LAST: Final = math.ceil(math.log(CEILING_NS / FLOOR_NS) * _SCALE)


class LogHistogram:
    """Counts in buckets 5 % wide from 10 us to 600 s; bucket 0 is everything below, the last everything above.

    Quantiles are the geometric middle of their bucket: at most 2.5 % off.
    """

    __slots__ = ("counts",)

    def __init__(self, counts: list[int] | None = None) -> None:
        self.counts = counts or [0] * (_LAST + 1)

    def add(self, value_ns: int) -> None:
        if value_ns < FLOOR_NS:
            self.counts[0] += 1
        else:
            self.counts[min(int(math.log(value_ns / FLOOR_NS) * _SCALE) + 1, _LAST)] += 1

    def merge(self, counts: list[int]) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]

    def quantile_ns(self, share: float) -> float | None:
        """The value below which ``share`` of what was added lies; None where nothing was."""
        rank, seen = share * sum(self.counts), 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return FLOOR_NS / 2 if index == 0 else FLOOR_NS * GROWTH ** (index - 0.5)
        return None

    def as_json(self) -> dict[str, list[float] | list[int]]:
        """``counts[i]`` lies between ``edges_s[i]`` and ``edges_s[i + 1]``."""
        return {"edges_s": [0.0, *(FLOOR_NS * GROWTH**i / 1e9 for i in range(_LAST + 1))], "counts": self.counts}


class Phases(NamedTuple):
    """The phases of a row in the order of ``records.PHASES``; -1 is not measured."""

    limit_ns: int = -1
    queue_ns: int = -1
    cold_start_ns: int = -1
    route_ns: int = -1
    adapter_load_ns: int = -1
    kv_transfer_ns: int = -1
    prefill_ns: int = -1
    decode_ns: int = -1
    retry_ns: int = -1
    network_ns: int = -1
    unexplained_ns: int = -1


assert Phases._fields == tuple(f"{phase}_ns" for phase in PHASES)


def explain(report: PhaseReport | None, *, scheduled_ns: int, sent_ns: int, done_ns: int) -> Phases:
    """Where the time went: the gateway's phases, the network's share (what the client saw beyond the gateway), and the rest.

    They sum to ``done_ns - scheduled_ns`` and none is negative; a sender's lateness lands in ``unexplained``. A report that
    claims more time than passed is not believed: all phases stay null.
    """
    if report is None or sent_ns < 0:
        return Phases()
    own = {name: getattr(report, name) for name in Phases._fields if hasattr(report, name)}
    known = sum(value for value in own.values() if value > 0)
    whole = done_ns - scheduled_ns
    if known > whole:
        return Phases()
    network = -1 if report.total_ns < 0 else min(max(0, done_ns - sent_ns - report.total_ns), whole - known)
    return Phases(**own, network_ns=network, unexplained_ns=whole - known - max(network, 0))


def parse_server_timing(value: bytes) -> PhaseReport | None:
    """What an answer's Server-Timing knows, where no phase report came (an answer that is no stream, or a cut one).

    It left with the headers: ``gateway`` is limit and route together and is taken as route, the total is not known.

    >>> parse_server_timing(b"gateway;dur=1.5, queue;dur=4, db;dur=9").queue_ns
    4000000
    """
    found: dict[str, int] = {}
    for part in value.decode("latin-1").split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        for parameter in parameters:
            key, _, number = parameter.partition("=")
            try:
                milliseconds = float(number.strip('"')) if key.strip() == "dur" else -1.0
            except ValueError:
                continue
            if 0 <= milliseconds < 1e9:
                found[name] = round(milliseconds * 1e6)
    if "gateway" not in found and "queue" not in found:
        return None
    get = found.get
    return PhaseReport(
        gateway_at_unix_ns=-1, total_ns=-1, limit_ns=-1, queue_ns=get("queue", -1), cold_start_ns=get("cold_start", -1),
        route_ns=get("gateway", -1), prefill_ns=-1, decode_ns=-1, retry_ns=get("retry", -1), replica_id=-1, attempts=-1,
        queue_reason=-1,
    )  # fmt: skip


class Spool:
    """Append-only file of fixed-size records, written in batches. A failed write (a full disk) is kept in ``failure``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._rows: list[bytes] = []
        self.rows_written = 0
        self.failure: OSError | None = None

    def append(self, row: bytes) -> None:
        self._rows.append(row)

    def flush(self) -> bool:
        """Hand what has gathered to the kernel; False where that failed, and from then on. Rows already written stay."""
        if self.failure:
            return False
        rows, self._rows = self._rows, []
        left = memoryview(b"".join(rows))
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            self.failure = error
            return False
        self.rows_written += len(rows)
        return True

    def close(self) -> None:
        self.flush()
        os.close(self._file)

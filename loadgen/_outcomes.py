"""One row a request: what became of it, as a fixed-size record, and the spool that takes them.

The sender only appends bytes; the recorder, a process of its own, makes Parquet parts, spans and metrics from them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from loadgen._sse import Ending, Stream, read_ending
from replay.records import ERROR, LIMITED, OK, OUTCOME_STRUCT, PHASES, QUEUE_REASONS, SHED
from replay.sse import error_message
from replay.wire import PhaseReport

INT32: Final = 2**31


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


def plausible(report: PhaseReport) -> bool:
    """Whether every number fits its field of the record: a gateway's mistake must not cost the row."""
    return (
        all(-1 <= value < 2**62 for value in report)
        and report.replica_id < INT32
        and 0 <= report.attempts < 256
        and 0 <= report.queue_reason < len(QUEUE_REASONS)
    )


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


class Clock(NamedTuple):
    """Where the run's zero lies on this machine's monotonic clock, and on everybody's wall clock."""

    start_ns: int
    started_at_unix_ns: int


class Ended(NamedTuple):
    """A concluded request: its record, and what live tables show of it. -1: not measured."""

    row: bytes
    status: int
    detail: str
    late_ns: int
    ttft_ns: int
    tpot_ns: int
    e2e_ns: int
    prompt_tokens: int
    output_tokens: int


def judge(stream: Stream, ending: Ending) -> tuple[int, str]:
    """(status, detail) of a request that is over."""
    if stream.outcome >= 0:
        return stream.outcome, stream.cause
    if stream.cause:
        return ERROR, stream.cause
    if stream.http_status != 200:
        said = error_message(stream.tail_kept) or stream.tail_kept[:60].decode("utf-8", "replace")
        status = LIMITED if stream.http_status == 429 else SHED if stream.http_status == 503 and stream.retry_after else ERROR
        return status, f"http {stream.http_status}: {said}"
    if stream.chunks == 0:
        said = error_message(stream.tail_kept) or stream.content_type.decode("latin-1")
        return ERROR, f"answered without a stream: {said}"
    if ending.error:
        return ERROR, f"in the stream: {ending.error}"
    return (OK, "") if ending.done else (ERROR, "the stream ended without [DONE]")


def conclude(stream: Stream, clock: Clock, *, model: bytes, tenant: bytes = b"", session: bytes = b"") -> Ended:
    """The record of a request that is over, and what the live tables need of it."""
    ending = read_ending(stream.tail_kept + stream.tail)
    status, detail = judge(stream, ending)
    told = ending.report if ending.report and plausible(ending.report) else None
    report = told or parse_server_timing(stream.server_timing)
    phases = explain(report, scheduled_ns=stream.scheduled_ns, sent_ns=stream.sent_ns, done_ns=stream.done_ns)
    prompt, output, cached = (count if count < INT32 else -1 for count in ending.usage)
    start_ns, first_ns, last_ns, done_ns = clock.start_ns, stream.first_token_ns, stream.last_token_ns, stream.done_ns
    # Tokens that came in one read lie at one instant: nothing lies between them that could be measured.
    first_tokens = output if last_ns == first_ns >= 0 and output > 0 else stream.first_chunk_tokens
    gateway_at_ns = report.gateway_at_unix_ns - clock.started_at_unix_ns if report and report.gateway_at_unix_ns > 0 else -1
    if told:
        replica_id, attempts, queue_reason = told.replica_id, told.attempts, told.queue_reason
    else:
        replica_id = int(stream.replica) if stream.replica and re.fullmatch(rb"\d{1,9}", stream.replica) else -1
        attempts, queue_reason = int(stream.sent_ns >= 0), 0
    row = OUTCOME_STRUCT.pack(  # in the order of records.Outcome: by name it would take twice as long, and a test holds the order
        stream.request_id, stream.scheduled_ns - start_ns, stream.sent_ns - start_ns if stream.sent_ns >= 0 else -1, gateway_at_ns,
        stream.first_chunk_ns - start_ns if stream.first_chunk_ns >= 0 else -1, first_ns - start_ns if first_ns >= 0 else -1,
        last_ns - start_ns if last_ns >= 0 else -1, done_ns - start_ns, stream.longest_gap_ns, *phases,
        0, 0, 0,  # trace and parent: they derive from run and request
        stream.chunks - ending.done,  # [DONE] is an event, but no chunk of the answer
        prompt, output, cached, first_tokens,
        0, replica_id, -1, stream.http_status,  # tokens lost and a decode replica are not in the report
        attempts, status, queue_reason,
        0, 0,  # online; and this is the client's own row
        tenant, model, session, detail.encode(),
    )  # fmt: skip
    timed = first_ns >= 0 and output > first_tokens > 0
    return Ended(
        row=row,
        status=status,
        detail=detail,
        late_ns=stream.sent_ns - stream.scheduled_ns if stream.sent_ns >= 0 else -1,
        ttft_ns=first_ns - stream.scheduled_ns if first_ns >= 0 else -1,
        tpot_ns=(last_ns - first_ns) // (output - first_tokens) if timed else -1,
        e2e_ns=done_ns - stream.scheduled_ns,
        prompt_tokens=prompt,
        output_tokens=output,
    )


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

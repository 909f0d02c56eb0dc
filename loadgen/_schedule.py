"""The sender: one worker's share of the plan, each request sent at its instant, whatever became of the earlier ones.

Three greenlets: one makes requests and connections ready ahead of time, one sends when they are due, one tends (writes the
spool, ends what takes too long). Answers are read by the connections' own. Lateness is absolute: actual send - planned send.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any, Final

import gevent
import numpy as np
import pyarrow as pa
from gevent.event import Event

from loadgen._histogram import LogHistogram
from loadgen._openai import Client, Target
from loadgen._outcomes import Clock, Ended, Spool, conclude
from loadgen._requests import RequestWriter, Row
from loadgen._sse import Stream
from loadgen._timer import NEVER_NS, make_timer
from replay.records import CANCELLED, OK, STATUSES, TIMEOUT
from replay.schedule import Schedule

LEAD_NS: Final = 2_000_000_000  # bodies are ready this long before they are due
CONNECT_AHEAD_NS: Final = 500_000_000  # and connections this long: a round trip around the world, and few kept idle
PREPARE_EVERY_S: Final = 0.05
TEND_EVERY_S: Final = 0.25
OFF: Final = 0.10  # a length that differs by more than this from the recorded one is counted


@dataclass
class Tally:
    """Running totals of one sender; plain data, so that workers can send it to their master."""

    statuses: list[int] = field(default_factory=lambda: [0] * len(STATUSES))
    sent: int = 0
    prompt_off: int = 0
    output_off: int = 0
    lateness: LogHistogram = field(default_factory=LogHistogram)

    def add(self, ended: Ended, prompt_tokens: int, output_tokens: int) -> None:
        self.statuses[ended.status] += 1
        if ended.late_ns >= 0:
            self.sent += 1
            self.lateness.add(ended.late_ns)
        if ended.status == OK:
            self.prompt_off += ended.prompt_tokens >= 0 and abs(ended.prompt_tokens - prompt_tokens) > OFF * prompt_tokens
            self.output_off += ended.output_tokens >= 0 and abs(ended.output_tokens - output_tokens) > OFF * output_tokens


class Rows:
    """The plan's rows by request id; one worker's share has gaps in its ids."""

    def __init__(self, plan: pa.Table) -> None:
        plan = plan.combine_chunks()
        self._column = {name: plan[name].combine_chunks() for name in ("prefix_hashes", "session_id", "tenant", "priority")}
        self.ids, self.arrivals, self.prompts, self.outputs = (
            plan[name].to_numpy() for name in ("request_id", "arrival_at_ns", "prompt_tokens", "output_tokens")
        )

    def row(self, request_id: int) -> Row:
        at = int(np.searchsorted(self.ids, request_id))
        hashes, session, tenant, priority = (column[at].as_py() for column in self._column.values())
        lengths = int(self.prompts[at]), int(self.outputs[at])
        return Row(at, request_id, *lengths, hashes, (session or "").encode(), (tenant or "").encode(), priority)


class Sender:
    """Replays a plan against a target. ``on_ended`` is called once for every request that was concluded."""

    def __init__(
        self, plan: pa.Table, target: Target, writer: RequestWriter, spool: Spool, *, model: str, timeout_s: float,
        on_ended: Callable[[Ended], None],
    ) -> None:  # fmt: skip
        self._rows, self._schedule = Rows(plan), Schedule(plan)
        self._initial = self._schedule.initial()
        self._coming = next(self._initial, None)
        self._released: list[tuple[int, int]] = []  # turns whose predecessor has ended: (due on the run's clock, id)
        self._ready: list[tuple[int, int, Stream]] = []  # (due on the monotonic clock, id, request)
        self._concluded = bytearray(len(plan))
        self._left = len(plan)
        self._writer, self._spool, self._on_ended = writer, spool, on_ended
        self._model, self._timeout_ns = model.encode(), round(timeout_s * 1e9)
        self.client = Client(target, self._done)
        self.tally = Tally()
        self.ended = ""  # why it ended, where not by itself
        self.cpu_share = 0.0  # of one core, from the start to the last send
        self._timer, self._released_one = make_timer(), Event()
        self._flushed_at_ns = 0

    @property
    def planned(self) -> int:
        return len(self._concluded)

    @property
    def inside(self) -> int:
        return len(self.client.inside)

    def run(self, clock: Clock, drain_s: float) -> None:
        """Send everything, wait for the answers until the drain is over, and leave a row for each request that was due."""
        self._clock = clock
        self._deadline_ns = clock.start_ns + int(self._rows.arrivals[-1]) + round(drain_s * 1e9) if self._left else clock.start_ns
        gc.collect()
        gc.freeze()  # a full collection over trace, Locust and Flask would stop the sender for tens of ms
        helpers = [gevent.spawn(self._prepare), gevent.spawn(self._tend)]
        try:
            self._send_all()
            self._conclude_rest()
            if not self._spool.flush():
                self._stop_for_full_disk()
        finally:
            gevent.killall(helpers)
            self.client.close()
            self._spool.close()
            self._timer.close()
            gc.unfreeze()

    def stop(self, reason: str) -> None:
        """End early: what is inside is cancelled, what was not due leaves no row. The first reason stays."""
        self.ended = self.ended or reason
        self._timer.hasten(0)

    def _send_all(self) -> None:
        ready, send, timer = self._ready, self.client.send, self._timer
        start_ns, cpu_ns = self._clock.start_ns, 0
        at_least_ns = 1_000_000_000  # three requests in a millisecond do not make a busy sender
        while self._left and not self.ended and (now := monotonic_ns()) < self._deadline_ns:
            while ready and ready[0][0] <= now:
                cpu_ns = cpu_ns or time.process_time_ns()
                send(heapq.heappop(ready)[2])
                now = monotonic_ns()
                self.cpu_share = (time.process_time_ns() - cpu_ns) / max(now - start_ns, at_least_ns)
            timer.wait(min(ready[0][0] if ready else NEVER_NS, self._deadline_ns))

    def _prepare(self) -> None:
        """Requests and connections ready before they are due; a turn that was just released as soon as possible."""
        while True:
            now = monotonic_ns()
            while (due := self._take(now + LEAD_NS)) is not None:
                at_ns, request_id = due
                row = self._rows.row(request_id)
                stream = Stream(request_id, self._writer.write(row), at_ns)
                stream.row = row
                heapq.heappush(self._ready, (at_ns, request_id, stream))
                self._timer.hasten(self._ready[0][0])
                gevent.sleep(0)  # one request is tens of microseconds, a burst of them must not hold back what is due
            soon = monotonic_ns() + CONNECT_AHEAD_NS
            self.client.prepare(sum(at_ns <= soon for at_ns, _, _ in self._ready))
            self._released_one.wait(PREPARE_EVERY_S)
            self._released_one.clear()

    def _take(self, until_ns: int) -> tuple[int, int] | None:
        """The next request to make ready, due until ``until_ns``: (due on the monotonic clock, id)."""
        until_ns -= self._clock.start_ns
        planned_ns = self._coming[0] if self._coming else NEVER_NS
        released_ns = self._released[0][0] if self._released else NEVER_NS
        if min(planned_ns, released_ns) > until_ns:
            return None
        if released_ns < planned_ns:
            taken = heapq.heappop(self._released)
        else:
            assert self._coming
            taken, self._coming = self._coming, next(self._initial, None)
        return self._clock.start_ns + taken[0], taken[1]

    def _tend(self) -> None:
        while True:
            gevent.sleep(TEND_EVERY_S)
            now = monotonic_ns()
            if not self._spool.flush():
                self._stop_for_full_disk()
                return
            self._flushed_at_ns = now
            self.client.tend(now, self._timeout_ns)

    def _stop_for_full_disk(self) -> None:
        second = max(0, self._flushed_at_ns - self._clock.start_ns) / 1e9
        self.stop(f"rows could not be written ({self._spool.failure}): they are complete up to second {second:.2f} and cut there")

    def _done(self, stream: Stream) -> None:
        """A stream is over: its row, the totals, and the turn that waited for it."""
        row: Row = stream.row
        ended = conclude(stream, self._clock, model=self._model, tenant=row.tenant, session=row.session)
        self._spool.append(ended.row)
        self._concluded[row.place] = 1
        self._left -= 1
        self.tally.add(ended, row.prompt_tokens, row.output_tokens)
        self._on_ended(ended)
        released = self._schedule.after(stream.request_id, stream.done_ns - self._clock.start_ns)
        if released is not None:
            heapq.heappush(self._released, released)
            self._released_one.set()
        if not self._left:
            self._timer.hasten(0)

    def _conclude_rest(self) -> None:
        """What is inside ends here; at the end of the drain, so does what was due and could not be sent (its turn never came)."""
        stopped = bool(self.ended)
        status, cause = (CANCELLED, "the run was stopped") if stopped else (TIMEOUT, "still inside at the end of the drain")
        for stream in list(self.client.inside.values()):
            self.client.abort(stream, status, cause)
        if stopped:
            return
        for at in [at for at, concluded in enumerate(self._concluded) if not concluded]:
            stream = Stream(int(self._rows.ids[at]), b"", self._clock.start_ns + int(self._rows.arrivals[at]))
            stream.outcome, stream.cause = TIMEOUT, "not sent by the end of the drain: an earlier turn took too long"
            stream.row, stream.done_ns = self._rows.row(stream.request_id), monotonic_ns()
            self._done(stream)

    def figures(self) -> dict[str, Any]:
        """What a worker reports to its master: plain numbers."""
        return {
            "planned": self.planned,
            "rows": self._spool.rows_written,
            "inside": self.inside,
            "statuses": list(self.tally.statuses),
            "sent": self.tally.sent,
            "prompt_off": self.tally.prompt_off,
            "output_off": self.tally.output_off,
            "lateness": list(self.tally.lateness.counts),
            "gaps": list(self.client.shared.gaps.counts),
            "cpu_share": self.cpu_share,
            "ended": self.ended,
        }

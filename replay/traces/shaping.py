"""From a recorded trace to the plan of a run: which part of it, how fast, how dense, how much moved about.

Four steps, always in this order: cut a window, scale the rate, scale the time, jitter. Each draws from its own stream of the
seed; a smaller sample is part of a larger one; turns of one session are kept or dropped, and moved, together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from replay.errors import InputError
from replay.records import NS_PER_S
from replay.schedule import session_codes
from replay.traces.columns import MAX_SPAN_NS, SCHEMA, by_arrival, numbered, with_column

# A copy comes up to a second later than its original: bursts keep their shape, and no copy lands on its original.
COPY_DELAY_NS: Final = NS_PER_S
_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads the copies' prefix ids over the 64 bits
_COPY_STEP: Final = 2**40  # copy k of row n is k * 2**40 + n: no trace has that many rows
_PIECE_ROWS: Final = 2**16
_RATE, _COPY, _JITTER = range(3)  # streams of random numbers
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shaping:
    """What a run takes of a trace. The default takes it as recorded.

    from_s, to_s   keep [from, to) of the recorded time; the plan's zero is ``from``
    busiest_s      of that, the window of this length with the most requests (it slides; the first of equals); its start is zero
    rate_scale     below 1: each session or lone request stays with this probability. Above: copies beside the original, each
                   up to 1 s later, with sessions and prefix ids of their own, so that the share of reused blocks stays
    time_scale     2 = twice as slow: arrivals and think times; rates fall accordingly, deadlines stay
    jitter_s       every request comes up to this much later, uniformly; less where the window would end before
    """

    from_s: float | None = None
    to_s: float | None = None
    busiest_s: float | None = None
    time_scale: float = 1.0
    rate_scale: float = 1.0
    jitter_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        start, end = self.from_s or 0.0, math.inf if self.to_s is None else self.to_s
        longest_s = MAX_SPAN_NS / NS_PER_S
        for name, holds, rule in (
            ("from_s", 0 <= start <= longest_s, "0 or later, within three years"),
            ("to_s", end > start, "later than from"),
            ("busiest_s", self.busiest_s is None or 1e-9 <= self.busiest_s <= longest_s, "longer than 0, at most three years"),
            ("time_scale", 1e-6 <= self.time_scale <= 1e6, "between 1e-6 and 1e6"),
            ("rate_scale", 0 < self.rate_scale <= 1000, "above 0, at most 1000"),
            ("jitter_s", 0 <= self.jitter_s <= longest_s, "0 or more, at most three years"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise InputError(f"is {getattr(self, name)}", where=name, rule=rule)


def shape(table: pa.Table, shaping: Shaping) -> pa.Table:
    """The plan: sorted by arrival, request_id numbered anew, at least one token each way (an engine serves no less).

    Raises InputError where nothing is left.
    """
    plan, end_ns = _cut(table, shaping)
    # Until the end request_id says where a row comes from, and the prefixes, the bulk of a trace, are left behind.
    plan = with_column(plan, "prefix_hashes", pa.nulls(len(plan), SCHEMA.field("prefix_hashes").type))
    plan = _scale_rate(plan, end_ns, shaping)
    if shaping.time_scale != 1:
        plan = _scale_time(plan, shaping.time_scale)
        end_ns = None if end_ns is None else round(end_ns * shaping.time_scale)
    if shaping.jitter_s:
        draws = _draws(plan, shaping.seed, _JITTER)
        plan = _delayed(plan, round(shaping.jitter_s * NS_PER_S), draws, end_ns)
    for name in ("prompt_tokens", "output_tokens"):
        plan = with_column(plan, name, pc.max_element_wise(plan[name], 1))
    plan = by_arrival(plan)
    hashes = _prefix_hashes(table["prefix_hashes"], plan["request_id"].to_numpy())
    return numbered(with_column(plan, "prefix_hashes", hashes))


def _cut(table: pa.Table, shaping: Shaping) -> tuple[pa.Table, int | None]:
    """The window's rows with the window's start as zero, and the window's end (None: the trace's own)."""
    arrivals = table["arrival_at_ns"].to_numpy()
    start_ns = round((shaping.from_s or 0) * NS_PER_S)
    end_ns = None if shaping.to_s is None or shaping.to_s * NS_PER_S > MAX_SPAN_NS else round(shaping.to_s * NS_PER_S)
    low, high = (int(np.searchsorted(arrivals, edge)) for edge in (start_ns, MAX_SPAN_NS if end_ns is None else end_ns))
    if low >= high:
        lasts_s = arrivals[-1] / NS_PER_S if len(arrivals) else 0
        raise InputError(
            "no request is left", where="from/to", rule=f"the trace lasts {lasts_s:.1f} s", fix="choose a window within it"
        )
    if shaping.busiest_s is not None:
        width_ns, inside = round(shaping.busiest_s * NS_PER_S), arrivals[low:high]
        # A window with the most requests exists that starts at an arrival.
        ends = np.searchsorted(inside, inside + width_ns)
        first = int(np.argmax(ends - np.arange(len(inside))))
        low, high, start_ns = low + first, low + int(ends[first]), int(inside[first])
        end_ns = start_ns + width_ns if end_ns is None else min(end_ns, start_ns + width_ns)
    kept = numbered(table.slice(low, high - low), first=low)
    return with_column(kept, "arrival_at_ns", arrivals[low:high] - start_ns), None if end_ns is None else end_ns - start_ns


def _scale_rate(plan: pa.Table, end_ns: int | None, shaping: Shaping) -> pa.Table:
    """Copy k of a row exists where its draw is below rate - k: all of the whole copies, a sample of the last."""
    rate = shaping.rate_scale
    copies = []
    for number in range(math.ceil(rate)):
        kept = plan
        if rate - number < 1:
            kept = plan.filter(pa.array(_draws(plan, shaping.seed, _RATE) < rate - number))
        copies.append(_copied(kept, number, _draws(kept, shaping.seed, _COPY, number), end_ns) if number else kept)
    scaled = pa.concat_tables(copies)
    if not len(scaled):
        raise InputError("no request is left", where="rate_scale", rule=f"{len(plan)} requests x {rate:g}", fix="raise it")
    return scaled


def _copied(plan: pa.Table, number: int, draws: Floats, end_ns: int | None) -> pa.Table:
    """One superposed copy: a little later, with sessions of its own, and marked by its number in request_id."""
    copy = _delayed(plan, COPY_DELAY_NS, draws, end_ns)
    copy = with_column(copy, "session_id", pc.binary_join_element_wise(copy["session_id"], f"copy{number}", "/"))
    return with_column(copy, "request_id", copy["request_id"].to_numpy() + number * _COPY_STEP)


def _prefix_hashes(recorded: Any, origins: Ints) -> Any:
    """The prefix ids of the rows that the plan's rows come from; a copy's are other ones, that share among themselves as before.

    Taken by pieces of the plan: its rows lie close together in the trace, and only they are copied at a time.
    """
    pieces = []
    for start in range(0, len(origins), _PIECE_ROWS):
        copies, rows = np.divmod(origins[start : start + _PIECE_ROWS], _COPY_STEP)
        first, last = int(rows.min()), int(rows.max())
        taken = recorded.slice(first, last - first + 1).combine_chunks().take(pa.array(rows - first))
        lengths = pc.list_value_length(taken).fill_null(0).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = taken.flatten().to_numpy() + np.repeat(copies.astype(np.uint64) * np.uint64(_GOLDEN), lengths)  # wraps around
        pieces.append(pa.ListArray.from_arrays(offsets, ids, mask=taken.is_null()))
    return pa.chunked_array(pieces, SCHEMA.field("prefix_hashes").type)


def _scale_time(plan: pa.Table, scale: float) -> pa.Table:
    last_ns = pc.max(plan["arrival_at_ns"]).as_py() * scale
    if last_ns >= MAX_SPAN_NS:
        raise InputError(f"the plan would last {last_ns / NS_PER_S:.0f} s", where="time_scale", rule="at most three years")
    arrivals = np.rint(plan["arrival_at_ns"].to_numpy() * scale).astype(np.int64)
    think_ns = pc.cast(pc.round(pc.multiply(plan["think_ns"], scale)), pa.int64())
    return with_column(with_column(plan, "arrival_at_ns", arrivals), "think_ns", think_ns)


def _delayed(plan: pa.Table, width_ns: int, draws: Floats, end_ns: int | None) -> pa.Table:
    """Rows later by draw x width, or by draw x what is left to the window's end: none leaves it, none piles up there.

    With one draw a session the turns keep their order: d(arrival + draw x min(width, end - arrival)) >= 1 - draw > 0.
    """
    arrivals = plan["arrival_at_ns"].to_numpy()
    room = np.full(len(arrivals), width_ns) if end_ns is None else np.minimum(width_ns, end_ns - arrivals)
    return with_column(plan, "arrival_at_ns", arrivals + np.floor(draws * room).astype(np.int64))


def _draws(plan: pa.Table, seed: int, *stream: int) -> Floats:
    """One uniform number in [0, 1) per session or lone request, given to each of its rows."""
    rng: Any = np.random.default_rng([seed, *stream])
    lone, codes = rng.random(len(plan)), session_codes(plan)
    sessions = rng.random(int(codes.max(initial=-1)) + 1)
    return np.where(codes >= 0, sessions[codes], lone) if len(sessions) else lone

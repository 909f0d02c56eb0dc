"""When requests are due: stories in virtual time, and shares that fit together again."""

from __future__ import annotations

import contextlib
import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.errors import InputError
from replay.schedule import Schedule, parse_duration_s, shard
from tests.traces_support import table_of, tables


def test_turns_of_a_session_wait_for_each_other_and_nobody_else_waits() -> None:
    schedule = Schedule(
        table_of(
            {"arrival_at_ns": 0, "session_id": "chat", "turn": 0},
            {"arrival_at_ns": 10, "session_id": "chat", "turn": 1, "think_ns": 5},
            {"arrival_at_ns": 11},
            {"arrival_at_ns": 12, "session_id": "other"},
            {"arrival_at_ns": 20, "session_id": "chat", "turn": 2},
        )
    )
    assert [*schedule.initial()] == [(0, 0), (11, 2), (12, 3)]
    assert schedule.waiting == 2
    assert schedule.after(0, ended_at_ns=30) == (35, 1), "its user thinks for 5 after the late answer"
    assert schedule.after(1, ended_at_ns=40) == (40, 4), "think time is not known: at once"
    assert schedule.after(4, ended_at_ns=50) is None
    assert schedule.after(2, ended_at_ns=50) is None
    assert schedule.waiting == 0


def test_a_turn_is_not_due_before_it_was_recorded() -> None:
    schedule = Schedule(table_of({"arrival_at_ns": 0, "session_id": "s"}, {"arrival_at_ns": 100, "session_id": "s", "think_ns": 7}))
    assert schedule.after(0, ended_at_ns=1) == (100, 1)
    assert schedule.after(0, ended_at_ns=1) is None, "a turn is released once"


def test_turn_numbers_order_a_session_that_arrived_in_one_instant() -> None:
    schedule = Schedule(table_of(*({"arrival_at_ns": 5, "session_id": "s", "turn": turn} for turn in (2, 0, 1))))
    assert [*schedule.initial()] == [(5, 1)]
    assert schedule.after(1, 6) == (6, 2)
    assert schedule.after(2, 7) == (7, 0)


def run_through(plan: pa.Table, takes_ns: int) -> list[tuple[int, int]]:
    """(due_at_ns, request_id) of every request, where each takes the same time."""
    schedule, due = Schedule(plan), []
    for first_at_ns, first in schedule.initial():
        step: tuple[int, int] | None = (first_at_ns, first)
        while step is not None:
            due.append(step)
            step = schedule.after(step[1], step[0] + takes_ns)
    assert schedule.waiting == 0
    return due


@given(plan=tables, takes_ns=st.integers(0, 10**12))
def test_every_request_is_due_once_and_never_early(plan: pa.Table, takes_ns: int) -> None:
    due = run_through(plan, takes_ns)
    assert sorted(request for _, request in due) == plan["request_id"].to_pylist()
    recorded = dict(zip(plan["request_id"].to_pylist(), plan["arrival_at_ns"].to_pylist(), strict=True))
    assert all(at >= recorded[request] for at, request in due)
    firsts = [*Schedule(plan).initial()]
    assert firsts == sorted(firsts), "the sender walks them in order"


@given(plan=tables, workers=st.integers(1, 7))
def test_shares_are_a_partition_and_sessions_are_not_split(plan: pa.Table, workers: int) -> None:
    shares = [shard(plan, worker, workers) for worker in range(workers)]
    ids = [share["request_id"].to_pylist() for share in shares]
    assert sorted(itertools.chain(*ids)) == plan["request_id"].to_pylist()
    assert all(share == sorted(share) for share in ids), "still in order"
    owners: dict[str, int] = {}
    for worker, share in enumerate(shares):
        for session in filter(None, share["session_id"].to_pylist()):
            assert owners.setdefault(session, worker) == worker
    together = sorted(step for share in shares for step in run_through(share, 1000))
    assert together == sorted(run_through(plan, 1000)), "a share is due as the whole plan is"


def test_shares_are_about_equal_and_the_same_in_every_process() -> None:
    plan = table_of(*({"arrival_at_ns": at, "session_id": f"s{at}" if at % 2 else None} for at in range(4000)))
    sizes = [len(shard(plan, worker, 4)) for worker in range(4)]
    assert max(sizes) - min(sizes) < 200, sizes
    # A change of the hash would send requests twice where workers of two versions meet.
    assert shard(plan, 0, 4)["request_id"].to_pylist()[:8] == [2, 3, 5, 7, 9, 12, 22, 23]


def test_a_worker_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError):
        shard(table_of({"arrival_at_ns": 0}), 2, 2)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90), ("5m", 300), ("1h", 3600), ("1h30m", 5400), ("250ms", 0.25), ("10us", 1e-5), ("10µs", 1e-5), ("3ns", 3e-9),
        ("2d", 172800), ("1.5h", 5400), (".5s", 0.5), ("90", 90), (" 90s ", 90), (90, 90), (1e-5, 1e-5), ("0s", 0), (0, 0),
    ],
)  # fmt: skip
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "s", "5x", "x5m", "5m!", "1h 30m", "-5s", "1e3s", "nan", "inf", "..s", True, -1, float("nan"), float("inf"), "²s", "٣s"],
)
def test_what_is_no_duration_is_refused_with_its_place(text: str | float) -> None:
    with pytest.raises(InputError, match="no duration") as caught:
        parse_duration_s(text, where="--busiest")
    assert caught.value.where == "--busiest"


@given(text=st.text(max_size=8))
def test_any_text_is_a_duration_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert parse_duration_s(text) >= 0

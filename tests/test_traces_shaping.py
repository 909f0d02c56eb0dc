"""Shaping: which requests, in which order, within which bounds, and the same again from the same seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from replay import traces
from replay.errors import InputError
from replay.records import NS_PER_S
from replay.traces import Shaping, shape
from replay.traces.columns import SCHEMA
from tests.traces_support import recorded_file, table_of, tables

shapings = st.builds(
    Shaping,
    from_s=st.none() | st.floats(0, 10**6),
    to_s=st.none() | st.floats(2 * 10**6, 10**7),
    busiest_s=st.none() | st.floats(1e-6, 10**6),
    time_scale=st.floats(0.01, 10),
    rate_scale=st.floats(0.05, 3),
    jitter_s=st.sampled_from([0, 0.5, 3, 10**6]),
    seed=st.integers(0, 9),
)


@pytest.fixture(scope="module")
def hour() -> pa.Table:
    return traces.read("azure-code-2023")


def seconds(table: pa.Table) -> Any:
    return table["arrival_at_ns"].to_numpy() / NS_PER_S


@given(table=tables, shaping=shapings)
def test_any_plan_is_in_order_in_bounds_numbered_and_repeatable(table: pa.Table, shaping: Shaping) -> None:
    try:
        plan = shape(table, shaping)
    except InputError:  # nothing left in the window, or of the sample
        reject()
    assert plan.schema.equals(SCHEMA)
    assert plan["request_id"].to_pylist() == [*range(len(plan))]
    arrivals = plan["arrival_at_ns"].to_numpy()
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals[0] >= 0
    assert pc.min(plan["prompt_tokens"]).as_py() >= 1
    assert pc.min(plan["output_tokens"]).as_py() >= 1
    if shaping.busiest_s is not None:
        assert arrivals[-1] <= shaping.busiest_s * shaping.time_scale * NS_PER_S + 1
    elif shaping.to_s is not None:
        assert arrivals[-1] <= (shaping.to_s - (shaping.from_s or 0)) * shaping.time_scale * NS_PER_S + 1
    assert shape(table, shaping) == plan


@given(table=tables)
def test_no_shaping_changes_nothing_but_empty_requests(table: pa.Table) -> None:
    plan = shape(table, Shaping())
    for name in SCHEMA.names:
        least = 1 if name in ("prompt_tokens", "output_tokens") else None
        expected = [value if least is None else max(least, value) for value in table[name].to_pylist()]
        assert plan[name].to_pylist() == expected, name
    assert shape(plan, Shaping()) == plan, "a plan replayed is the same plan"


def test_a_window_keeps_its_start_and_leaves_out_its_end() -> None:
    table = table_of(*({"arrival_at_ns": at * NS_PER_S, "prompt_tokens": 100 + at} for at in (0, 5, 10, 15, 20)))
    plan = shape(table, Shaping(from_s=4, to_s=15))
    assert seconds(plan).tolist() == [1, 6], "counted from the window's start"
    assert plan["prompt_tokens"].to_pylist() == [105, 110]
    assert seconds(shape(table, Shaping(from_s=5, to_s=15.5))).tolist() == [0, 5, 10]


def test_the_busiest_window_slides(hour: pa.Table) -> None:
    assert len(shape(hour, Shaping(busiest_s=1))) == 72, "fixed bins find 67"
    counted = shape(hour, Shaping(busiest_s=90))
    arrivals = seconds(hour)
    assert len(counted) == max(np.count_nonzero((arrivals >= at) & (arrivals < at + 90)) for at in arrivals)
    assert seconds(counted)[0] == 0
    assert seconds(counted)[-1] < 90
    assert len(shape(hour, Shaping(from_s=0, to_s=100, busiest_s=10))) == max(
        np.count_nonzero((arrivals >= at) & (arrivals < min(at + 10, 100))) for at in arrivals[arrivals < 100]
    )
    assert len(shape(hour, Shaping(busiest_s=1e6))) == len(hour)


def test_time_scale_stretches_arrivals_and_thinking_and_leaves_deadlines() -> None:
    table = table_of({"arrival_at_ns": 0}, {"arrival_at_ns": 3 * NS_PER_S, "think_ns": 5, "deadline_ns": 7})
    last = [*traces.recorded(shape(table, Shaping(time_scale=2)))][1]
    assert (last.arrival_at_ns, last.think_ns, last.deadline_ns) == (6 * NS_PER_S, 10, 7)


# The busiest minute has 632 requests: thinned to a tenth, one standard deviation of its peak is 12 %.
@pytest.mark.parametrize(("rate", "near"), [(0.1, 0.4), (0.5, 0.15), (1.5, 0.1), (3.0, 0.05)])
def test_the_rate_scales_and_the_bursts_keep_their_shape(hour: pa.Table, rate: float, near: float) -> None:
    plan = shape(hour, Shaping(rate_scale=rate, seed=1))
    # Bernoulli thinning of the last copy: within five standard deviations
    part = rate % 1
    assert abs(len(plan) - rate * len(hour)) <= 5 * (part * (1 - part) * len(hour)) ** 0.5
    assert seconds(plan)[-1] <= seconds(hour)[-1] + 1
    before, after = traces.describe(hour), traces.describe(plan)
    assert after["peak_to_mean_60s"] == pytest.approx(before["peak_to_mean_60s"], rel=near)
    assert after["prompt_tokens"]["mean"] == pytest.approx(before["prompt_tokens"]["mean"], rel=0.1)


def test_a_smaller_sample_is_part_of_a_larger_one(hour: pa.Table) -> None:
    small, large = (set(seconds(shape(hour, Shaping(rate_scale=rate, seed=4))).tolist()) for rate in (0.3, 0.6))
    assert small < large


def test_another_seed_is_another_plan(hour: pa.Table) -> None:
    for change in ({"rate_scale": 0.5}, {"rate_scale": 1.5}, {"jitter_s": 1.0}):
        first, second = (shape(hour, Shaping(seed=seed, **change))["arrival_at_ns"] for seed in (1, 2))  # type: ignore[arg-type]
        assert first != second, change


def test_copies_have_their_own_sessions_and_prefixes_and_come_within_a_second() -> None:
    prompts = [("s1", [7, 8]), ("s1", [7, 9]), (None, [7]), (None, None)]
    rows = (
        {"arrival_at_ns": at * 10**10, "session_id": session, "prefix_hashes": ids} for at, (session, ids) in enumerate(prompts)
    )
    table = table_of(*rows)
    plan = shape(table, Shaping(rate_scale=2))
    assert len(plan) == 8
    late = seconds(plan).reshape(4, 2) - seconds(table)[:, None]
    assert (late[:, 0] == 0).all()
    assert (late[:, 1] > 0).all()
    assert (late[:, 1] < 1).all()
    assert plan["session_id"].to_pylist() == ["s1", "s1/copy1", "s1", "s1/copy1", None, None, None, None]
    copied = plan["prefix_hashes"].to_pylist()[1::2]
    assert plan["prefix_hashes"].to_pylist()[::2] == [[7, 8], [7, 9], [7], None]
    assert copied[0][0] == copied[1][0] == copied[2][0] != 7
    assert copied[3] is None
    reuse, doubled = traces.describe(table)["prefix_reuse"], traces.describe(plan)["prefix_reuse"]
    assert doubled["block_share"] == reuse["block_share"]


@given(rate=st.floats(0.1, 3), seed=st.integers(0, 5), jitter_s=st.floats(0, 5))
def test_sessions_stay_whole_and_in_order(rate: float, seed: int, jitter_s: float) -> None:
    rows = ({"arrival_at_ns": at * NS_PER_S // 10, "session_id": f"s{at % 7}", "turn": at // 7} for at in range(70))
    try:
        plan = shape(table_of(*rows), Shaping(rate_scale=rate, jitter_s=jitter_s, seed=seed, busiest_s=6))
    except InputError:
        reject()
    lengths = Counter(plan["session_id"].to_pylist())
    whole = Counter(f"s{at % 7}" for at in range(60))
    assert all(count == whole[name.partition("/")[0]] for name, count in lengths.items())
    for name in lengths:
        turns = plan.filter(pc.equal(plan["session_id"], name))["turn"].to_pylist()
        assert turns == sorted(turns)


def test_jitter_moves_requests_forward_and_loses_none(hour: pa.Table) -> None:
    window = shape(hour, Shaping(busiest_s=90))
    moved = shape(hour, Shaping(busiest_s=90, jitter_s=3, seed=2))
    assert len(moved) == len(window)
    assert sorted(moved["prompt_tokens"].to_pylist()) == sorted(window["prompt_tokens"].to_pylist())
    assert seconds(moved)[-1] < 90
    late = seconds(moved).mean() - seconds(window).mean()
    assert 1.3 < late < 1.6, "half the width, and less at the window's end"


@pytest.mark.traces
def test_jitter_spreads_quantised_timestamps() -> None:
    mooncake = traces.read(recorded_file("mooncake_conversation_trace.jsonl"))
    figures = traces.describe(shape(mooncake, Shaping(jitter_s=3)))
    assert figures["warnings"] == []
    assert 0.9 < figures["cv_interarrival"] < 1.2, "raw it is 3.03, an artefact"


def test_nothing_left_is_an_error_that_says_how_long_the_trace_is(hour: pa.Table) -> None:
    with pytest.raises(InputError, match=r"lasts 3435\.9 s"):
        shape(hour, Shaping(from_s=4000))
    with pytest.raises(InputError, match="raise it"):
        shape(hour, Shaping(to_s=1, rate_scale=1e-9))
    with pytest.raises(InputError, match="no request"):
        shape(SCHEMA.empty_table(), Shaping())
    with pytest.raises(InputError, match="three years"):
        shape(hour, Shaping(time_scale=1e6))


@pytest.mark.parametrize(
    "wrong",
    [
        {"from_s": -1}, {"from_s": 5, "to_s": 5}, {"to_s": 0}, {"busiest_s": 0}, {"time_scale": 0}, {"time_scale": float("nan")},
        {"rate_scale": 0}, {"rate_scale": float("inf")}, {"jitter_s": -1}, {"jitter_s": float("nan")}, {"seed": -1},
    ],
)  # fmt: skip
def test_bad_shaping_fails_at_construction_and_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        Shaping(**wrong)
    assert caught.value.where in wrong

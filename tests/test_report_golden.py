"""Every metric, cost and quantile of the report against a run small enough to work out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.policies import costs
from replay.records import CANCELLED, OK, SHED, FleetState, Outcome, ReplicaLifetime
from replay.report.load import REPLICA_COLUMNS, REPORT_COLUMNS, REQUEST_COLUMNS, STATE_COLUMNS, load_run
from replay.report.metrics import figures, measure, pool, quantile
from replay.report.timeline import BINS, timeline
from replay.slo import Slo
from tests.make_run import ns, plan_table, write_run

SLO = Slo(ttft_s=1.0, tpot_s=0.15)
ARRIVALS_S = [0.0, 1.0, 2.0, 3.0, 4.0]


def answered(
    request: int, at: float, sent: float, first: float, last: float, done: float, tokens: int, lump: int, **more: Any
) -> Outcome:
    """An ok row: instants in seconds, ``lump`` tokens in the first chunk."""
    return Outcome(
        request, ns(at), ns(sent), first_token_at_ns=ns(first), last_token_at_ns=ns(last), done_at_ns=ns(done),
        output_tokens=tokens, first_chunk_tokens=lump, status=OK, **more,
    )  # fmt: skip


# TTFT 0.5, 2.0, 0.2 s; TPOT 0.9/9 = 0.1 s, none (one chunk), 1.0/10 = 0.1 s; E2E 1.5, 2.5, 3.0 s. The last byte of all is at 6 s.
ROWS = [
    answered(0, 0, 0.001, 0.5, 1.4, 1.5, 10, 1, queue_ns=ns(0.3), prefill_ns=ns(0.2), decode_ns=ns(1.0)),
    answered(1, 1, 1.0, 3.0, 3.0, 3.5, 3, 3, queue_ns=ns(1.5), prefill_ns=ns(0.5), decode_ns=ns(0.5)),
    Outcome(2, ns(2), ns(2), done_at_ns=ns(2.1), queue_ns=ns(0.1), status=SHED),
    answered(3, 3, 3.0, 3.2, 4.2, 6.0, 11, 1, queue_ns=0, prefill_ns=ns(0.2), decode_ns=ns(2.8)),
    Outcome(4, ns(4), ns(4.003), done_at_ns=ns(4.5), status=CANCELLED),
]
LIVES = [
    ReplicaLifetime(0, "default", "a100", 1, ns(-5), ns(-1), None, ""),  # there from before the start: 6 s in the window
    ReplicaLifetime(1, "default", "a100", 2, ns(1), ns(3), ns(5), "idle"),  # 4 s x 2 GPUs
]
STATES = [
    FleetState(ns(at), queued, 1, 1, starting, ready, 0, 0, 0, 3.6)
    for at, queued, starting, ready in ((-1, 0, 0, 1), (1, 4, 1, 1), (3, 0, 0, 2), (5, 1, 0, 1), (9, 50, 0, 9))
]  # the last sample is after the window


@pytest.fixture
def golden(tmp_path: Path) -> dict[str, float | None]:
    write_run(
        tmp_path / "run", ROWS, plan=plan_table(ARRIVALS_S), lifetimes=LIVES, states=STATES,
        prices={"usd_per_gpu_hour": 3.6, "gpu": "a100"},
    )  # fmt: skip
    return figures(measure(load_run(tmp_path / "run", REPORT_COLUMNS), SLO).totals)


@pytest.mark.parametrize(
    ("metric", "by_hand"),
    [
        ("attainment", 2 / 5),  # requests 0 and 3 are good, of five that arrived
        ("goodput_rps", 2 / 6),  # the window ends with the last byte, at 6 s
        ("arrived", 5), ("ok", 3), ("shed", 1), ("cancelled", 1), ("timeout", 0), ("limited", 0), ("error", 0),
        ("ttft_p50_s", 0.5), ("ttft_p95_s", 2.0), ("ttft_p99_s", 2.0),
        ("ttft_sent_p50_s", 0.499),
        ("ttft_all_p50_s", 0.5),  # 0.2 0.5 2.0 and one failure: rank ceil(0.5 * 4) = 2; the client that left is not in it
        ("ttft_all_p95_s", math.inf),  # rank 4 is the failure
        ("tpot_p50_s", 0.1), ("tpot_p99_s", 0.1), ("tpot_all_p50_s", 0.1), ("tpot_all_p95_s", math.inf),
        ("e2e_p50_s", 2.5), ("e2e_p95_s", 3.0),
        ("output_tokens_per_s", 24 / 6),
        ("replicas_billed_mean", 10 / 6), ("replicas_billed_peak", 2),
        ("replicas_ready_mean", (3 * 1 + 2 * 2 + 1 * 1) / 6), ("replicas_ready_peak", 2), ("queue_peak", 4),
        ("gpu_hours", 14 / 3600),
        ("cost_usd", 14 / 3600 * 3.6),
        ("usd_per_1m_output_tokens", 0.014 / 24 * 1e6),
        ("usd_per_1m_good_tokens", 0.014 / 21 * 1e6),
        ("gpu_hours_per_1m_good_tokens", 14 / 3600 / 21 * 1e6),
        ("phase_queue_s", 1.8 / 3), ("phase_prefill_s", 0.9 / 3), ("phase_decode_s", 4.3 / 3),
        ("phase_retry_s", None),  # never measured: null, not 0
    ],
)  # fmt: skip
def test_figures_are_those_worked_out_by_hand(golden: dict[str, float | None], metric: str, by_hand: float | None) -> None:
    assert golden[metric] == (None if by_hand is None else pytest.approx(by_hand, rel=1e-12))


def test_the_slowest_and_the_late_are_worked_out_too(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ROWS, plan=plan_table(ARRIVALS_S))
    totals = measure(load_run(tmp_path / "run"), SLO).totals
    assert totals["tail_decode_s"] == pytest.approx(2.8)  # the slowest 5 % of three requests by E2E: request 3
    assert totals["late_p50_s"] == 0.0
    assert totals["late_p99_s"] == pytest.approx(0.003)
    assert totals["length_off"] == 1  # plan: 10 tokens each; 3 is off, 11 is inside 10 %


def test_a_term_that_was_not_measured_is_not_kept_but_an_answer_too_short_for_tpot_keeps_it(tmp_path: Path) -> None:
    no_usage = answered(0, 0, 0, 0.1, 0.2, 0.3, -1, -1)
    short = answered(1, 1, 1, 1.1, 1.1, 1.2, 1, 1)
    write_run(tmp_path / "run", [no_usage, short], plan=plan_table([0, 1]))
    totals = measure(load_run(tmp_path / "run"), Slo(tpot_s=0.1)).totals
    assert (totals["good"], totals["good_tokens"], totals["no_usage"]) == (1, 1, 1)


def test_without_an_objective_there_is_no_goodput(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ROWS, plan=plan_table(ARRIVALS_S), lifetimes=LIVES, prices={"usd_per_gpu_hour": 3.6})
    found = figures(measure(load_run(tmp_path / "run"), Slo()).totals)
    assert [found[name] for name in ("attainment", "goodput_rps", "usd_per_1m_good_tokens")] == [None, None, None]
    assert found["usd_per_1m_output_tokens"] is not None


def test_cost_is_null_without_price_without_lifetimes_and_without_good_tokens(tmp_path: Path) -> None:
    priced = {"usd_per_gpu_hour": 3.6}
    for name, more in (("no-price", {"lifetimes": LIVES}), ("no-lives", {"prices": priced})):
        write_run(tmp_path / name, ROWS, plan=plan_table(ARRIVALS_S), **more)
        found = figures(measure(load_run(tmp_path / name), SLO).totals)
        assert found["cost_usd"] is found["usd_per_1m_good_tokens"] is None, name
    write_run(tmp_path / "none-good", ROWS, plan=plan_table(ARRIVALS_S), lifetimes=LIVES, prices=priced)
    found = figures(measure(load_run(tmp_path / "none-good"), Slo(ttft_s=0.001)).totals)
    assert found["usd_per_1m_good_tokens"] is None
    assert found["cost_usd"] == pytest.approx(0.014)


def test_ratios_over_repeats_are_ratios_of_sums_and_peaks_are_the_highest() -> None:
    runs = [{"cost_usd": cost, "output_tokens": 1e6, "queue_peak": peak} for cost, peak in ((1.0, 3.0), (3.0, 9.0))]
    pooled = pool(runs)
    assert pooled == {"cost_usd": 2.0, "output_tokens": 1e6, "queue_peak": 9.0}
    assert costs.per_million(pooled["cost_usd"], pooled["output_tokens"]) == 2.0
    assert pool([{"cost_usd": 1.0}, {"cost_usd": None}]) == {"cost_usd": None}, "unknown in one run is unknown in all"


@pytest.mark.parametrize(
    ("values", "infinite", "permille", "expected"),
    [
        ([1, 2, 3, 4], 0, 500, 2.0), ([1, 2, 3, 4], 0, 510, 3.0), ([7], 0, 990, 7.0), ([], 0, 500, None), ([], 2, 500, math.inf),
        (range(1, 101), 0, 990, 99.0), (range(1, 101), 0, 950, 95.0), (range(1, 100), 1, 990, 99.0),
        (range(1, 99), 2, 990, math.inf),
    ],
)  # fmt: skip
def test_a_quantile_is_the_smallest_value_that_enough_do_not_exceed(
    values: Any, infinite: int, permille: int, expected: Any
) -> None:
    assert quantile(np.array(list(values), float), permille, infinite) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(0, 20), st.sampled_from([500, 950, 990]))
def test_a_quantile_holds_its_definition(values: list[float], infinite: int, permille: int) -> None:
    ascending = np.sort(values)
    found = quantile(ascending, permille, infinite)
    assert found is not None
    count = len(values) + infinite
    at_most = count if math.isinf(found) else int((ascending <= found).sum())
    assert at_most * 1000 >= permille * count
    if not math.isinf(found):
        assert int((ascending < found).sum()) * 1000 < permille * count, "a smaller value would have done"


LIFE_TIMES = st.tuples(st.integers(-50, 150), st.integers(0, 100), st.integers(1, 8)).map(
    lambda life: ReplicaLifetime(0, "", "", life[2], life[0], None, life[0] + life[1], "")
)


@given(st.lists(LIFE_TIMES), st.integers(0, 100))
def test_a_window_cut_in_two_costs_what_it_costs_whole(lives: list[ReplicaLifetime], cut: int) -> None:
    whole = costs.gpu_seconds(lives, 0, 100)
    assert costs.gpu_seconds(lives, 0, cut) + costs.gpu_seconds(lives, cut, 100) == pytest.approx(whole)
    by_instant = max((sum(a.requested_at_ns <= t < (a.stopped_at_ns or 0) for a in lives) for t in range(100)), default=0)
    assert costs.replicas_peak(lives, 0, 100) == by_instant


@settings(max_examples=10)
@given(st.permutations(range(5)), st.integers(0, 4))
def test_row_order_and_parts_change_nothing(tmp_path_factory: pytest.TempPathFactory, order: list[int], parts: int) -> None:
    path = tmp_path_factory.mktemp("mixed")
    write_run(path / "plain", ROWS, plan=plan_table(ARRIVALS_S), lifetimes=LIVES, states=STATES)
    write_run(
        path / "mixed", [ROWS[i] for i in order], plan=plan_table(ARRIVALS_S), lifetimes=LIVES[::-1], states=STATES, parts=parts
    )
    plain, mixed = (measure(load_run(path / name, REPORT_COLUMNS), SLO) for name in ("plain", "mixed"))
    assert plain.totals == mixed.totals


def test_time_in_other_units_scales_times_and_nothing_else(tmp_path: Path) -> None:
    factor = 3

    def slower(row: Outcome) -> Outcome:
        return row._replace(**{n: v * factor for n, v in row._asdict().items() if n.endswith("_ns") and v != -1})

    instants = ("requested_at_ns", "ready_at_ns", "stopped_at_ns")
    lives = [
        life._replace(**{name: None if (at := getattr(life, name)) is None else at * factor for name in instants}) for life in LIVES
    ]
    write_run(tmp_path / "one", ROWS, plan=plan_table(ARRIVALS_S), lifetimes=LIVES)
    write_run(tmp_path / "three", map(slower, ROWS), plan=plan_table([at * factor for at in ARRIVALS_S]), lifetimes=lives)
    one = figures(measure(load_run(tmp_path / "one"), SLO).totals)
    three = figures(measure(load_run(tmp_path / "three"), Slo(ttft_s=3.0, tpot_s=0.45)).totals)
    for name in ("ttft_p95_s", "e2e_all_p50_s", "tpot_p50_s", "gpu_hours", "phase_queue_s"):
        assert three[name] == pytest.approx((one[name] or 0) * factor), name
    for name in ("attainment", "ok", "replicas_billed_mean", "replicas_billed_peak"):
        assert three[name] == pytest.approx(one[name]), name


def test_every_column_of_the_frames_is_documented_with_its_unit(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ROWS, plan=plan_table(ARRIVALS_S), lifetimes=LIVES, states=STATES)
    run = load_run(tmp_path / "run")
    for frame, documented in ((run.requests, REQUEST_COLUMNS), (run.states, STATE_COLUMNS), (run.replicas, REPLICA_COLUMNS)):
        assert set(frame) <= set(documented)
        assert all((unit == "ns") == name.endswith("_ns") for name, (unit, _) in documented.items())
    assert set(run.requests) >= {"trace_id", "ttft_s", "ttft_sent_s", "tpot_s", "e2e_s", "late_s", "recorded_output_tokens"}
    assert run.requests["ttft_s"].round(9).tolist()[:2] == [0.5, 2.0]
    assert run.replicas["requested_at_s"].tolist() == [-5.0, 1.0]
    assert run.requests["retry_ns"].isna().all(), "not measured is null"


def test_load_run_is_there_for_notebooks_from_the_package_itself(tmp_path: Path) -> None:
    import replay

    write_run(tmp_path / "run", ROWS, plan=plan_table(ARRIVALS_S))
    assert len(replay.load_run(tmp_path / "run").requests) == 5
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        replay.load_runs  # noqa: B018


def test_a_time_line_holds_a_value_until_the_next_sample_and_keeps_the_peak_of_each_bin(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ROWS, plan=plan_table(ARRIVALS_S), states=STATES[1:])  # the first sample comes at 1 s
    found = timeline(load_run(tmp_path / "run", REPORT_COLUMNS))
    assert found.bin_s == pytest.approx(6 / BINS)
    assert (found.requests, found.span_s) == (5, 4.0)
    assert found.arrivals_rps.sum() * found.bin_s == pytest.approx(5)
    assert found.ready is not None
    assert found.queued is not None
    assert found.starting is not None
    by_second = found.ready.reshape(6, -1)
    assert by_second == pytest.approx(np.repeat([[1], [1], [1], [2], [2], [1]], BINS // 6, axis=1)), (
        "before the first sample as in it"
    )
    assert found.queued.reshape(6, -1)[:, 1].tolist() == [4, 4, 4, 0, 0, 1], "a sample belongs to the bin it begins"
    assert found.queued[BINS // 2] == 0, "a bin that opens with a change does not see what was before"
    assert found.queued[BINS * 5 // 6 - 1] == 0, "a sample at the end of a bin is the next one's"
    assert found.starting.sum() * found.bin_s == pytest.approx(3)  # one replica starting, known from 1 s, assumed from 0 to 3 s


def test_peak_to_mean_is_that_of_whole_bins_of_ten_seconds(tmp_path: Path) -> None:
    arrivals_s = [0.0, 1, 2, 3, 4, 12, 25, 29, 31, 32, 33]  # whole bins hold 5, 1, 2; the fourth is cut
    rows = [Outcome(i, ns(at), done_at_ns=ns(at), status=SHED) for i, at in enumerate(arrivals_s)]
    write_run(tmp_path / "run", rows, plan=plan_table(arrivals_s))
    assert timeline(load_run(tmp_path / "run")).peak_to_mean == pytest.approx(5 / (8 / 3))

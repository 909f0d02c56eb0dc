"""Intervals and the verdict: what is said from how many pairs, and what is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.records import OK, SHED, Outcome, ReplicaLifetime
from replay.report.assemble import Report, assemble
from replay.report.compare import Comparison, compare, t_interval
from replay.report.metrics import METRICS
from replay.slo import Slo
from tests.make_run import ns, plan_table, write_run

SLO = Slo(ttft_s=1.0)


def write_arm(
    path: Path, *, good: int, policy: str = "a", repeat: int = 0, of: int = 100, ttft_s: float = 0.5, gpus: int = 1,
    tokens: int = 10, **more: Any,
) -> Path:  # fmt: skip
    """A run of ``of`` requests, one a second, of which ``good`` get a token after ``ttft_s`` and the rest are shed.

    It has one replica of ``gpus`` GPUs at $3.6 an hour.
    """
    rows = [
        Outcome(i, ns(i), ns(i), first_token_at_ns=ns(i + ttft_s), last_token_at_ns=ns(i + ttft_s), done_at_ns=ns(i + ttft_s),
                output_tokens=tokens, first_chunk_tokens=1, status=OK)
        if i < good
        else Outcome(i, ns(i), ns(i), done_at_ns=ns(i), status=SHED)
        for i in range(of)
    ]  # fmt: skip
    settings = {
        "prices": {"usd_per_gpu_hour": 3.6, "gpu": "a100"},
        "lifetimes": [ReplicaLifetime(0, "", "a100", gpus, 0, 0, None, "")],
    }
    run = write_run(
        path / f"{policy}-{repeat}", rows, plan=plan_table(range(of)), policy=policy, repeat=repeat, **{**settings, **more}
    )
    return run.path


def report(path: Path, **arms: Sequence[dict[str, Any]]) -> Report:
    """The report over policies given as name=[arm of repeat 0, arm of repeat 1, ...]."""
    paths = [write_arm(path, policy=name, repeat=repeat, **arm) for name, runs in arms.items() for repeat, arm in enumerate(runs)]
    return assemble(paths, slo=SLO)


# Student's t for two degrees of freedom at 97.5 % is 4.30265273; the mean of 1 2 3 has the standard error 1 / sqrt(3).
def test_the_t_interval_is_the_textbook_one() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert found == pytest.approx((2.0, 2.0 - 4.302652730 / math.sqrt(3), 2.0 + 4.302652730 / math.sqrt(3)), rel=1e-9)


def test_there_is_no_interval_from_one_pair_nor_from_two() -> None:
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 2.0]) is None


def test_it_covers_what_it_says_it_covers() -> None:
    rng = np.random.default_rng(7)
    hits = [(i := t_interval(rng.normal(3, 2, 5).tolist())) is not None and i.low <= 3 <= i.high for _ in range(2000)]
    assert 0.93 < np.mean(hits) < 0.97  # standard error 0.5 %


def one(name: str, a: list[float | None], b: list[float | None]) -> Comparison:
    """One metric of hand-made pairs; every other metric is null."""
    blank = dict.fromkeys((metric.name for metric in METRICS), None)
    pairs = [({**blank, name: left}, {**blank, name: right}) for left, right in zip(a, b, strict=True)]
    whole = ({**blank, name: a[0]}, {**blank, name: b[0]})
    return next(c for c in compare("A", "B", whole, pairs, "this trace again") if c.metric == name)


def test_a_difference_is_the_mean_of_the_logarithms_shown_as_a_percentage() -> None:
    found = one("ttft_p95_s", [1.0, 1.0, 1.0], [math.exp(0.1), math.exp(0.2), math.exp(0.3)])
    half = 4.302652730 * 0.1 / math.sqrt(3)
    assert found.percent == pytest.approx((math.exp(0.2) - 1) * 100)
    assert (found.ci_low, found.ci_high) == pytest.approx(((math.exp(0.2 - half) - 1) * 100, (math.exp(0.2 + half) - 1) * 100))
    assert (found.n, found.question, found.note, found.unit) == (3, "this trace again", "", "s")


@pytest.mark.parametrize(
    ("a", "b", "percent", "note"),
    [
        ([1.0], [2.0], 100.0, "one pair: not enough data"),
        ([1.0, 1.0], [2.0, 2.0], 100.0, "2 pairs: not enough data"),
        ([1.0] * 3, [2.0, math.inf, 2.0], None, "beyond the time-out in a run: failures decide, not this figure"),
        ([1.0] * 3, [2.0, None, 2.0], None, "not measured in every pair"),
        ([1.0] * 3, [2.0, 0.0, 2.0], None, "zero in a run: no ratio"),
    ],
)
def test_what_cannot_be_said_is_not_said(a: Any, b: Any, percent: float | None, note: str) -> None:
    found = one("ttft_p95_s", a, b)
    assert found.percent == (None if percent is None else pytest.approx(percent))
    assert (found.ci_low, found.ci_high, found.question, found.note) == (None, None, "", note)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=3, max_size=8), st.floats(0.001, 1000))
@settings(max_examples=50)
def test_intervals_do_not_depend_on_the_unit_nor_on_the_order_and_turn_round_with_the_baseline(
    pairs: list[tuple[float, float]], unit: float
) -> None:
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    plain, scaled = one("ttft_p95_s", [*a], [*b]), one("ttft_p95_s", [x * unit for x in a], [x * unit for x in b])
    mixed, turned = one("ttft_p95_s", a[::-1], b[::-1]), one("ttft_p95_s", [*b], [*a])
    for other in (scaled, mixed):
        assert (other.percent, other.ci_low, other.ci_high) == pytest.approx(
            (plain.percent, plain.ci_low, plain.ci_high), 1e-6, 1e-6
        )
    assert plain.percent is not None
    assert turned.percent is not None
    assert (1 + plain.percent / 100) * (1 + turned.percent / 100) == pytest.approx(1)


def test_the_cheapest_that_meets_the_objective_wins(tmp_path: Path) -> None:
    found = report(
        tmp_path,
        cheap_but_bad=[{"good": 80 + i} for i in range(3)],
        dear=[{"good": 99, "gpus": 3}, {"good": 98, "gpus": 3}, {"good": 99, "gpus": 3}],
        right=[{"good": 98, "gpus": 2}, {"good": 99, "gpus": 2}, {"good": 99, "gpus": 2}],
    )
    assert (found.verdict.kind, found.verdict.winner) == ("cheapest", "right")
    sentence = found.verdict.sentence
    assert sentence.startswith(
        "right meets the objective, 98.7 % (97.2 % to 100 %) of requests good against a target of 95.0 %, and is the cheapest"
    )
    assert "against dear. Not meeting it: cheap_but_bad 81.0 % (78.5 % to 83.5 %)." in sentence
    # 2 GPUs against 3: two thirds of the price per good token, give or take the few requests that differ.
    cost = found.versus("right")["gpu_hours"]
    assert cost.percent == pytest.approx(100)
    assert found.baseline == "cheap_but_bad"


def test_the_lower_end_of_the_interval_has_to_reach_the_target_not_the_mean(tmp_path: Path) -> None:
    found = report(tmp_path, shaky=[{"good": 99}, {"good": 90}, {"good": 99}], steady=[{"good": 94}, {"good": 94}, {"good": 93}])
    assert found.policies[0].figures["attainment"] == pytest.approx(0.96)
    assert (found.verdict.kind, found.verdict.winner) == ("none", None)
    assert found.verdict.sentence.startswith("None meets it: the target is 95.0 % of requests good. By attainment: shaky 96.0 %")


def test_a_lead_within_the_noise_is_not_called_a_lead(tmp_path: Path) -> None:
    found = report(
        tmp_path,
        a=[{"good": 99}, {"good": 98}, {"good": 99}, {"good": 98}],
        b=[{"good": 98}, {"good": 99}, {"good": 99}, {"good": 99}],
    )
    assert (found.verdict.kind, found.verdict.winner) == ("unsettled", None)
    assert "but whether it is cheaper than a is not settled" in found.verdict.sentence


@pytest.mark.parametrize(("repeats", "words"), [(1, "one pair of runs"), (2, "2 pairs of runs")])
def test_fewer_than_three_pairs_decide_nothing(tmp_path: Path, repeats: int, words: str) -> None:
    found = report(tmp_path, a=[{"good": 99}] * repeats, b=[{"good": 50}] * repeats)
    assert (found.verdict.kind, found.verdict.winner) == ("not enough data", None)
    assert found.verdict.sentence.startswith(f"Not enough data for a verdict: {words}; an interval needs at least 3")
    assert all(comparison.ci_low is None for comparison in found.comparisons)
    assert found.versus("b")["attainment"].percent == pytest.approx((50 / 99 - 1) * 100)


def test_one_policy_alone_meets_it_or_does_not(tmp_path: Path) -> None:
    met = report(tmp_path / "met", a=[{"good": 99}, {"good": 98}, {"good": 99}])
    missed = report(tmp_path / "missed", a=[{"good": 90}, {"good": 91}, {"good": 90}])
    assert met.verdict.sentence.startswith("a meets the objective: 98.7 %")
    assert missed.verdict.sentence.startswith("a does not meet the objective: 90.3 %")


def test_without_an_objective_there_is_no_verdict(tmp_path: Path) -> None:
    paths = [write_arm(tmp_path, policy=policy, good=90) for policy in "ab"]
    found = assemble(paths)
    assert found.verdict.kind == "no objective"
    assert "--slo" in found.verdict.sentence


def test_an_invalid_run_cannot_win(tmp_path: Path) -> None:
    late = {"good": 100, "validity": {"valid": False, "reasons": ["send lateness p99 is 9 ms, above 5 ms"]}}
    found = report(tmp_path, honest=[{"good": 97}, {"good": 98}, {"good": 97}], late=[late] * 3)
    assert found.verdict.winner == "honest"
    assert "late cannot win: send lateness p99 is 9 ms, above 5 ms." in found.verdict.sentence
    assert "late, repeat 2: send lateness p99 is 9 ms, above 5 ms" in found.faults


def test_pairs_with_an_invalid_run_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    bad = {"good": 10, "validity": {"valid": False, "reasons": ["sender above 80 % CPU"]}}
    found = report(tmp_path, a=[{"good": 97}] * 4, b=[{"good": 98}, bad, {"good": 98}, {"good": 98}])
    assert found.versus("b")["attainment"].n == 3
    assert found.policies[1].figures["attainment"] == pytest.approx(0.98)
    assert any("over the 3 valid of 4 runs" in warning for warning in found.warnings)


def test_arms_whose_answers_differ_in_length_did_not_do_the_same_work(tmp_path: Path) -> None:
    same = [{"good": 97}, {"good": 98}, {"good": 97}]
    short = [{"good": 99, "tokens": 9}] * 3
    found = report(tmp_path, a=same, b=short)
    assert found.verdict.winner == "a"
    assert "b cannot win: its answers to the same requests are 10.0% shorter than those under a." in found.verdict.sentence


def test_the_same_simulation_again_is_no_repeat(tmp_path: Path) -> None:
    ground = {"kind": "simulated", "ground": {"kind": "simulated", "detail": "profile"}}
    found = report(tmp_path, a=[{"good": 99, **ground}] * 3, b=[{"good": 98, **ground}] * 3)
    assert found.verdict.kind == "not enough data"
    assert any("a: 2 repeats are an earlier simulation again" in warning for warning in found.warnings)


def test_the_question_says_what_varied(tmp_path: Path) -> None:
    def trace(**shaping: Any) -> dict[str, Any]:
        return {"trace": {"name": "t", "sha256": "0", "rows": 100, "shaping": shaping}}

    again = report(tmp_path / "1", a=[{"good": 99, **trace()}] * 3)
    jittered = report(tmp_path / "2", a=[{"good": 99 - i, **trace(jitter_s=2.0, seed=i)} for i in range(3)])
    windows = report(tmp_path / "3", a=[{"good": 99, **trace(from_s=600 * i)} for i in range(3)])
    assert [r.question for r in (again, jittered, windows)] == [
        "this trace again", "this trace again (arrivals jittered by 2 s)", "windows like these",
    ]  # fmt: skip

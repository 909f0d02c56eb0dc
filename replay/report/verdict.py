"""The one declared decision: among the policies that meet the objective, the cheapest.

A policy meets it where the lower end of the 95 % interval of its SLO attainment over repeats reaches the target. Where none
does, the answer is "none meets it", ranked by attainment. Every other figure of a report is descriptive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from replay.report.compare import PAIRS_MIN, PAIRS_USEFUL, Comparison, Interval
from replay.report.formats import percent, share, value
from replay.slo import Slo

TARGET: Final = 0.95
# What "cheapest" is counted in: the first of these that every policy that meets the objective has.
COST_METRICS: Final = ("usd_per_1m_good_tokens", "gpu_hours_per_1m_good_tokens")
_COST_WORDS: Final = {
    "usd_per_1m_good_tokens": "1M SLO-good tokens",
    "gpu_hours_per_1m_good_tokens": "1M SLO-good tokens (no price known)",
}


class Standing(NamedTuple):
    """What the decision needs of a policy. ``interval`` is of its attainment; ``faults`` are what disqualifies it."""

    policy: str
    attainment: float | None
    interval: Interval | None
    costs: dict[str, float | None]
    faults: list[str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision. ``winner`` is set only where ``kind`` is "cheapest".

    kind  "cheapest" | "unsettled" | "none" | "not enough data" | "no objective" | "not comparable"
    """

    kind: str
    sentence: str
    winner: str | None = None


# Asks for one metric of two policies, the second against the first.
Ask = Callable[[str, str, str], Comparison]


def decide(standings: Sequence[Standing], slo: Slo, target: float, repeats: int, ask: Ask) -> Verdict:
    """The verdict over ``standings``; ``repeats`` is the smallest number of pairs that any of them has."""
    if not slo:
        return Verdict("no objective", "No verdict: no objective was set. Add one with --slo 'ttft<=1s,tpot<=50ms'.")
    able = [standing for standing in standings if not standing.faults]
    barred = "".join(f" {s.policy} cannot win: {s.faults[0]}." for s in standings if s.faults)
    if not able:
        return Verdict("none", f"No verdict: no policy has a valid run.{barred}")
    if repeats < PAIRS_MIN:
        return Verdict("not enough data", _not_enough(able, repeats) + barred)
    meeting = [s for s in able if s.interval is not None and s.interval.low >= target]
    if not meeting:
        return Verdict("none", _none_meets(able, target) + barred)
    verdict = _cheapest(meeting, target, ask) if len(able) > 1 else _alone(meeting[0], target)
    missing = _ranked([s for s in able if s not in meeting])
    failing = f" Not meeting it: {missing}." if missing else ""
    return Verdict(verdict.kind, verdict.sentence + failing + barred, verdict.winner)


def _attained(standing: Standing) -> str:
    if standing.interval is None:
        return f"{share(standing.attainment)}"
    return f"{share(standing.attainment)} ({share(standing.interval.low)} to {share(standing.interval.high)})"


def _ranked(standings: Sequence[Standing]) -> str:
    ordered = sorted(standings, key=lambda s: (-(s.attainment or 0), s.policy))
    return ", ".join(f"{s.policy} {_attained(s)}" for s in ordered)


def _not_enough(able: Sequence[Standing], repeats: int) -> str:
    one, many = ("valid run", "valid runs") if len(able) == 1 else ("pair of runs", "pairs of runs")
    count = {0: f"no {one}", 1: f"one {one}"}.get(repeats, f"{repeats} {many}")
    return (
        f"Not enough data for a verdict: {count}; an interval needs at least {PAIRS_MIN}, a useful one {PAIRS_USEFUL}. "
        f"SLO attainment as measured: {_ranked(able)}."
    )


def _none_meets(able: Sequence[Standing], target: float) -> str:
    if len(able) == 1:
        return f"{able[0].policy} does not meet the objective: {_attained(able[0])} of requests are good, target {share(target)}."
    return f"None meets it: the target is {share(target)} of requests good. By attainment: {_ranked(able)}."


def _alone(standing: Standing, target: float) -> Verdict:
    sentence = f"{standing.policy} meets the objective: {_attained(standing)} of requests are good, target {share(target)}."
    return Verdict("cheapest", sentence, standing.policy)


def _cheapest(meeting: Sequence[Standing], target: float, ask: Ask) -> Verdict:
    """The cheapest of those that meet the objective, and whether its lead over the others is more than noise."""
    metric = next((m for m in COST_METRICS if all(s.costs[m] is not None for s in meeting)), None)
    if metric is None:
        return Verdict(
            "unsettled",
            f"Meeting the target of {share(target)}: {_ranked(meeting)}. Which is cheapest is unknown: no cost was measured.",
        )
    first, *others = sorted(meeting, key=lambda s: (s.costs[metric] or 0, s.policy))
    price = f"{value(first.costs[metric], 'USD' if metric.startswith('usd') else 'GPU-h')} per {_COST_WORDS[metric]}"
    opening = f"{first.policy} meets the objective, {_attained(first)} of requests good against a target of {share(target)},"
    if not others:
        return Verdict("cheapest", f"{opening} at {price}; it is the only one that does.", first.policy)
    against = [ask(other.policy, first.policy, metric) for other in others]
    # Not shown to be cheaper: the interval of the ratio reaches 0 %.
    level = [c.baseline for c in against if c.ci_high is None or c.ci_high >= 0]
    nearest = against[0]
    span = "" if nearest.ci_low is None else f" (interval {percent(nearest.ci_low)} to {percent(nearest.ci_high)})"
    lead = f"{percent(nearest.percent)}{span} against {nearest.baseline}"
    if level:
        return Verdict(
            "unsettled",
            f"{opening} at {price}, the lowest; but whether it is cheaper than {', '.join(level)} is not settled: {lead}.",
        )
    return Verdict("cheapest", f"{opening} and is the cheapest that does: {price}, {lead}.", first.policy)

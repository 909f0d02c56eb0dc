"""Paired differences between two policies, each interval with the question that it answers.

An interval is Student's t over repeat pairs on ln(B/A), shown as a percentage: the method that covers what it says with
few repeats, where textbook block bootstraps of bursty traffic cover 70 to 85 % instead of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from scipy.special import stdtrit

from replay.report.metrics import METRICS

PAIRS_MIN: Final = 3  # two pairs have almost no power: t(1) is 12.7 standard errors wide
PAIRS_USEFUL: Final = 5
LEVEL: Final = 0.95

Figures = Mapping[str, float | None]


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Metric ``metric`` of ``policy`` (b) against ``baseline`` (a).

    difference is b - a, percent the ratio from ln(b/a) over pairs; ci_low, ci_high its interval in percent. Null: cannot be said,
    and ``note`` says why. ``n`` counts the pairs of runs.
    """

    metric: str
    unit: str
    better: str | None
    baseline: str
    policy: str
    a: float | None
    b: float | None
    difference: float | None
    percent: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    question: str
    note: str


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Student's t interval of the mean of independent values; None for fewer than ``PAIRS_MIN``."""
    count = len(values)
    if count < PAIRS_MIN:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stdtrit(count - 1, (1 + level) / 2)) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def compare(
    baseline: str, policy: str, whole: tuple[Figures, Figures], pairs: Sequence[tuple[Figures, Figures]], question: str
) -> list[Comparison]:
    """Every metric of ``policy`` against ``baseline``: ``whole`` holds their figures over all repeats, ``pairs`` by repeat."""
    return [_compare_one(metric.name, metric.unit, metric.better, baseline, policy, whole, pairs, question) for metric in METRICS]


def _compare_one(
    name: str, unit: str, better: str | None, baseline: str, policy: str, whole: tuple[Figures, Figures],
    pairs: Sequence[tuple[Figures, Figures]], question: str,
) -> Comparison:  # fmt: skip
    a, b = whole[0][name], whole[1][name]
    difference = b - a if a is not None and b is not None and math.isfinite(a) and math.isfinite(b) else None
    percent, low, high, note = _ratio_of([(left[name], right[name]) for left, right in pairs])
    return Comparison(
        name, unit, better, baseline, policy, a, b, difference, percent, low, high, len(pairs), question if low is not None else "",
        note,
    )  # fmt: skip


def _ratio_of(
    pairs: Sequence[tuple[float | None, float | None]],
) -> tuple[float | None, float | None, float | None, str]:
    """(percent, its interval's ends, why one is missing) of b/a over pairs."""
    logs: list[float] = []
    for a, b in pairs:
        if a is None or b is None:
            return None, None, None, "not measured in every pair"
        if math.isinf(a) or math.isinf(b):
            return None, None, None, "beyond the time-out in a run: failures decide, not this figure"
        if a <= 0 or b <= 0:
            return None, None, None, "zero in a run: no ratio"
        logs.append(math.log(b / a))
    if not logs:
        return None, None, None, too_few(0)
    found = t_interval(logs)
    if found is None:
        return as_percent(math.fsum(logs) / len(logs)), None, None, too_few(len(logs))
    return as_percent(found.mean), as_percent(found.low), as_percent(found.high), ""


def as_percent(log_ratio: float) -> float:
    """ln(B/A) as the percentage by which B is above A."""
    return math.expm1(log_ratio) * 100


def too_few(pairs: int) -> str:
    """Why there is no interval, in the words of the report."""
    if pairs == 0:
        return "no pair of valid runs"
    return "one pair: not enough data" if pairs == 1 else f"{pairs} pairs: not enough data"

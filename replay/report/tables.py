"""The rows that terminal, Markdown and page share, as text: they differ in layout, never in a figure."""

from __future__ import annotations

from typing import Final, NamedTuple

from replay.records import STATUSES
from replay.report.assemble import Arm, Policy, Report
from replay.report.compare import Comparison
from replay.report.formats import NOT_MEASURED, difference, percent, seconds, share, value
from replay.report.metrics import METRICS, QUANTILES, Metric

_BY_NAME: Final = {metric.name: metric for metric in METRICS}
# What a difference is worth reading for, in this order; the page and the CSV hold all of them.
KEY_METRICS: Final = (
    "attainment", "goodput_rps", "usd_per_1m_good_tokens", "usd_per_1m_output_tokens", "gpu_hours", "ttft_p50_s", "ttft_p95_s",
    "ttft_p99_s", "tpot_p50_s", "tpot_p95_s", "e2e_p95_s",
)  # fmt: skip

GLOSSARY: Final = {
    "TTFT": "first non-empty token − scheduled time (a late send counts); beside it from the actual send",
    "TPOT": "(last token − first token) / (output tokens − tokens of the first chunk); undefined for an answer of one chunk",
    "E2E": "end of the answer − scheduled time; the phases sum to it",
    "p50, p95, p99": "the smallest value that 50, 95 or 99 % of the requests do not exceed (inverted distribution function); "
    "of several repeats the mean of each one's",
    "of all that arrived": "the same with every failure infinitely late and clients that left taken out; "
    "a quantile among the failures prints as “> time-out”",
    "good": "status ok and every term of the objective kept; attainment = good / arrived; goodput = good / seconds of the window",
    "window": "from the first scheduled arrival to the end of the schedule or of the last request, whichever is later, "
    "or to the cut; tokens, replicas and money are counted in the same one",
    "billed": "a replica from requested to stopped, cold start and drain included; GPU-hours = those × GPUs of the replica",
    "$ per 1M tokens": "GPU-hours × on-demand price pro rata, per 1M output tokens of ok (or of good) requests; "
    "“none” without such tokens, “unknown” without a price",
    "difference": "B against the baseline A: ln(B/A) averaged over pairs of repeats, as a percentage; its 95 % interval is "
    "Student's t over those pairs, from three pairs on. Intervals are not adjusted for the number of metrics or policies: "
    "only the verdict decides",
    "mean over repeats": "counts, seconds and money are means a run; ratios are recomputed from their sums",
}


class Cell(NamedTuple):
    """A figure of one policy. ``tone``: "better" or "worse" where the interval excludes no difference, else ""."""

    text: str
    percent: str = ""
    interval: str = ""
    absolute: str = ""
    note: str = ""
    tone: str = ""


class Row(NamedTuple):
    label: str
    better: str  # "lower", "higher" or ""
    cells: list[Cell]


class Section(NamedTuple):
    title: str
    rows: list[Row]


def text(policy: Policy, metric: Metric) -> str:
    """The figure in words where it is null: unknown (no price, no lifetimes), none (no tokens to share a cost), not measured."""
    number = policy.figures[metric.name]
    if number is None and metric.unit.startswith(("USD", "GPU-h")):
        amount = policy.totals["cost_usd" if metric.unit.startswith("USD") else "gpu_s"]
        tokens = policy.totals["good_tokens" if "good" in metric.name else "output_tokens"]
        return "unknown" if amount is None or tokens is None else "none"
    return value(number, metric.unit)


def sections(report: Report) -> list[Section]:
    """Every metric that was measured for some policy, in groups; the baseline is the first cell of a row."""
    found: dict[str, list[Row]] = {}
    for metric in METRICS:
        shown = any(policy.figures[metric.name] is not None for policy in report.policies)
        priced = metric.name in ("usd_per_1m_output_tokens", "usd_per_1m_good_tokens") and (
            bool(report.slo) or "good" not in metric.name
        )
        zero_phase = metric.name.startswith("phase_") and not any(policy.figures[metric.name] for policy in report.policies)
        if (shown or priced) and not zero_phase:
            cells = [_cell(policy, metric, report.versus(policy.name).get(metric.name)) for policy in report.policies]
            found.setdefault(metric.group, []).append(Row(metric.label, metric.better or "", cells))
    return [Section(title, rows) for title, rows in found.items()]


def _cell(policy: Policy, metric: Metric, comparison: Comparison | None) -> Cell:
    shown = text(policy, metric)
    if comparison is None or metric.better is None or comparison.percent is None:
        note = comparison.note if comparison and metric.better and comparison.a and comparison.b else ""
        return Cell(
            shown, note=note, absolute=difference(comparison.difference, metric.unit) if comparison and metric.better else ""
        )
    return Cell(
        shown, percent(comparison.percent), interval(comparison), difference(comparison.difference, metric.unit), comparison.note,
        _tone(comparison),
    )  # fmt: skip


def _tone(comparison: Comparison) -> str:
    low, high = comparison.ci_low, comparison.ci_high
    if low is None or high is None or low <= 0 <= high:
        return ""
    return "better" if (high < 0) == (comparison.better == "lower") else "worse"


def interval(comparison: Comparison) -> str:
    """The interval of a ratio, or nothing."""
    if comparison.ci_low is None:
        return ""
    return f"{percent(comparison.ci_low)} to {percent(comparison.ci_high)}"


def overview(report: Report) -> list[tuple[str, list[str]]]:
    """The short table: (label, one text a policy), quantiles side by side."""
    policies = report.policies
    rows = [("runs (valid)", [f"{len(p.arms)} ({sum(not arm.faults for arm in p.arms)})" for p in policies])]
    if report.slo:
        rows.append((_BY_NAME["attainment"].label, [_with_interval(p) for p in policies]))
        rows.append((_BY_NAME["goodput_rps"].label, [text(p, _BY_NAME["goodput_rps"]) for p in policies]))
    for kind, label in (
        ("ttft", "TTFT, ok"), ("ttft_all", "TTFT, all that arrived"), ("ttft_sent", "TTFT from the send, ok"), ("tpot", "TPOT, ok"),
        ("e2e", "E2E, ok"), ("e2e_all", "E2E, all that arrived"),
    ):  # fmt: skip
        rows.append(
            (
                f"{label}: {' / '.join(QUANTILES)}",
                [" / ".join(text(p, _BY_NAME[f"{kind}_{q}_s"]) for q in QUANTILES) for p in policies],
            )
        )
    rows.append(("arrived a run", [text(p, _BY_NAME["arrived"]) for p in policies]))
    rows += [(status, [_count(p, status) for p in policies]) for status in STATUSES if any(p.totals[status] for p in policies)]
    for label, kind in (("replicas ready: mean / peak", "ready"), ("replicas billed: mean / peak", "billed")):
        names = (f"replicas_{kind}_mean", f"replicas_{kind}_peak")
        rows.append((label, [" / ".join(text(p, _BY_NAME[name]) for name in names) for p in policies]))
    for name in ("gpu_hours", "usd_per_1m_output_tokens", *(("usd_per_1m_good_tokens",) if report.slo else ())):
        rows.append((_BY_NAME[name].label, [text(p, _BY_NAME[name]) for p in policies]))
    return rows


def _with_interval(policy: Policy) -> str:
    attained = share(policy.figures["attainment"])
    found = policy.attainment
    return attained if found is None else f"{attained} ({share(found.low)} to {share(found.high)})"


def _count(policy: Policy, status: str) -> str:
    count, arrived = policy.totals[status] or 0, policy.totals["arrived"] or 1
    return f"{value(count, 'requests')} ({share(count / arrived)})"


def differences(report: Report, *, absolute: bool = True) -> list[tuple[str, list[str]]]:
    """(label, difference of each policy from the baseline) of the key metrics; empty where nothing was compared.

    ``absolute=False`` leaves the absolute difference out where there is a relative one: for narrow places.
    """
    rows = []
    for name in KEY_METRICS:
        found = [report.versus(policy.name).get(name) for policy in report.policies[1:]]
        if any(c is not None and (c.percent is not None or c.difference is not None) for c in found):
            rows.append((f"{_BY_NAME[name].label} ({_BY_NAME[name].better} is better)", [_words(c, absolute) for c in found]))
    return rows


def _words(comparison: Comparison | None, absolute: bool) -> str:
    if comparison is None:
        return NOT_MEASURED
    apart = difference(comparison.difference, comparison.unit)
    if comparison.percent is None:
        return f"{apart} ({comparison.note})"
    relative = f"{percent(comparison.percent)} ({interval(comparison) or comparison.note})"
    return f"{apart}, {relative}" if absolute else relative


def run_rows(report: Report) -> list[list[str]]:
    """One row a run: policy, repeat, id, seed, rows, conservation, send lateness, validity."""
    return [
        [
            arm.policy, str(arm.repeat), arm.name, str(arm.manifest.get("seed", NOT_MEASURED)),
            value(arm.figures["arrived"], "requests"), _conserved(arm), _late(arm),
            "INVALID: " + "; ".join(arm.faults) if arm.faults else "valid",
        ]
        for policy in report.policies
        for arm in policy.arms
    ]  # fmt: skip


RUN_HEADINGS: Final = ("policy", "repeat", "run", "seed", "planned", "planned = sum of statuses", "sent late p50 / p99", "validity")


def _conserved(arm: Arm) -> str:
    return {None: "no plan to hold it against", True: "yes", False: "no"}[arm.conserved]


def _late(arm: Arm) -> str:
    late = (arm.measured.totals["late_p50_s"], arm.measured.totals["late_p99_s"])
    return " / ".join(NOT_MEASURED if value_s is None else seconds(value_s) for value_s in late)


def trace_words(report: Report) -> str:
    """Which traffic it was: name, requests, seconds, peak to mean."""
    line, trace = report.policies[0].timeline, report.policies[0].arms[0].manifest.get("trace") or {}
    shaping = ", ".join(
        f"{key} {setting}" for key, setting in (trace.get("shaping") or {}).items() if setting not in (None, 0, 1, 0.0, 1.0)
    )
    burst = "" if line.peak_to_mean is None else f", busiest 10 s {line.peak_to_mean:.1f} × the mean"
    return f"{trace.get('name', 'unnamed trace')}: {line.requests:,} requests in {line.span_s:,.0f} s{burst}" + (
        f" ({shaping})" if shaping else ""
    )


def price_words(report: Report) -> str:
    """Price, source and date of every cost in the report."""
    priced = [policy.arms[0].manifest.get("prices") or {} for policy in report.policies]
    found = [
        f"${price['usd_per_gpu_hour']:g} per GPU-hour {price.get('gpu', '')} "
        f"({price.get('source', 'source not stated')}, {price.get('date', 'no date')})"
        for price in priced
        if price.get("usd_per_gpu_hour") is not None
    ]
    return "; ".join(dict.fromkeys(found)) or "unknown"

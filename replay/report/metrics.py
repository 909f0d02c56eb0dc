"""One run -> its totals; totals -> figures. Every formula of the report is in this file.

Totals add up: the totals of a policy are the means of its runs' totals, and ratios are recomputed from those, so that a
ratio over repeats is a ratio of sums and no mean of ratios. Quantiles stay per-run quantiles, averaged over repeats
(what the interval is about, too: the pooled quantile of all repeats is another quantity).

A quantile q of n values is the smallest value that at least q * n of them do not exceed (the inverted distribution
function, Hyndman-Fan type 1): always a value that occurred, and defined where failures count as infinitely late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from replay.policies import costs
from replay.records import NS_PER_S, PHASES, STATUSES
from replay.report.load import Run
from replay.slo import Slo

Values = npt.NDArray[np.float64]
Totals = dict[str, float | None]  # null: not measured; inf: beyond the finite mass of a quantile

QUANTILES: Final = {"p50": 500, "p95": 950, "p99": 990}  # in per mille, so that ranks are exact integers
TAIL_PERMILLE: Final = 950  # "the slowest 5 %" of the phase plot
LENGTH_TOLERANCE: Final = 0.10  # an answer further off its recorded length than this is counted as off


@dataclass(frozen=True, slots=True)
class Measured:
    """What a report keeps of a run: totals, and sorted samples (ok requests) for the distributions.

    samples   {"ttft_s" | "tpot_s": ascending seconds}     failures  requests that count as infinitely late
    tokens    output tokens by request, NaN where it was not ok
    """

    totals: Totals
    samples: dict[str, Values]
    failures: int
    tokens: npt.NDArray[np.float32]


class Metric(NamedTuple):
    """A figure of the report: its name in CSV and JSON, how people read it, and how it comes out of totals."""

    name: str
    label: str
    unit: str  # s | share | requests | 1/s | tokens/s | replicas | GPU-h | USD | USD/1M | GPU-h/1M
    better: str | None  # "lower", "higher" or None: neither
    group: str
    of: Callable[[Totals], float | None]


def quantile(ascending: Values, permille: int, infinite: int = 0) -> float | None:
    """The quantile of ``ascending`` and ``infinite`` more values beyond all of them; inf where it falls among those.

    >>> quantile(np.array([1.0, 2.0, 3.0, 4.0]), 500)
    2.0
    >>> quantile(np.array([1.0, 2.0, 3.0]), 950, infinite=1)
    inf
    """
    count = len(ascending) + infinite
    if count == 0:
        return None
    rank = -(-count * permille // 1000)  # ceil
    return float(ascending[rank - 1]) if rank <= len(ascending) else math.inf


def measure(run: Run, slo: Slo) -> Measured:
    """Totals and samples of one run."""
    rows = run.requests
    is_ok = rows["status"] == "ok"
    ok = rows[is_ok]
    counts = rows["status"].value_counts()
    totals: Totals = {"arrived": float(len(rows)), **{status: float(counts.get(status, 0)) for status in STATUSES}}
    # A client that left says nothing about how late its answer would have been; every other failure is infinitely late.
    failures = len(rows) - len(ok) - int(totals["cancelled"] or 0)
    samples = {name: _ascending(ok[name]) for name in ("ttft_s", "ttft_sent_s", "tpot_s", "e2e_s")}
    totals |= _latencies(samples, failures)
    totals |= _tokens(ok, is_good(ok, slo) if slo else None)
    totals |= _phases(ok, totals["e2e_p95_s"])
    totals |= _fleet(run)
    late_s = _ascending(rows["late_s"])
    totals["late_p50_s"], totals["late_p99_s"] = quantile(late_s, 500), quantile(late_s, 990)
    tokens = rows["output_tokens"].where(is_ok).to_numpy(np.float32)
    return Measured(totals, {name: samples[name] for name in ("ttft_s", "tpot_s")}, failures, tokens)


def is_good(ok: pd.DataFrame, slo: Slo) -> Any:
    """Which ``ok`` rows kept every term of the objective.

    A term whose value was not measured is not kept. TPOT is kept by an answer too short to have one.
    """
    good = np.full(len(ok), True)
    for limit_s, name in ((slo.ttft_s, "ttft_s"), (slo.e2e_s, "e2e_s")):
        if limit_s is not None:
            good &= (ok[name] <= limit_s).to_numpy()
    if slo.tpot_s is not None:
        too_short = ok["output_tokens"] - ok["first_chunk_tokens"].clip(lower=1).fillna(1) <= 0
        good &= ((ok["tpot_s"] <= slo.tpot_s) | too_short).to_numpy()
    return good


def pool(runs: Sequence[Totals]) -> Totals:
    """Totals of a policy: the mean over its runs, the maximum of peaks. Null in one run is null in all of them."""
    pooled: Totals = {}
    for name in runs[0]:
        values = [value for totals in runs if (value := totals[name]) is not None]
        if len(values) < len(runs):
            pooled[name] = None
        else:
            pooled[name] = max(values) if name.endswith("_peak") else math.fsum(values) / len(values)
    return pooled


def figures(totals: Totals) -> dict[str, float | None]:
    """Every metric of ``METRICS`` out of totals, by name."""
    return {metric.name: metric.of(totals) for metric in METRICS}


def _ascending(values: pd.Series[float]) -> Values:
    return np.sort(values.dropna().to_numpy(np.float64))


def _latencies(samples: dict[str, Values], failures: int) -> Totals:
    """Each latency over ``ok`` alone, and over all that arrived: with the failures as infinitely late."""
    found: Totals = {}
    for name, ascending in samples.items():
        kind = name.removesuffix("_s")
        for label, permille in QUANTILES.items():
            found[f"{kind}_{label}_s"] = quantile(ascending, permille)
            found[f"{kind}_all_{label}_s"] = quantile(ascending, permille, infinite=failures)
    return found


def _tokens(ok: pd.DataFrame, good: Any | None) -> Totals:
    """Tokens of ``ok`` and of good requests; answers without ``usage`` are counted apart, not as 0 tokens of a total."""
    tokens = ok["output_tokens"]
    known = bool(tokens.notna().any()) or not len(ok)
    off = (tokens - ok["recorded_output_tokens"]).abs() > LENGTH_TOLERANCE * ok["recorded_output_tokens"]
    return {
        "output_tokens": float(tokens.sum()) if known else None,
        "good": None if good is None else float(good.sum()),
        "good_tokens": None if good is None or not known else float(tokens[good].sum()),
        "no_usage": float(tokens.isna().sum()),
        "length_off": float(off.sum()),
    }


def _phases(ok: pd.DataFrame, tail_from_s: float | None) -> Totals:
    """Mean seconds of each phase over ``ok`` requests, and over their slowest 5 % by E2E."""
    found: Totals = {}
    tail = ok[ok["e2e_s"] >= tail_from_s] if tail_from_s is not None else ok
    for phase in PHASES:
        for label, rows in (("phase", ok), ("tail", tail)):
            values_ns = rows[f"{phase}_ns"]
            measured = bool(values_ns.notna().any())
            found[f"{label}_{phase}_s"] = float(values_ns.sum()) / len(rows) / NS_PER_S if measured else None
    return found


def _fleet(run: Run) -> Totals:
    """Replicas and money inside the run's window. No lifetimes: somebody else's fleet, so not known."""
    end_ns = round(run.window_s * NS_PER_S)
    found: Totals = {"window_s": run.window_s, "ready_replica_s": None, "replicas_ready_peak": None, "queue_peak": None}
    found |= dict.fromkeys(("replica_s", "gpu_s", "replicas_billed_peak"))
    if run.lifetimes:
        found["replica_s"] = costs.replica_seconds(run.lifetimes, 0, end_ns)
        found["gpu_s"] = costs.gpu_seconds(run.lifetimes, 0, end_ns)
        found["replicas_billed_peak"] = float(costs.replicas_peak(run.lifetimes, 0, end_ns))
    states = run.states[run.states["at_s"] <= run.window_s]
    if len(states):
        from_s = states["at_s"].to_numpy().clip(min=0)
        held_s = np.diff(np.append(from_s, run.window_s))  # a sample holds until the next one
        if (covered_s := float(held_s.sum())) > 0:
            found["ready_replica_s"] = float(states["ready"].to_numpy() @ held_s) / covered_s * run.window_s
        found["replicas_ready_peak"] = float(states["ready"].max())
        found["queue_peak"] = float(states["queued"].max())
    found["cost_usd"] = costs.cost_usd(found["gpu_s"], (run.manifest.get("prices") or {}).get("usd_per_gpu_hour"))
    return found


def _get(name: str) -> Callable[[Totals], float | None]:
    return lambda totals: totals[name]


def _ratio(part: str, whole: str) -> Callable[[Totals], float | None]:
    def ratio(totals: Totals) -> float | None:
        above, below = totals[part], totals[whole]
        return None if above is None or not below else above / below

    return ratio


def _per_million(amount: str, tokens: str, scale: float = 1.0) -> Callable[[Totals], float | None]:
    def per_million(totals: Totals) -> float | None:
        found = costs.per_million(totals[amount], totals[tokens])
        return None if found is None else found * scale

    return per_million


def _latency_metrics() -> list[Metric]:
    kinds = (
        ("ttft", "TTFT", "latency of ok requests"),
        ("tpot", "TPOT", "latency of ok requests"),
        ("e2e", "E2E", "latency of ok requests"),
        ("ttft_all", "TTFT", "latency of all that arrived (a failure is infinitely late)"),
        ("tpot_all", "TPOT", "latency of all that arrived (a failure is infinitely late)"),
        ("e2e_all", "E2E", "latency of all that arrived (a failure is infinitely late)"),
        ("ttft_sent", "TTFT from the send", "latency of ok requests, from the actual send"),
    )
    return [
        Metric(f"{kind}_{q}_s", f"{label} {q}", "s", "lower", group, _get(f"{kind}_{q}_s"))
        for kind, label, group in kinds
        for q in QUANTILES
    ]


_SLO, _REQUESTS, _FLEET, _COST = "service level", "requests a run", "replicas", "cost (on demand, pro rata)"
_WHERE = "where the time went (mean of ok requests)"
METRICS: Final[tuple[Metric, ...]] = (
    Metric("attainment", "SLO attainment", "share", "higher", _SLO, _ratio("good", "arrived")),
    Metric("goodput_rps", "goodput", "1/s", "higher", _SLO, _ratio("good", "window_s")),
    Metric("usd_per_1m_good_tokens", "$ per 1M SLO-good tokens", "USD/1M", "lower", _COST, _per_million("cost_usd", "good_tokens")),
    Metric("usd_per_1m_output_tokens", "$ per 1M output tokens of ok", "USD/1M", "lower", _COST,
           _per_million("cost_usd", "output_tokens")),
    Metric("cost_usd", "cost of the run", "USD", "lower", _COST, _get("cost_usd")),
    Metric("gpu_hours", "GPU-hours", "GPU-h", "lower", _COST, lambda totals: _hours(totals["gpu_s"])),
    Metric("gpu_hours_per_1m_good_tokens", "GPU-hours per 1M SLO-good tokens", "GPU-h/1M", "lower", _COST,
           _per_million("gpu_s", "good_tokens", 1 / costs.S_PER_HOUR)),
    *_latency_metrics(),
    Metric("arrived", "arrived", "requests", None, _REQUESTS, _get("arrived")),
    *(Metric(status, status, "requests", "higher" if status == "ok" else "lower", _REQUESTS, _get(status)) for status in STATUSES),
    Metric("output_tokens_per_s", "output tokens of ok per second", "tokens/s", "higher", _REQUESTS,
           _ratio("output_tokens", "window_s")),
    Metric("replicas_ready_mean", "ready, mean", "replicas", None, _FLEET, _ratio("ready_replica_s", "window_s")),
    Metric("replicas_ready_peak", "ready, peak", "replicas", None, _FLEET, _get("replicas_ready_peak")),
    Metric("replicas_billed_mean", "billed, mean", "replicas", "lower", _FLEET, _ratio("replica_s", "window_s")),
    Metric("replicas_billed_peak", "billed, peak", "replicas", None, _FLEET, _get("replicas_billed_peak")),
    Metric("queue_peak", "queue, peak", "requests", "lower", _FLEET, _get("queue_peak")),
    *(Metric(f"phase_{phase}_s", phase.replace("_", " "), "s", "lower", _WHERE, _get(f"phase_{phase}_s")) for phase in PHASES),
)  # fmt: skip


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / costs.S_PER_HOUR

"""The time lines of one run in a fixed number of bins, so that a plot costs the same at any number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from replay.records import NS_PER_S
from replay.report.load import Run

BINS: Final = 180  # about one every three pixels of a plot
BURST_S: Final = 10  # peak/mean of arrivals is per 10 s, as `tidegauge trace describe` counts it

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Values per bin of ``bin_s`` seconds; of the states only what the gateway sampled (no gateway of ours: None).

    arrivals_rps  requests per second     queued  the longest queue in the bin
    ready, starting, draining  replicas, the mean over the bin's time
    """

    bin_s: float
    arrivals_rps: Values
    queued: Values | None
    ready: Values | None
    starting: Values | None
    draining: Values | None
    requests: int
    span_s: float
    peak_to_mean: float | None


def timeline(run: Run) -> Timeline:
    """Bins over the window of the run."""
    window_s = max(run.window_s, 1e-9)
    edges_s = np.linspace(0, window_s, BINS + 1)
    arrivals_s = run.requests["scheduled_at_ns"].dropna().to_numpy(np.float64) / NS_PER_S
    counts = np.histogram(arrivals_s, edges_s)[0]
    states = run.states[run.states["at_s"] <= window_s]
    at_s = states["at_s"].to_numpy()
    has = len(states) > 0
    means = {name: _means(at_s, states[name].to_numpy(), edges_s) if has else None for name in ("ready", "starting", "draining")}
    return Timeline(
        bin_s=window_s / BINS, arrivals_rps=counts / (window_s / BINS),
        queued=_maxima(at_s, states["queued"].to_numpy(), edges_s) if has else None,
        requests=len(run.requests), span_s=float(np.ptp(arrivals_s)) if len(arrivals_s) else 0.0,
        peak_to_mean=_peak_to_mean(arrivals_s), **means,
    )  # fmt: skip


def _means(at_s: Values, held: Values, edges_s: Values) -> Values:
    """Time-weighted mean per bin of a value that holds until its next sample; before the first sample it is the first."""
    area = np.concatenate([[0.0], np.cumsum(held[:-1] * np.diff(at_s))])
    index = np.searchsorted(at_s, edges_s, side="right") - 1
    inside = index.clip(min=0)
    integral = area[inside] + held[inside] * (edges_s - at_s[inside])
    return np.diff(integral) / np.diff(edges_s)


def _maxima(at_s: Values, held: Values, edges_s: Values) -> Values:
    """The largest value held at any time in the bin."""
    first = (np.searchsorted(at_s, edges_s[:-1], side="right") - 1).clip(min=0)  # what holds as the bin opens
    past = np.searchsorted(at_s, edges_s[1:], side="left")
    return np.array([held[a : max(b, a + 1)].max() for a, b in zip(first, past, strict=True)], float)


def _peak_to_mean(arrivals_s: Values) -> float | None:
    """Largest over mean count of whole 10 s bins from the first arrival; None below two bins."""
    if not len(arrivals_s):
        return None
    since_s = arrivals_s - arrivals_s.min()
    whole = int(since_s.max() // BURST_S)
    counts = np.bincount((since_s // BURST_S).astype(int))[:whole]
    return float(counts.max() / counts.mean()) if whole >= 2 and counts.any() else None

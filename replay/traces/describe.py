"""What a trace is like, in numbers: how bursty, how long its prompts and answers, how much of its prompts is shared.

Definitions: a rate is rows over the span from first to last arrival. Bins start at the first arrival, the last, partial bin is
dropped; peak/mean and the index of dispersion (IDC, population variance over mean: 1 for Poisson traffic) are of the counts per
bin. CV is of the times between arrivals (population). Quantiles interpolate linearly.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from replay.records import NS_PER_S
from replay.traces.columns import IGNORED_KEY

BINS_S: Final = (10, 60)
QUANTILES: Final = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
Ints = npt.NDArray[np.int64]


def describe(table: pa.Table) -> dict[str, Any]:
    """Figures of a trace at full precision, ready for JSON; None where one is not defined (one row, a span below two bins)."""
    arrivals = table["arrival_at_ns"].to_numpy()
    step = quantum_ns(arrivals)
    return {
        "rows": len(table),
        "span_s": float(arrivals[-1] - arrivals[0]) / NS_PER_S if len(table) else None,
        **burstiness(arrivals),
        "prompt_tokens": _spread(table["prompt_tokens"]),
        "output_tokens": _spread(table["output_tokens"]),
        "prefix_reuse": prefix_reuse(table),
        "sessions": _distinct(table["session_id"]),
        "models": _distinct(table["model"]),
        "tenants": _distinct(table["tenant"]),
        "quantum_s": None if step is None else step / NS_PER_S,
        "warnings": _warnings(table, arrivals, step),
    }


def burstiness(arrivals: Ints) -> dict[str, float | None]:
    """rps, CV of the times between arrivals, and for each bin width peak/mean and IDC."""
    span_ns = int(arrivals[-1] - arrivals[0]) if len(arrivals) else 0
    gaps = np.diff(arrivals)
    figures: dict[str, float | None] = {
        "rps": len(arrivals) / span_ns * NS_PER_S if span_ns else None,
        "cv_interarrival": float(gaps.std() / gaps.mean()) if span_ns else None,
    }
    for width_s in BINS_S:
        counts = bin_counts(arrivals, width_s * NS_PER_S)
        enough = len(counts) >= 2 and counts.any()
        figures[f"peak_to_mean_{width_s}s"] = float(counts.max() / counts.mean()) if enough else None
        figures[f"idc_{width_s}s"] = float(counts.var() / counts.mean()) if enough else None
    return figures


def bin_counts(arrivals: Ints, width_ns: int) -> Ints:
    """Arrivals per whole bin since the first one."""
    if not len(arrivals):
        return np.zeros(0, dtype=np.int64)
    bins = (arrivals - arrivals[0]) // width_ns
    whole = int(bins[-1])  # the bin of the last arrival is the partial one
    return np.bincount(bins[bins < whole], minlength=whole).astype(np.int64)


def prefix_reuse(table: pa.Table) -> dict[str, float] | None:
    """With a cache that never evicts: the share of blocks seen before, and of requests whose first block was.

    Ids name a block together with all before it (Mooncake's do), so a request shares something iff it shares its first block.
    """
    hashes = table["prefix_hashes"].drop_null()
    blocks = np.concatenate([np.zeros(0, np.uint64), *(chunk.flatten().to_numpy() for chunk in hashes.chunks)])
    if not len(blocks):
        return None
    lengths = pc.list_value_length(hashes).to_numpy()
    first = blocks[(np.cumsum(lengths) - lengths)[lengths > 0]]
    blocks.sort()  # in place: np.unique would copy 24 M blocks twice more
    distinct = 1 + int(np.count_nonzero(blocks[1:] != blocks[:-1]))
    return {
        "blocks": len(blocks),
        "block_share": 1 - distinct / len(blocks),
        "request_share": (len(first) - len(np.unique(first))) / len(table),
    }


def quantum_ns(arrivals: Ints) -> float | None:
    """The step of quantised timestamps, None where they are not: several requests per instant, instants evenly apart.

    Evenly: of the gaps between instants, 95 % are within 1 % of a multiple of the median gap. A step below 10 ms shifts no
    request by more than a network does, and is not worth a warning.
    """
    instants = np.unique(arrivals)
    if len(instants) < 10 or len(arrivals) < 2 * len(instants):
        return None
    gaps = np.diff(instants)
    step = float(np.median(gaps))
    multiples = gaps / step
    even = np.abs(multiples - np.rint(multiples)) <= 0.01 * np.maximum(1, np.rint(multiples))
    return step if step >= NS_PER_S / 100 and even.mean() >= 0.95 else None


def _warnings(table: pa.Table, arrivals: Ints, step_ns: float | None) -> list[str]:
    warnings = []
    if step_ns is not None:
        instants, step_s = len(np.unique(arrivals)), step_ns / NS_PER_S
        warnings.append(
            f"timestamps are quantised: {instants:,} distinct values {step_s:g} s apart, {len(table) / instants:.1f} requests "
            f"each. Replayed raw that is a false burst every {step_s:g} s: spread them with --jitter {step_s:g}s"
        )
    for name, side in (("prompt_tokens", "prompt"), ("output_tokens", "output")):
        if zeros := pc.sum(pc.equal(table[name], 0)).as_py():
            warnings.append(f"{zeros:,} requests have 0 {side} tokens: a replay asks for 1")
    if ignored := (table.schema.metadata or {}).get(IGNORED_KEY, b"").decode():
        warnings.append(f"columns not understood and ignored: {ignored.replace(',', ', ')}")
    return warnings


def _spread(column: Any) -> dict[str, float] | None:
    values = column.to_numpy()
    if not len(values):
        return None
    quantiles = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return {"mean": float(values.mean()), **quantiles, "max": int(values.max()), "sum": int(values.sum())}


def _distinct(column: Any) -> int | None:
    """How many different values, None where the trace has none."""
    return pc.count_distinct(column).as_py() or None

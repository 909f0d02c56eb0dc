"""Figures of a trace: those published beside the recorded ones, and their definitions on small ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import traces
from replay.records import NS_PER_S
from replay.traces.columns import SCHEMA
from tests.traces_support import recorded_file, table_of, tables

AZURE = {
    "rows": 8819, "span_s": 3435.9, "rps": 2.57, "peak_to_mean_10s": 12.79, "peak_to_mean_60s": 4.18, "idc_10s": 71.6,
    "idc_60s": 164.0, "cv_interarrival": 13.15,
    "prompt_tokens": {"mean": 2047.8, "p50": 1469, "p99": 7436, "max": 7437},
    "output_tokens": {"mean": 27.9, "p50": 13, "p99": 251, "max": 1899},
}  # fmt: skip
MOONCAKE = {
    "rows": 12031, "span_s": 3537, "rps": 3.40, "peak_to_mean_10s": 1.97, "peak_to_mean_60s": 1.21, "idc_10s": 2.1, "idc_60s": 2.9,
    "cv_interarrival": 3.03,
    "prompt_tokens": {"mean": 12035, "p50": 6909, "p99": 85400, "max": 126195},
    "output_tokens": {"mean": 342.6, "p50": 350, "p99": 1119, "max": 2000},
    "prefix_reuse": {"block_share": 0.366},
}  # fmt: skip


def agrees(figures: dict[str, Any], published: dict[str, Any]) -> None:
    """Every published figure is ours, rounded to the digits that were published."""
    for name, value in published.items():
        if isinstance(value, dict):
            agrees(figures[name], value)
        else:
            digits = len(str(value).partition(".")[2])
            # numpy rounds half to even, the table's author maybe up: 1118.5 is published as 1119
            assert abs(figures[name] - value) <= 0.5000001 * 10**-digits, name


def test_the_shipped_hour_has_its_published_figures() -> None:
    figures = traces.describe(traces.read("azure-code-2023"))
    agrees(figures, AZURE)
    assert figures["warnings"] == []
    assert figures["prefix_reuse"] is None


@pytest.mark.traces
def test_mooncake_has_its_published_figures_and_the_warning() -> None:
    figures = traces.describe(traces.read(recorded_file("mooncake_conversation_trace.jsonl")))
    agrees(figures, MOONCAKE)
    assert figures["prefix_reuse"]["request_share"] == 12030 / 12031, "all but the first share block 0"
    assert figures["quantum_s"] == 3.0
    [warning] = figures["warnings"]
    assert "1,180 distinct values" in warning
    assert "--jitter 3s" in warning


def test_bins_start_at_the_first_arrival_and_the_partial_one_is_dropped() -> None:
    arrivals_s = [5, 6, 14.9, 15, 25.5, 26, 27, 36]  # bins from 5: three, one, three, and a partial one
    figures = traces.describe(table_of(*({"arrival_at_ns": round(at * NS_PER_S)} for at in arrivals_s)))
    assert figures["span_s"] == 31
    assert figures["rps"] == 8 / 31
    assert figures["peak_to_mean_10s"] == 3 / (7 / 3)
    assert figures["idc_10s"] == pytest.approx(np.var([3, 1, 3]) / np.mean([3, 1, 3]))
    assert figures["peak_to_mean_60s"] is None, "no whole minute"


def test_what_is_not_defined_is_none() -> None:
    one = traces.describe(table_of({"arrival_at_ns": 7}))
    assert (one["rows"], one["span_s"], one["rps"], one["cv_interarrival"], one["idc_10s"]) == (1, 0.0, None, None, None)
    none = traces.describe(SCHEMA.empty_table())
    assert (none["rows"], none["span_s"], none["prompt_tokens"]) == (0, None, None)


def test_prefix_reuse_counts_blocks_and_first_blocks() -> None:
    prompts = [[1, 2], [1, 3], [4], None, []]
    figures = traces.describe(table_of(*({"arrival_at_ns": at, "prefix_hashes": ids} for at, ids in enumerate(prompts))))
    assert figures["prefix_reuse"] == {"blocks": 5, "block_share": pytest.approx(1 / 5), "request_share": pytest.approx(1 / 5)}


def _shared_share(prompts: list[tuple[int, ...] | None]) -> tuple[int, int, int]:
    """Blocks, blocks seen before and requests that saw one, the slow way."""
    seen: set[int] = set()
    blocks = reused = sharing = 0
    for ids in prompts:
        sharing += bool(ids) and ids[0] in seen
        for block in ids or ():
            blocks, reused = blocks + 1, reused + (block in seen)
            seen.add(block)
    return blocks, reused, sharing


@given(chains=st.lists(st.none() | st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=20))
def test_prefix_reuse_is_what_an_unlimited_cache_would_serve(chains: list[list[int] | None]) -> None:
    # An id stands for its block and all before it, as in Mooncake's traces.
    prompts = [None if chain is None else tuple(hash(tuple(chain[: n + 1])) % 2**64 for n in range(len(chain))) for chain in chains]
    blocks, reused, sharing = _shared_share(prompts)
    figures = traces.describe(table_of(*({"arrival_at_ns": at, "prefix_hashes": ids} for at, ids in enumerate(prompts))))
    if blocks == 0:
        assert figures["prefix_reuse"] is None
    else:
        assert figures["prefix_reuse"]["block_share"] == pytest.approx(reused / blocks)
        assert figures["prefix_reuse"]["request_share"] == pytest.approx(sharing / len(chains))


def at_ns(instants: Any) -> list[dict[str, Any]]:
    return [{"arrival_at_ns": int(at)} for at in instants]


def test_only_coarse_regular_timestamps_are_called_quantised() -> None:
    rng = np.random.default_rng(1)
    exact = np.sort(rng.uniform(0, 600, 3000)) * NS_PER_S
    seconds = exact // NS_PER_S * NS_PER_S
    assert traces.describe(table_of(*at_ns(seconds)))["quantum_s"] == 1.0
    assert traces.describe(table_of(*at_ns(exact)))["quantum_s"] is None
    bursts = np.repeat(exact[:500], 6)  # many at one instant, but instants anywhere: bursts, no quantum
    assert traces.describe(table_of(*at_ns(bursts)))["quantum_s"] is None
    milliseconds = np.repeat(np.arange(1000), 3) * 1_000_000
    assert traces.describe(table_of(*at_ns(milliseconds)))["quantum_s"] is None, "a millisecond harms nobody"


def test_requests_without_tokens_are_pointed_out() -> None:
    figures = traces.describe(table_of({"arrival_at_ns": 0, "output_tokens": 0}, {"arrival_at_ns": 1}))
    assert figures["warnings"] == ["1 requests have 0 output tokens: a replay asks for 1"]


@given(table=tables)
def test_figures_are_json_of_any_trace(table: Any) -> None:
    assert json.loads(json.dumps(traces.describe(table), allow_nan=False))["rows"] == len(table)

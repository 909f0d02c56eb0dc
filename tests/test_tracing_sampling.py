"""Which traces are kept: the failed, the slow, one in N; at most K a second, and what is left out is counted."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from replay.records import ERROR, LIMITED, NS_PER_S, OK, Outcome, trace_id
from tests.tracing_support import outcome, quick, records
from tracing.batch import Batch
from tracing.sampling import Sampler, Sampling

NONE_BY_CHANCE = 2**63
LOW_BITS = 2**64 - 1


def choose(rows: list[Outcome], **rule: Any) -> tuple[list[int], Sampler]:
    sampler = Sampler(Sampling(**rule), "run-1")
    return sorted(sampler.choose(Batch.of(records(rows)))), sampler


def test_the_slow_and_the_failed_are_kept() -> None:
    rows = [quick(0), quick(1, status=ERROR), outcome(2), quick(3)]
    assert choose(rows, one_in=NONE_BY_CHANCE, slow_ttft_s=2.0)[0] == [1, 2]
    assert choose(rows, one_in=NONE_BY_CHANCE, slow_e2e_s=3.0)[0] == [1, 2]
    assert choose(rows, one_in=NONE_BY_CHANCE, slow_ttft_s=2.6)[0] == [1]  # the first token of row 2 came after 2.5013 s


def test_a_request_without_a_token_is_not_slow_by_that() -> None:
    assert choose([quick(0, output_tokens=0), outcome(1, first_token_at_ns=-1)], one_in=NONE_BY_CHANCE, slow_ttft_s=1.0)[0] == []


def test_one_in_n_is_a_matter_of_the_trace_id_alone() -> None:
    rows = [quick(request, due_at_ns=request * NS_PER_S) for request in range(2000)]
    kept, sampler = choose(rows, one_in=10)
    assert kept == [request for request in range(2000) if (trace_id("run-1", request) & LOW_BITS) % 10 == 0]
    assert 150 < len(kept) < 250
    assert sampler.over_rate == 0
    given_ids = [quick(0, trace_hi=9, trace_lo=20), quick(1, trace_hi=9, trace_lo=21)]
    assert choose(given_ids, one_in=10)[0] == [0]


def test_a_storm_of_one_kind_does_not_crowd_out_the_rest() -> None:
    """Within one second 2,000 requests are limited and then 200 are slow; at most 110 are kept: both kinds by their share."""
    rows = [quick(request, status=LIMITED if request < 2000 else OK) for request in range(2200)]
    kept, sampler = choose(rows, one_in=NONE_BY_CHANCE, per_s=110, slow_ttft_s=0.01)
    assert len(kept) == 110
    assert sampler.over_rate == 2090
    slow = sum(index >= 2000 for index in kept)
    assert 2 <= slow <= 25, slow


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([OK, LIMITED, ERROR])), max_size=60), st.integers(1, 8))
def test_never_more_than_k_a_second_and_nothing_vanishes(shape: list[tuple[int, int]], per_s: int) -> None:
    rows = [quick(number, due_at_ns=second * NS_PER_S, status=status) for number, (second, status) in enumerate(shape)]
    sampler = Sampler(Sampling(one_in=1, per_s=per_s), "run-1")
    kept = [row for half in (rows[::2], rows[1::2]) for row in (half[index] for index in sampler.choose(Batch.of(records(half))))]
    by_second = [row.done_at_ns // NS_PER_S for row in kept]
    assert all(by_second.count(second) <= per_s for second in by_second)
    assert len(kept) + sampler.over_rate == len(rows)


def test_slow_means_what_misses_the_target_unless_told_otherwise() -> None:
    assert Sampling.from_slo({"ttft_s": 0.5}, one_in=None) == Sampling(slow_ttft_s=0.5)
    assert Sampling.from_slo({"ttft_s": 0.5, "e2e_s": 9.0}, slow_ttft_s=3.0, one_in=7) == Sampling(7, 100, 3.0, 9.0)
    assert Sampling.from_slo({}) == Sampling()


def test_latencies_count_from_the_due_instant_or_from_the_gateway() -> None:
    late = outcome(0, sent_at_ns=2_000_000_000)
    batch = Batch.of(records([late, late._replace(scheduled_at_ns=-1), quick(2, output_tokens=1), outcome(3, done_at_ns=-1)]))
    assert batch.ttft_s[0] == 2.5013
    assert math.isclose(batch.ttft_s[1], 2.5006)
    assert math.isclose(batch.tpot_s[0], 0.8998 / 9)
    assert math.isnan(batch.tpot_s[2])
    assert math.isnan(batch.e2e_s[3])

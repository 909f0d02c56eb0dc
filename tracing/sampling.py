"""Which traces are kept: decided once, at the end, from the row."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from replay.records import NS_PER_S, OK, trace_id
from tracing.batch import Array, Batch

_SECONDS_REMEMBERED: Final = 600  # the longest drain: a record arrives at most that long after its request ended


class Sampling(NamedTuple):
    """Failed and slow requests are kept, and one in ``one_in`` of all; at most ``per_s`` traces a second.

    100 traces a second of 6 spans cost the recorder about 2 % of a core (33 us to build, 109 us to encode one).
    """

    one_in: int = 100
    per_s: int = 100
    slow_ttft_s: float = 5.0
    slow_e2e_s: float = 60.0

    @classmethod
    def from_slo(cls, slo: dict[str, float], **given: Any) -> Sampling:
        """Slow is what misses the target, where one is set; ``given`` values that are not None come first."""
        terms = {"slow_ttft_s": slo.get("ttft_s"), "slow_e2e_s": slo.get("e2e_s"), **_set(given)}
        return cls(**_set(terms))


class Sampler:
    """Applies ``Sampling``; counts what qualified and was left out for the rate."""

    def __init__(self, sampling: Sampling, run_id: str) -> None:
        self.sampling, self.over_rate = sampling, 0
        self._run_id = run_id
        self._kept_by_second: dict[int, int] = {}

    def choose(self, batch: Batch) -> list[int]:
        """Indices of the rows whose trace is kept."""
        records, rule = batch.records, self.sampling
        low = _low_bits(records, self._run_id)
        slow = (batch.ttft_s > rule.slow_ttft_s) | (batch.e2e_s > rule.slow_e2e_s)
        worth = np.flatnonzero((records["status"] != OK) | slow | (low % np.uint64(rule.one_in) == 0))
        # In the order of their hash, so that a storm of one kind of request does not crowd out every other kind.
        in_hash_order = worth[np.argsort(low[worth], kind="stable")]
        seconds = records["done_at_ns"] // NS_PER_S
        return [int(index) for index in in_hash_order if self._within_rate(int(seconds[index]))]

    def _within_rate(self, second: int) -> bool:
        kept = self._kept_by_second.get(second, 0)
        if kept >= self.sampling.per_s:
            self.over_rate += 1
            return False
        self._kept_by_second[second] = kept + 1
        if len(self._kept_by_second) > _SECONDS_REMEMBERED:
            del self._kept_by_second[min(self._kept_by_second)]
        return True


def _low_bits(records: Array, run_id: str) -> Array:
    """The lower 64 bits of every row's trace id, which any other sampler of the same trace would see too."""
    mask = (1 << 64) - 1
    given, requests = records["trace_lo"].tolist(), records["request_id"].tolist()
    return np.fromiter(
        (low or trace_id(run_id, request) & mask for low, request in zip(given, requests, strict=True)), np.uint64, len(given)
    )


def _set(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

"""A batch of outcome records with the columns that sampling and meters derive from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from replay.records import NS_PER_S, Outcome, trace_id

Array = npt.NDArray[Any]


class Batch(NamedTuple):
    """Records (dtype OUTCOME_DTYPE) and, row by row, their latencies in seconds; NaN where one is undefined."""

    records: Array
    ttft_s: Array  # due instant -> first non-empty token
    tpot_s: Array  # undefined for one token, or for one chunk that brought them all
    e2e_s: Array

    @classmethod
    def of(cls, records: Array) -> Batch:
        # A gateway does not know when a request was due: its clock starts at the last byte of the request.
        start = np.where(records["scheduled_at_ns"] >= 0, records["scheduled_at_ns"], records["gateway_at_ns"])
        first, last = records["first_token_at_ns"], records["last_token_at_ns"]
        # Tokens of the first chunk took no time of their own; an engine that reports no split sent one token in it.
        later_tokens = records["output_tokens"] - np.maximum(records["first_chunk_tokens"], 1)
        has_tpot = (first >= 0) & (last >= 0) & (later_tokens > 0)
        tpot = np.full(len(records), np.nan)
        np.divide(last - first, later_tokens * float(NS_PER_S), out=tpot, where=has_tpot)
        return cls(records, elapsed_s(start, first), tpot, elapsed_s(start, records["done_at_ns"]))

    def where(self, mask: Array) -> Batch:
        """The rows for which ``mask`` holds."""
        return Batch(*(column[mask] for column in self))


def elapsed_s(start_ns: Array, end_ns: Array) -> Array:
    """Seconds between two columns of instants; NaN where one of them was not measured."""
    return np.where((start_ns >= 0) & (end_ns >= 0), (end_ns - start_ns) / NS_PER_S, np.nan)


def trace_of(row: Outcome, run_id: str) -> int:
    """The 128-bit trace id of a row: the client's own where it sent one, else derived from run and request."""
    return row.trace_hi << 64 | row.trace_lo if row.trace_lo else trace_id(run_id, row.request_id)


def rows(records: Array, indices: Sequence[int] | Array) -> list[Outcome]:
    """Row views of some records."""
    return [Outcome._make(record) for record in records[indices].tolist()]

"""The columns every reader produces: exactly the fields of RecordedRequest, null where a source does not know one.

May live here: the schema, the rules that hold for a row of any format, order and zero of the time axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from replay.errors import InputError
from replay.records import RecordedRequest

_TYPES: Final = {"model": pa.string(), "session_id": pa.string(), "tenant": pa.string(), "prefix_hashes": pa.list_(pa.uint64())}
SCHEMA: Final = pa.schema([(name, _TYPES.get(name, pa.int64())) for name in RecordedRequest._fields])
REQUIRED: Final = ("arrival_at_ns", "prompt_tokens", "output_tokens")

# Longer than any context window (10 M tokens in 2026): what lies above is a broken row, and would be built as a prompt.
MAX_TOKENS: Final = 2**24
# 3.2 years. An arrival later than this after zero is wall-clock time (as Unix time it is March 1973), not time since the start.
MAX_SPAN_NS: Final = 10**17

_MOST: Final = {
    "arrival_at_ns": 2**63 - 1, "prompt_tokens": MAX_TOKENS, "output_tokens": MAX_TOKENS,
    "think_ns": MAX_SPAN_NS, "deadline_ns": MAX_SPAN_NS,
}  # fmt: skip

FORMAT_KEY: Final = b"tidegauge.format"
IGNORED_KEY: Final = b"tidegauge.ignored"


def rows(known: dict[str, Any]) -> pa.Table:
    """Known columns as a table of the whole schema. Raises InputError where a required value is missing or out of range."""
    for name, most in _MOST.items():
        if name not in known:
            continue
        low, high = (value or 0 for value in pc.min_max(known[name]).as_py().values())
        if low < 0 or high > most:
            raise InputError(f"{name} is {low if low < 0 else high}", rule=f"from 0 to {most}")
    if any(known[name].null_count for name in REQUIRED):
        raise InputError("a value is missing", rule=f"{', '.join(REQUIRED)} are known for every request")
    count = len(known["arrival_at_ns"])
    return pa.table([known[name] if name in known else pa.nulls(count, SCHEMA.field(name).type) for name in SCHEMA.names], SCHEMA)


def by_arrival(table: pa.Table) -> pa.Table:
    """The rows sorted by arrival; ties keep their order."""
    arrivals = table["arrival_at_ns"].to_numpy()
    if np.any(arrivals[1:] < arrivals[:-1]):
        return table.take(pa.array(np.argsort(arrivals, kind="stable")))
    return table


def numbered(table: pa.Table, first: int = 0) -> pa.Table:
    """The rows with request_id counting up."""
    return with_column(table, "request_id", np.arange(first, first + len(table)))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with one column of the schema replaced, by a numpy or an Arrow array."""
    column = pa.array(values, SCHEMA.field(name).type) if isinstance(values, np.ndarray) else values
    return table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)


def trace(parts: list[pa.Table], *, where: str, kind: str, ignored: tuple[str, ...]) -> pa.Table:
    """The finished trace out of a reader's parts: in order, numbered, wall-clock time counted from the first arrival.

    Times that already count from a start keep it, so that a plan with a quiet beginning is replayed with it.
    """
    table = numbered(by_arrival(pa.concat_tables([*parts, SCHEMA.empty_table()])))
    if not len(table):
        raise InputError("holds no requests", where=where, fix="record some traffic, or use the shipped hour azure-code-2023")
    arrivals = table["arrival_at_ns"].to_numpy()
    if arrivals[0] >= MAX_SPAN_NS:
        arrivals = arrivals - arrivals[0]
        table = with_column(table, "arrival_at_ns", arrivals)
    if arrivals[-1] >= MAX_SPAN_NS:
        raise InputError(
            f"the last request comes {arrivals[-1] / 1e9 / 86400:.0f} days after the zero", where=where,
            rule="all times count from one zero and span at most three years", fix="check the unit of the time column",
        )  # fmt: skip
    return table.replace_schema_metadata({FORMAT_KEY: kind, IGNORED_KEY: ",".join(ignored)})


def recorded(table: pa.Table) -> Iterator[RecordedRequest]:
    """Row views of a trace, in order."""
    for batch in table.select(SCHEMA.names).to_batches(max_chunksize=8192):
        columns = [column.to_pylist() for column in batch.columns]
        at = SCHEMA.get_field_index("prefix_hashes")
        columns[at] = [None if hashes is None else tuple(hashes) for hashes in columns[at]]
        yield from map(RecordedRequest._make, zip(*columns, strict=True))

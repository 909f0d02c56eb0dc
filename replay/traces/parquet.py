"""Our own Parquet: the columns of RecordedRequest as they are. A run's plan.parquet is such a trace.

Required: arrival_at_ns (since the trace's zero, or Unix time), prompt_tokens, output_tokens. Optional columns may be absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from replay.errors import InputError
from replay.traces.columns import REQUIRED, SCHEMA, rows
from replay.traces.source import Source

COLUMNS = REQUIRED


def columns_found(source: Source) -> tuple[str, ...]:
    return tuple(_open(source).schema_arrow.names)


def read(source: Source, columns: tuple[str, ...]) -> list[pa.Table]:
    try:
        table = _open(source).read(columns=[name for name in columns if name in SCHEMA.names])
        known = {name: _cast(name, table[name]) for name in table.column_names}
    except pa.ArrowException as error:
        raise InputError(str(error), where=str(source.path), rule=f"columns like {SCHEMA.to_string()}") from error
    try:
        return [rows(known)]
    except InputError as error:
        raise InputError(error.what, where=f"{source.path} row {_first_bad(known)}", rule=error.rule) from error


def write(table: pa.Table, path: Path) -> None:
    pq.write_table(table.select(SCHEMA.names), path)


def _open(source: Source) -> Any:
    if source.zipped:
        raise InputError("is a gzipped Parquet file", where=str(source.path), rule="Parquet compresses itself", fix="gunzip it")
    try:
        return pq.ParquetFile(source.path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"is no whole Parquet file: {error}", where=str(source.path), fix="copy the file again") from error


def _cast(name: str, column: Any) -> Any:
    if pa.types.is_temporal(column.type):  # its unit would silently be taken for nanoseconds
        raise pa.ArrowInvalid(f"column {name} is {column.type}")
    try:
        return column.cast(SCHEMA.field(name).type)
    except pa.ArrowException as error:
        raise pa.ArrowInvalid(f"column {name}: {error}") from error


def _first_bad(known: dict[str, Any]) -> int:
    """The first row (from 0) that ``rows`` refuses, found by halving."""
    low, high = 0, len(known["arrival_at_ns"])
    while high - low > 1:
        middle = (low + high) // 2
        try:
            rows({name: known[name].slice(low, middle - low) for name in REQUIRED})
            low = middle
        except InputError:
            high = middle
    return low

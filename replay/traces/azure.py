"""Azure LLM inference traces of 2023 and 2024: CSV of TIMESTAMP, ContextTokens, GeneratedTokens.

https://github.com/Azure/AzurePublicDataset. 2023 writes wall-clock time with 7 decimals and no zone, 2024 with 6 decimals (none
where they are zero) and +00:00. Neither knows sessions, tenants or prefixes.
"""

from __future__ import annotations

import re
from typing import Final

import pyarrow as pa
import pyarrow.csv

from replay.errors import InputError
from replay.traces.columns import MAX_TOKENS, SCHEMA, rows
from replay.traces.source import Parse, Source

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_RULE: Final = f"TIMESTAMP like 2023-11-16 18:17:03.9799600 or 2024-05-10 00:00:00.009930+00:00, token counts 0 to {MAX_TOKENS}"
_ZONED: Final = re.compile(rb"(Z|[+-]\d\d:?\d\d)[\s\"]*$")


def read(source: Source, columns: tuple[str, ...]) -> list[pa.Table]:
    """The rows; ``columns`` are the names in the header, in their order."""
    first_row = next((line for line in source.head().splitlines()[1:] if line.strip()), b"")
    stamps = first_row.split(b",")[columns.index("TIMESTAMP") :]
    return source.tables(_parser(columns, zoned=bool(stamps and _ZONED.search(stamps[0]))), header=True)


def _parser(columns: tuple[str, ...], *, zoned: bool) -> Parse:
    # Arrow parses ISO 8601 to the nanosecond; a file either has a zone on every row or on none.
    stamp = pa.timestamp("ns", "UTC" if zoned else None)
    convert = pa.csv.ConvertOptions(
        column_types={"TIMESTAMP": stamp, "ContextTokens": pa.int64(), "GeneratedTokens": pa.int64()},
        include_columns=COLUMNS, null_values=[],
    )  # fmt: skip
    layout = pa.csv.ReadOptions(column_names=columns)

    def parse(lines: bytes) -> pa.Table:
        if not lines.strip():
            return SCHEMA.empty_table()
        try:
            table = pa.csv.read_csv(pa.BufferReader(lines), layout, convert_options=convert)
        except pa.ArrowException as error:
            raise InputError(str(error).rpartition("error: ")[2].partition(":")[0], rule=_RULE) from error
        arrivals = table["TIMESTAMP"].cast(pa.int64())
        return rows({"arrival_at_ns": arrivals, "prompt_tokens": table["ContextTokens"], "output_tokens": table["GeneratedTokens"]})

    return parse

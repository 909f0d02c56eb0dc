"""JSON lines: Mooncake's traces, and our own superset of them.

Mooncake (https://github.com/kvcache-ai/Mooncake, FAST25-release): timestamp (ms), input_length, output_length (tokens) and
hash_ids, one id per started block of 512 prompt tokens. Ours adds, each optional: session_id, turn, think_ns, model, tenant,
priority, deadline_ns. timestamp may be a fraction (a 64-bit float is exact to the nanosecond for 2**52 ns, 52 days; to 0.25 us
for Unix time in ms).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import pyarrow as pa

from replay.errors import InputError
from replay.records import RecordedRequest
from replay.traces.columns import SCHEMA, recorded, rows
from replay.traces.source import Source

COLUMNS: Final = ("timestamp", "input_length", "output_length")


class Line(msgspec.Struct, gc=False, omit_defaults=True):
    """One request. 9e12 ms is the year 2255, the last that 64 bits of nanoseconds hold."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=9e12)]
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None
    session_id: str | None = None
    turn: int | None = None
    think_ns: int | None = None
    model: str | None = None
    tenant: str | None = None
    priority: int | None = None
    deadline_ns: int | None = None


KEYS: Final = Line.__struct_fields__
_RENAMED: Final = {"input_length": "prompt_tokens", "output_length": "output_tokens", "hash_ids": "prefix_hashes"}
_decoder = msgspec.json.Decoder(Line)
_RULE: Final = "one JSON object a line: timestamp in ms, input_length and output_length in tokens, hash_ids from 0 to 2**64-1"


def read(source: Source, columns: tuple[str, ...]) -> list[pa.Table]:
    return source.tables(_parse)


def _parse(lines: bytes) -> pa.Table:
    try:
        decoded = _decoder.decode_lines(lines)
        known = {_RENAMED.get(key, key): _column(key, decoded) for key in KEYS if key != "timestamp"}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError, pa.ArrowException) as error:
        raise InputError(str(error).replace("`$[0].", "`").replace("$[...]", "line"), rule=_RULE) from error
    if len(decoded) != lines.count(b"\n") and len(decoded) != sum(1 for line in lines.split(b"\n") if line.strip()):
        raise InputError("an object that is not alone on its line", rule=_RULE)
    stamps_ms = np.fromiter((line.timestamp for line in decoded), np.float64, len(decoded))
    whole_ms = np.floor(stamps_ms)
    arrivals = whole_ms.astype(np.int64) * 1_000_000 + np.rint((stamps_ms - whole_ms) * 1e6).astype(np.int64)
    return rows({"arrival_at_ns": pa.array(arrivals), **known})


def _column(key: str, decoded: list[Line]) -> Any:
    return pa.array([getattr(line, key) for line in decoded], SCHEMA.field(_RENAMED.get(key, key)).type)


def keys_found(head: bytes, where: str) -> tuple[str, ...]:
    """Keys of the objects on the first lines, in order of appearance. Raises InputError where the first line is no object."""
    found: dict[str, None] = {}
    for number, line in enumerate(head.split(b"\n")):
        try:
            found.update(dict.fromkeys(msgspec.json.decode(line, type=dict[str, msgspec.Raw])))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            if number == 0:
                raise InputError(f"first line: {error}", where=where, rule=_RULE) from error
            break  # a bad row, which reading will name, or the end of the head
    return tuple(found)


def write(table: pa.Table, path: Path) -> None:
    """The trace as lines; what is null is left out."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as stream:
        for batch in _batches(table):
            stream.write(encoder.encode_lines(batch))


def _batches(table: pa.Table) -> Iterable[list[Line]]:
    same = [key for key in KEYS if key in RecordedRequest._fields]
    lines = (
        Line(
            row.arrival_at_ns / 1e6, row.prompt_tokens, row.output_tokens,
            None if row.prefix_hashes is None else [*row.prefix_hashes], **{key: getattr(row, key) for key in same},
        )
        for row in recorded(table)
    )  # fmt: skip
    while batch := list(itertools.islice(lines, 8192)):
        yield batch

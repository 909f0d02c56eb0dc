"""Recorded traffic: read, describe, shape, write.

    table = traces.read("azure-code-2023")                      # format found from the content; a path, or the shipped hour
    table = traces.shape(table, traces.Shaping(busiest_s=90))   # the plan of a run
    traces.describe(table)["idc_10s"]

A trace is a pyarrow table of the fields of RecordedRequest. A format is one file with a ``read`` and one line in READERS.
May live here: files in, tables out. Randomness only from a seed that is handed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa

from replay.errors import InputError
from replay.traces import azure, columns, jsonl, parquet
from replay.traces.columns import SCHEMA, recorded
from replay.traces.describe import describe
from replay.traces.shaping import Shaping, shape
from replay.traces.source import Source

__all__ = [
    "READERS",
    "SCHEMA",
    "SHIPPED",
    "Shaping",
    "describe",
    "detect",
    "locate",
    "read",
    "recorded",
    "sha256",
    "shape",
    "write",
]

# CC-BY-4.0; data/ATTRIBUTION.md.
SHIPPED: Final = {"azure-code-2023": Path(__file__).parent / "data" / "azure_code_2023.csv.gz"}


class Reader(NamedTuple):
    """A format: which columns tell it, and how to read it (source and the columns found -> parts with SCHEMA)."""

    name: str
    container: str  # parquet | jsonl | csv
    tells: tuple[str, ...]  # a file with all of these is of this format
    knows: tuple[str, ...]  # columns beyond these are ignored, and describe says so
    read: Callable[[Source, tuple[str, ...]], list[pa.Table]]


READERS: Final = (
    Reader("parquet", "parquet", parquet.COLUMNS, tuple(SCHEMA.names), parquet.read),
    Reader("azure", "csv", azure.COLUMNS, azure.COLUMNS, azure.read),
    Reader("jsonl", "jsonl", jsonl.COLUMNS, jsonl.KEYS, jsonl.read),
)


def locate(path: str | Path) -> Path:
    """The file of a shipped trace's name (write ./name for a file that is called so), or the path as it is."""
    return SHIPPED.get(str(path), Path(path))


def read(path: str | Path) -> pa.Table:
    """The whole trace, sorted by arrival and numbered from 0; format and compression are found from the content.

    Raises InputError with file, line and rule for a bad row, and for a missing, empty or unknown file.
    """
    source = Source(locate(path))
    reader, found = _recognise(source)
    ignored = tuple(name for name in found if name not in reader.knows)
    return columns.trace(reader.read(source, found), where=str(source.path), kind=reader.name, ignored=ignored)


def detect(path: str | Path) -> str:
    """The name of the file's format."""
    return _recognise(Source(locate(path)))[0].name


def write(table: pa.Table, path: str | Path) -> None:
    """The trace as Parquet or JSON lines, by the ending of the name."""
    writers = {".parquet": parquet.write, ".jsonl": jsonl.write}
    target = Path(path)
    if target.suffix not in writers:
        raise InputError(
            f"cannot write {target.suffix or 'a file without an ending'}", where=str(path), rule=f"one of {', '.join(writers)}"
        )
    try:
        writers[target.suffix](table, target)
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}", where=str(path), fix="name a folder that exists"
        ) from error


def sha256(path: str | Path) -> str:
    """Of the uncompressed content, so that a file and its .gz are the same trace."""
    digest = hashlib.sha256()
    with Source(locate(path)).opened() as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _recognise(source: Source) -> tuple[Reader, tuple[str, ...]]:
    """The reader of a file, and the columns the file has."""
    head = source.head()
    if not head.strip():
        raise InputError("is empty", where=str(source.path), fix="record some traffic, or use the shipped hour azure-code-2023")
    if head.startswith(b"PAR1"):
        container, found = "parquet", parquet.columns_found(source)
    elif head.lstrip().startswith(b"{"):
        container, found = "jsonl", jsonl.keys_found(head, str(source.path))
    else:
        header = head.splitlines()[0].decode("utf-8", "backslashreplace")
        container, found = "csv", tuple(name.strip().strip('"') for name in header.split(","))
    for reader in READERS:
        if reader.container == container and set(reader.tells) <= set(found):
            return reader, found
    known = "; ".join(f"{reader.name}: {', '.join(reader.tells)}" for reader in READERS)
    raise InputError(
        f"unknown format, {container} with the columns {', '.join(found)[:300]!r}", where=str(source.path), rule=known,
        fix="write one JSON object a line with timestamp (ms), input_length and output_length",
    )  # fmt: skip

"""Reading: every format exactly, and every broken file as one clear error."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay import traces
from replay.errors import InputError
from replay.records import RecordedRequest
from replay.traces import source
from tests.traces_support import recorded_file, table_of, tables

HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
AZURE_2023 = HEADER + b"2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319601,3180,8\r\n2023-11-16 18:17:05,110,27"
AZURE_2024 = (
    HEADER + b"2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n2024-05-10 00:00:01.000001+00:00,1,1\n"
)
MOONCAKE = b"".join(
    json.dumps({"timestamp": at, "input_length": 600, "output_length": 7, "hash_ids": [0, number]}).encode() + b"\n"
    for number, at in enumerate((0, 0, 3000, 3001), start=1)
)

on_one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example writes the file anew


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def read(file: Path, content: bytes) -> pa.Table:
    file.write_bytes(content)
    return traces.read(file)


def refused(file: Path, content: bytes) -> InputError:
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        traces.read(file)
    return caught.value


def test_azure_2023_is_read_to_100_ns_with_its_last_line(file: Path) -> None:
    table = read(file, AZURE_2023)
    assert traces.detect(file) == "azure"
    assert table.schema.equals(traces.SCHEMA)
    assert [*traces.recorded(table)] == [
        RecordedRequest(0, 0, 4808, 10),
        RecordedRequest(1, 52_000_100, 3180, 8),
        RecordedRequest(2, 1_020_040_000, 110, 27),
    ]


def test_azure_2024_has_a_zone_and_sometimes_no_decimals(file: Path) -> None:
    assert read(file, AZURE_2024)["arrival_at_ns"].to_pylist() == [0, 990_070_000, 990_071_000]


def test_mooncake_keeps_prefixes_and_counts_from_its_own_zero(file: Path) -> None:
    table = read(file, MOONCAKE.replace(b'"timestamp": 0,', b'"timestamp": 12.345678,'))
    assert traces.detect(file) == "jsonl"
    assert table["arrival_at_ns"].to_pylist() == [12_345_678, 12_345_678, 3_000_000_000, 3_001_000_000]
    assert table["prefix_hashes"].to_pylist() == [[0, 1], [0, 2], [0, 3], [0, 4]]


def test_unix_time_counts_from_the_first_request(file: Path) -> None:
    lines = [{"timestamp": 1_700_000_000_000 + at, "input_length": 1, "output_length": 1} for at in (250.5, 0, 1000)]
    table = read(file, b"\n".join(json.dumps(line).encode() for line in lines))
    assert table["arrival_at_ns"].to_pylist() == [0, 250_500_000, 1_000_000_000]


@pytest.mark.parametrize("content", [AZURE_2023, AZURE_2024, MOONCAKE])
def test_gzip_byte_order_mark_and_blank_lines_change_nothing(file: Path, content: bytes) -> None:
    plain = read(file, content)
    digest = traces.sha256(file)
    assert read(file, gzip.compress(content)) == plain
    assert traces.sha256(file) == digest
    assert read(file, b"\xef\xbb\xbf" + content) == plain
    assert read(file, content.replace(b"\n", b"\n\n") + b"\n\n") == plain


@pytest.mark.parametrize("content", [AZURE_2023, MOONCAKE])
def test_blocks_of_any_size_give_the_same_rows(file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(file, content)
    for size in (1, 7, 50, 133):
        monkeypatch.setattr(source, "BLOCK_BYTES", size)
        assert read(file, content) == whole


@given(bad=st.integers(0, 39), size=st.sampled_from([64, 1000, 1 << 20]), kind=st.sampled_from(["azure", "jsonl"]))
@on_one_file
def test_a_bad_row_is_named_by_its_line(file: Path, bad: int, size: int, kind: str) -> None:
    if kind == "azure":
        lines = [HEADER.strip(), *[b"2023-11-16 18:17:%02d.5,100,10" % at for at in range(40)]]
        lines[1 + bad] = b"2023-11-16 18:17:03.5,100,-10"
    else:
        lines = [b'{"timestamp": %d, "input_length": 10, "output_length": 2}' % at for at in range(41)]
        lines[1 + bad] = b'{"timestamp": 5, "input_length": 10, "output_length": -2}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_BYTES", size)
        error = refused(file, b"\n".join(lines))
    assert error.where == f"{file}:{2 + bad}"
    assert "output_tokens is -" in error.what
    assert error.rule == "from 0 to 16777216"


@pytest.mark.parametrize(
    "row",
    [
        b"2023-11-16 18:17:03.9799600,4808", b"2023-11-16 18:17:03.9799600,4808,10,1", b"2023-11-16 18:17:03.9799600,,10",
        b"yesterday,4808,10", b"2023-11-16 18:17:03,48.5,10", b"2023-11-16 18:17:03,nan,10", b"2023-11-16 25:17:03,1,10",
        b"2023-11-16 18:17:03+00:00,4808,10", b"2023-11-16 18:17:03,99999999999999999999,10",
        b'"2023-11-16 18:17:03,4808,10', b"\xff",
    ],
)  # fmt: skip
def test_bad_azure_rows(file: Path, row: bytes) -> None:
    error = refused(file, AZURE_2023 + b"\n" + row + b"\n" + AZURE_2023.partition(b"\n")[2])
    assert error.where == f"{file}:5"
    assert error.what
    assert error.rule


@pytest.mark.parametrize(
    "row",
    [
        b"{}", b"[]", b"null", b'{"timestamp": 1, "input_length": 2}', b'{"timestamp": "1", "input_length": 2, "output_length": 3}',
        b'{"timestamp": -1, "input_length": 2, "output_length": 3}', b'{"timestamp": 1e300, "input_length": 2, "output_length": 3}',
        b'{"timestamp": 1, "input_length": 2.5, "output_length": 3}',
        b'{"timestamp": 1, "input_length": 20000000, "output_length": 3}',
        b'{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [-1]}',
        b'{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [18446744073709551616]}',
        b'{"timestamp": 1, "input_length": 2, "output_length": 3, "turn": 1e3}',
        b'{"timestamp": 1, "input_length": 2, "output_length": 3, "think_ns": -1}',
        b'{"timestamp": 1, "input_length": 2, "output_length": 3, "model": "\xff"}',
        b'{"timestamp": 1, "input_length": 2, "output_length": 3} {"timestamp": 1, "input_length": 2, "output_length": 3}',
        b'{"timestamp": 1, "input_length": 2, "x": ' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_bad_json_rows(file: Path, row: bytes) -> None:
    error = refused(file, MOONCAKE + row + b"\n" + MOONCAKE)
    assert error.where == f"{file}:5"
    assert error.what
    assert error.rule
    assert len(str(error)) < 500, "a long row is cut"


@given(lines=st.lists(st.binary(max_size=40) | st.sampled_from([*AZURE_2023.splitlines(), *MOONCAKE.splitlines()]), max_size=8))
@on_one_file
@pytest.mark.parametrize("head", [b"", HEADER, MOONCAKE, b"\x1f\x8b", b"PAR1", b"{"])
def test_garbage_is_an_input_error_or_a_trace(file: Path, head: bytes, lines: list[bytes]) -> None:
    file.write_bytes(head + b"\n".join(lines))
    with contextlib.suppress(InputError):
        table = traces.read(file)
        assert len(table) > 0
        assert table.schema.equals(traces.SCHEMA)


@given(table=tables)
@on_one_file
@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_own_formats_give_back_what_was_written(tmp_path: Path, table: pa.Table, ending: str) -> None:
    path = tmp_path / f"trace{ending}"
    traces.write(table, path)
    assert traces.read(path) == table
    assert traces.detect(path) == ending[1:]


def test_parquet_of_others_may_lack_columns_and_have_more(file: Path) -> None:
    columns = {
        "arrival_at_ns": pa.array([5, 3], pa.int32()),
        "prompt_tokens": [1, 2],
        "output_tokens": [3, 4],
        "colour": ["red", "blue"],
    }
    pq.write_table(pa.table(columns), file)
    table = traces.read(file)
    assert [*traces.recorded(table)] == [RecordedRequest(0, 3, 2, 4), RecordedRequest(1, 5, 1, 3)]
    assert traces.describe(table)["warnings"] == ["columns not understood and ignored: colour"]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([1, None, 3]), "row 1"), (pa.array([1, 2, -3]), "row 2"), (pa.array([0.5, 1, 2]), "arrival_at_ns"),
        (pa.array([1, 2, 3], pa.timestamp("us")), "timestamp"), (pa.array(["1", "x", "2"]), "arrival_at_ns"),
    ],
)  # fmt: skip
def test_bad_parquet(file: Path, column: pa.Array, says: str) -> None:
    pq.write_table(pa.table({"arrival_at_ns": column, "prompt_tokens": [1, 1, 1], "output_tokens": [1, 1, 1]}), file)
    with pytest.raises(InputError, match=says):
        traces.read(file)


def test_a_file_that_is_cut_off(file: Path) -> None:
    assert "cannot be read" in refused(file, gzip.compress(AZURE_2023 * 100)[:-20]).what
    traces.write(table_of({"arrival_at_ns": 1}), file.with_suffix(".parquet"))
    assert "no whole Parquet" in refused(file, file.with_suffix(".parquet").read_bytes()[:-9]).what
    assert "gunzip" in refused(file, gzip.compress(file.with_suffix(".parquet").read_bytes())).fix


def test_missing_empty_and_unknown_files_say_what_to_try(file: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))) as caught:
            traces.read(path)
        assert "azure-code-2023" in caught.value.fix
    for content in (b"", b"\n\n", HEADER):
        assert "azure-code-2023" in refused(file, content).fix
    error = refused(file, b"Timestamp,Model,Request tokens\n5,ChatGPT,472\n")
    assert "Timestamp, Model, Request tokens" in error.what
    assert "TIMESTAMP, ContextTokens, GeneratedTokens" in error.rule
    assert refused(file, b'{"prompt": "hi",\n').where == str(file)
    assert "time, tokens" in refused(file, b'{"time": 1, "tokens": 2}\n').what


def test_columns_may_come_in_another_order_and_more_of_them(file: Path) -> None:
    table = read(file, b"Model,GeneratedTokens,TIMESTAMP,ContextTokens\ngpt\xff,3,2024-05-10 00:00:00+02:00,5\n")
    assert [*traces.recorded(table)] == [RecordedRequest(0, 0, 5, 3)]
    assert traces.describe(table)["warnings"] == ["columns not understood and ignored: Model"]


def test_quoted_values(file: Path) -> None:
    quoted = b"\n".join(b",".join(b'"%s"' % value for value in line.split(b",")) for line in AZURE_2024.splitlines())
    assert read(file, quoted) == read(file, AZURE_2024)


def test_times_that_cannot_count_from_one_zero(file: Path) -> None:
    lines = [{"timestamp": at, "input_length": 1, "output_length": 1} for at in (0, 1_700_000_000_000)]
    assert "one zero" in refused(file, b"\n".join(json.dumps(line).encode() for line in lines)).rule


def test_unwritable_names_are_refused(tmp_path: Path) -> None:
    table = table_of({"arrival_at_ns": 1})
    for name in ("trace.csv", "trace", "missing/trace.jsonl", "missing/trace.parquet"):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            traces.write(table, tmp_path / name)


def test_the_shipped_hour_is_the_published_file() -> None:
    table = traces.read("azure-code-2023")
    assert len(table) == 8819
    assert traces.sha256("azure-code-2023") == "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6"
    shipped = traces.locate("azure-code-2023")
    assert shipped.stat().st_size < 100_000
    assert "CC-BY-4.0" in (shipped.parent / "ATTRIBUTION.md").read_text()


@pytest.mark.traces
def test_recorded_files() -> None:
    azure = traces.read(recorded_file("AzureLLMInferenceTrace_code.csv"))
    assert azure == traces.read("azure-code-2023")
    mooncake = traces.read(recorded_file("mooncake_conversation_trace.jsonl"))
    assert len(mooncake) == 12031
    with pytest.raises(InputError, match="Session ID"):
        traces.read(recorded_file("burstgpt_3_head.csv"))

"""The run directory's promise: killed at any moment, what was recorded is read exactly once."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.errors import InputError
from replay.records import FLEET_STATE_STRUCT, NS_PER_S, OUTCOME_DTYPE, OUTCOME_STRUCT, FleetState
from replay.runs import RunDir, current_parts, outcomes_to_table, part_path, read_spool, recorded_until
from tests.tracing_support import MANIFEST, outcome, packed, quick, records

PLAN = pa.table(
    {
        "request_id": pa.array(range(100), pa.int64()),
        "prompt_tokens": pa.array(range(1000, 1100), pa.int64()),
        "output_tokens": pa.array([7] * 100, pa.int64()),
        "model": pa.array(["planned", None] * 50, pa.string()),
        "tenant": pa.nulls(100, pa.string()),
        "priority": pa.nulls(100, pa.int64()),
    }
)


def write_part(run: RunDir, stem: str, first: int, end: int) -> None:
    """A Parquet part as the recorder makes it from the spool."""
    spool = run.path / "spool" / f"{stem}.outcomes"
    table = outcomes_to_table(read_spool(spool, OUTCOME_DTYPE, first, end - first), "run-1", None)
    pq.write_table(table, part_path(run.path / "requests", stem, first, end))


def ids(run: RunDir) -> list[int]:
    return sorted(run.outcomes()["request_id"].to_pylist())


@given(st.data())
def test_a_run_killed_anywhere_is_read_once_and_whole(data: st.DataObject) -> None:
    """Two senders and a recorder killed at any byte: between records, inside one, between parts, in the middle of a merge."""
    with tempfile.TemporaryDirectory() as folder:
        run, expected = RunDir.create(Path(folder) / "run", MANIFEST), []
        for number, stem in enumerate(("worker-1", "worker-10")):  # one name is the beginning of the other
            sent = [quick(1000 * number + request) for request in range(data.draw(st.integers(0, 12)))]
            raw = packed(sent)
            cut = data.draw(st.integers(0, len(raw)))
            (run.path / "spool" / f"{stem}.outcomes").write_bytes(raw[:cut])
            whole = cut // OUTCOME_STRUCT.size
            expected += [row.request_id for row in sent[:whole]]
            marks = sorted(data.draw(st.sets(st.integers(1, whole)))) if whole else []
            for first, end in zip([0, *marks], marks, strict=False):
                write_part(run, stem, first, end)
            if marks and data.draw(st.booleans()):  # killed between the merged part's rename and the removal of its pieces
                write_part(run, stem, 0, marks[-1])
            (run.path / "requests" / f"part-{stem}-0-99.parquet.tmp").write_bytes(b"half a part")
        assert ids(run) == sorted(expected)
        assert sorted(run.outcomes(["request_id"])["request_id"].to_pylist()) == sorted(expected)


def test_a_merged_part_hides_the_pieces_inside_it(tmp_path: Path) -> None:
    for first, end in ((0, 5), (0, 2), (2, 5), (5, 7)):
        part_path(tmp_path, "w", first, end).touch()
    part_path(tmp_path, "w-0", 0, 3).touch()
    parts = current_parts(tmp_path)
    assert [part.name for part in parts] == ["part-w-0-5.parquet", "part-w-5-7.parquet", "part-w-0-0-3.parquet"]
    assert recorded_until(parts, Path("w.outcomes")) == 7
    assert recorded_until(parts, Path("w-0.outcomes")) == 3
    assert recorded_until(parts, Path("v.outcomes")) == 0


def test_a_file_that_is_no_part_is_named_and_not_passed_over(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", MANIFEST)
    (run.path / "requests" / "part-copy.parquet").touch()
    with pytest.raises(InputError, match=r"part-copy\.parquet"):
        run.outcomes()


def test_rows_say_null_for_what_was_not_measured_and_words_for_codes(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", MANIFEST)
    rows = [outcome(1, cached_tokens=-1, session_id=b""), outcome(2, trace_hi=1, trace_lo=2, status=4, queue_reason=0)]
    (run.path / "spool" / "w.outcomes").write_bytes(packed(rows))
    first, second = run.outcomes().to_pylist()
    assert (first["cached_tokens"], first["session_id"], first["prefill_ns"]) == (None, None, 500_000_000)
    assert (first["status"], first["queue_reason"], first["origin"], first["tenant"]) == ("ok", "cold_start", "online", "acme")
    assert (second["status"], second["trace_id"]) == ("cancelled", f"{1:016x}{2:016x}")
    assert first["recorded_output_tokens"] is None


def test_the_plan_fills_in_what_the_trace_knew_and_the_sender_the_rest(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", MANIFEST, PLAN)
    (run.path / "spool" / "w.outcomes").write_bytes(packed([outcome(4), outcome(5), outcome(2**40)]))
    planned, filled, beyond = run.outcomes().to_pylist()
    assert (planned["recorded_prompt_tokens"], planned["model"], planned["tenant"]) == (1004, "planned", "acme")
    assert (filled["recorded_prompt_tokens"], filled["model"]) == (1005, "llama")
    assert (beyond["recorded_prompt_tokens"], beyond["model"]) == (None, "llama")


def test_rows_of_the_clients_own_do_not_come_from_the_gateway() -> None:
    table = outcomes_to_table(records([outcome(1, kept_by_client=1), outcome(2)]), "run-1", None)
    assert table["request_id"].to_pylist() == [2]


def test_an_empty_run_has_the_columns_and_no_rows(tmp_path: Path) -> None:
    table = RunDir.create(tmp_path / "run", MANIFEST).outcomes()
    assert len(table) == 0
    assert {"request_id", "trace_id", "status", "prefill_ns", "recorded_prompt_tokens"} <= set(table.column_names)


def test_a_killed_gateway_leaves_lifetimes_and_states_readable_on_the_runs_clock(tmp_path: Path) -> None:
    """The gateway began 2 s before the run: its 3 s is the run's 1 s. Its last line and its last state were cut in half."""
    run = RunDir.create(tmp_path / "run", MANIFEST)
    gateway = run.path / "gateway"
    (gateway / "spool").mkdir(parents=True)
    (gateway / "run.json").write_text(json.dumps({"started_at_unix_ns": MANIFEST["started_at_unix_ns"] - 2 * NS_PER_S}))
    start = {"replica_id": 1, "pool": "main", "gpu": "a100", "gpu_count": 1, "requested_at_ns": 3 * NS_PER_S, "reason": "min"}
    ready, half = {"replica_id": 1, "ready_at_ns": 10 * NS_PER_S}, '{"replica_id": 1, "stopp'
    (gateway / "lifetimes.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(ready) + "\n" + half)
    state = FLEET_STATE_STRUCT.pack(*FleetState(3 * NS_PER_S, 1, 2, 3, 4, 5, 6, 7, 8, 9.5))
    (gateway / "spool" / "g.states").write_bytes(state + state[:17])
    (life,) = run.lifetimes()
    assert (life.requested_at_ns, life.ready_at_ns, life.stopped_at_ns) == (NS_PER_S, 8 * NS_PER_S, None)
    (only,) = run.states()
    assert (only["at_ns"], only["ready"], only["usd_per_hour"]) == (NS_PER_S, 5, 9.5)


def test_a_run_is_never_overwritten_and_a_stranger_is_no_run(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", MANIFEST)
    with pytest.raises(InputError, match="holds a run already"):
        RunDir.create(run.path, MANIFEST)
    with pytest.raises(InputError, match="is no run directory"):
        RunDir.open(tmp_path)
    run.update_manifest(schema=99)
    with pytest.raises(InputError, match="schema 99"):
        RunDir.open(run.path)

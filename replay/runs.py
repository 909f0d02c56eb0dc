"""The run directory: what a run leaves behind, live or simulated, and how it is read.

    <run>/run.json                manifest, written before the first send and completed at the end (see ``Manifest``)
    <run>/plan.parquet            the shaped schedule: what should have been sent, one row a request
    <run>/spool/*.outcomes        fixed-size records (``records.OUTCOME_DTYPE``), appended by the senders
    <run>/requests/*.parquet      the same as Parquet parts, made by the recorder: part-<spool>-<first>-<end>.parquet
    <run>/spans.jsonl             OTLP-JSON of the sampled traces, where no endpoint is set
    <run>/gaps.json               run-wide histogram of gaps between chunks: {"edges_s": [...], "counts": [...]}
    <run>/gateway/run.json        the gateway's own clock: {"started_at_unix_ns": ...}
    <run>/gateway/fleet.log       the input log of the Fleet (replay.inputs)
    <run>/gateway/spool/*.outcomes, *.states     the gateway's records and ``FleetState`` samples
    <run>/gateway/requests/*.parquet             rows of requests whose client keeps none
    <run>/gateway/states.parquet                 the time line (simulated runs write it directly)
    <run>/gateway/lifetimes.jsonl                one line per change of a replica's life, folded on reading

A killed run is readable: rows are the Parquet parts plus whatever the spools hold beyond them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from replay.errors import InputError
from replay.records import (
    FLEET_STATE_DTYPE,
    ORIGINS,
    OUTCOME_DTYPE,
    PHASES,
    QUEUE_REASONS,
    STATUSES,
    ReplicaLifetime,
    trace_id,
)

SCHEMA_VERSION: Final = 1
Array = npt.NDArray[Any]

# run.json. Keys of a manifest and what they hold:
#   schema, id, kind ("live" | "simulated"), ground
#   {"kind": "fleet" | "stand-in" | "random-weights" | "simulated", "detail": str}
#   policy {"name": str, "spec": {...}}, trace {"name", "sha256", "rows", "shaping": {...}}, seed, repeat
#   slo {"ttft_s": float, "tpot_s": float, "e2e_s": float} (terms that are set)
#   prices {"usd_per_gpu_hour", "gpu", "source", "date"}
#   started_at_unix_ns, planned_ns (span of the schedule), drain_ns, versions {package: version}
#   ended {"at_ns", "reason"} (absent: killed), validity {"valid": bool, "reasons": [...], figures...}
Manifest = dict[str, Any]

# Static columns that rows take from the plan by request_id, with their name in the plan.
_FROM_PLAN: Final = {
    "recorded_prompt_tokens": "prompt_tokens", "recorded_output_tokens": "output_tokens", "turn": "turn", "priority": "priority",
    "session_id": "session_id", "tenant": "tenant", "model": "model",
}  # fmt: skip


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` in one step, so that a reader or a crash never sees half of it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def outcomes_to_table(records: Array, run_id: str, plan: pa.Table | None) -> pa.Table:
    """Fixed-size records (dtype OUTCOME_DTYPE) as the documented columns; -1 becomes null, codes become words.

    ``plan`` (row i is request_id i) adds what the trace knew; without it those columns come from the record or are null.
    Records that the client keeps (in a gateway's spool) make no rows: the client's own record does.
    """
    records = records[records["kept_by_client"] == 0]
    columns: dict[str, pa.Array] = {"request_id": pa.array(records["request_id"].astype(np.int64))}
    derived = records["trace_lo"] == 0
    high, low = records["trace_hi"], records["trace_lo"]
    columns["trace_id"] = pa.array(
        [
            f"{trace_id(run_id, int(request)):032x}" if is_derived else f"{int(hi):016x}{int(lo):016x}"
            for request, is_derived, hi, lo in zip(records["request_id"], derived, high, low, strict=True)
        ],
        pa.string(),
    )
    words = {"status": STATUSES, "queue_reason": QUEUE_REASONS, "origin": ORIGINS}
    for name in OUTCOME_DTYPE.names or ():
        values = records[name]
        if name in words:
            columns[name] = pa.DictionaryArray.from_arrays(pa.array(values.astype(np.int8)), list(words[name])).cast(pa.string())
        elif name in ("tenant", "model", "session_id", "detail"):
            columns[name] = pa.array([v.decode("utf-8", "replace") or None for v in values.tolist()], pa.string())
        elif name not in ("request_id", "trace_hi", "trace_lo", "parent_span", "kept_by_client"):
            columns[name] = pa.array(values, mask=values == -1)
    if plan is not None:
        rows = plan.take(pa.array(records["request_id"], mask=records["request_id"] >= len(plan)))
        for name, source in _FROM_PLAN.items():
            if source in rows.column_names:
                planned = rows[source].combine_chunks()
                # What the trace left open (a model, a tenant) the sender may have filled in.
                columns[name] = pc.coalesce(planned, columns[name]) if name in columns else planned
    for name in _FROM_PLAN:
        columns.setdefault(name, pa.nulls(len(records), pa.int64()))
    return pa.table(columns)


def read_spool(path: Path, dtype: np.dtype[Any], start: int = 0, count: int = -1) -> Array:
    """Whole records of an append-only spool from record ``start`` on, ``count`` at most where it is not -1.

    Half a record at the end (a kill, or a write that is under way) is left out.
    """
    with path.open("rb") as spool:
        spool.seek(start * dtype.itemsize)
        raw = spool.read(count * dtype.itemsize if count >= 0 else -1)
    return np.frombuffer(raw, dtype=dtype, count=len(raw) // dtype.itemsize)


class RunDir:
    """One run's directory: create it, complete it, read it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest, plan: pa.Table | None = None) -> RunDir:
        """A new run directory; refuses one that holds a run already (nothing recorded is ever overwritten).

        Who starts the sender may ``prepare`` the directory with what only it knows, such as the policy; that wins.
        """
        run = cls(path)
        prepared = run.manifest if (run.path / "run.json").exists() else {}
        if "started_at_unix_ns" in prepared:
            raise InputError(
                "holds a run already", where=str(path), rule="a run is never overwritten", fix="choose another --run-dir"
            )
        for folder in ("spool", "requests"):
            (run.path / folder).mkdir(parents=True, exist_ok=True)
        if plan is not None:
            pq.write_table(plan, run.path / "plan.parquet")
        run.write_manifest({"schema": SCHEMA_VERSION, **manifest, **prepared})
        return run

    @classmethod
    def prepare(cls, path: str | Path, manifest: Manifest) -> None:
        """Leave what is known before the sender starts, without its start: ``create`` completes it."""
        assert "started_at_unix_ns" not in manifest
        Path(path).mkdir(parents=True, exist_ok=True)
        cls(path).write_manifest(manifest)

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        run = cls(path)
        if not (run.path / "run.json").is_file():
            raise InputError("is no run directory: run.json is missing", where=str(path), fix="name a folder under runs/")
        if (found := run.manifest.get("schema")) != SCHEMA_VERSION:
            raise InputError(
                f"has schema {found}",
                where=str(path),
                rule=f"schema {SCHEMA_VERSION}",
                fix="use the version that wrote it",
            )
        return run

    @property
    def manifest(self) -> Manifest:
        try:
            loaded: Manifest = json.loads((self.path / "run.json").read_text())
        except json.JSONDecodeError as error:
            raise InputError(
                f"is not JSON: {error}", where=str(self.path / "run.json"), fix="restore it from a copy of the run"
            ) from error
        return loaded

    def write_manifest(self, manifest: Manifest) -> None:
        write_atomically(self.path / "run.json", json.dumps(manifest, indent=1) + "\n")

    def update_manifest(self, **changes: Any) -> None:
        self.write_manifest({**self.manifest, **changes})

    def plan(self, columns: list[str] | None = None) -> pa.Table | None:
        """The schedule; ``columns`` (those it has of them) where not all are needed."""
        path = self.path / "plan.parquet"
        return _read_columns(path, columns) if path.exists() else None

    def outcomes(self, columns: list[str] | None = None) -> pa.Table:
        """Every recorded row: Parquet parts plus what the spools hold beyond them; all columns, or those of ``columns``."""
        try:
            return self._outcomes(columns)
        except FileNotFoundError:  # the recorder merged its parts (once, at its end) after we had listed them
            return self._outcomes(columns)

    def _outcomes(self, columns: list[str] | None) -> pa.Table:
        parts = current_parts(self.path / "requests")
        spools = sorted((self.path / "spool").glob("*.outcomes"))
        rest = [read_spool(spool, OUTCOME_DTYPE, start=recorded_until(parts, spool)) for spool in spools]
        unread = np.concatenate([*rest, np.empty(0, OUTCOME_DTYPE)])
        tables = [_read_columns(part, columns) for part in parts]
        if len(unread) or not parts:
            table = outcomes_to_table(unread, self.manifest["id"], self.plan())
            tables.append(table if columns is None else table.select([c for c in columns if c in table.column_names]))
        return pa.concat_tables(tables, promote_options="permissive")

    def states(self) -> Array:
        """The fleet's time line (FLEET_STATE_DTYPE), instants on the run's clock; empty where our gateway was not in the path."""
        parquet = self.path / "gateway" / "states.parquet"
        if parquet.exists():
            table = pq.read_table(parquet)
            states = np.empty(len(table), FLEET_STATE_DTYPE)
            for name in FLEET_STATE_DTYPE.names or ():
                states[name] = table[name].to_numpy()
            return states
        spools = sorted((self.path / "gateway" / "spool").glob("*.states"))
        states = np.concatenate([read_spool(spool, FLEET_STATE_DTYPE) for spool in spools] or [np.empty(0, FLEET_STATE_DTYPE)])
        states["at_ns"] += self.gateway_offset_ns()
        return states

    def lifetimes(self) -> list[ReplicaLifetime]:
        """Replica lifetimes on the run's clock, folded from the gateway's change log."""
        path, offset = self.path / "gateway" / "lifetimes.jsonl", self.gateway_offset_ns()
        folded: dict[int, dict[str, Any]] = {}
        # What follows the last line end is half a line: the gateway was killed while it wrote it.
        for line in path.read_text().split("\n")[:-1] if path.exists() else ():
            change = json.loads(line)
            folded.setdefault(change["replica_id"], dict.fromkeys(ReplicaLifetime._fields)).update(change)
        for life in folded.values():
            for name in ("requested_at_ns", "ready_at_ns", "stopped_at_ns"):
                life[name] = None if life[name] is None else life[name] + offset
        return [ReplicaLifetime(**life) for life in folded.values()]

    def gateway_offset_ns(self) -> int:
        """What to add to an instant of the gateway's clock to get one of the run's clock."""
        path = self.path / "gateway" / "run.json"
        if not path.exists():
            return 0
        started: int = json.loads(path.read_text())["started_at_unix_ns"]
        return started - int(self.manifest["started_at_unix_ns"])


def _read_columns(path: Path, columns: list[str] | None) -> pa.Table:
    """A Parquet file, or those of ``columns`` that it has."""
    with pq.ParquetFile(path) as file:
        return file.read(columns if columns is None else [c for c in columns if c in file.schema_arrow.names])


_PART: Final = re.compile(r"part-(.+)-(\d+)-(\d+)\.parquet")


def part_path(folder: Path, stem: str, first: int, end: int) -> Path:
    """The Parquet part that holds the records ``first`` to ``end`` (exclusive) of the spool named ``stem``."""
    return folder / f"part-{stem}-{first}-{end}.parquet"


def part_span(part: Path) -> tuple[str, int, int]:
    """Spool's stem, first and end of a part, out of its name."""
    match = _PART.fullmatch(part.name)
    if match is None:
        raise InputError("is no part of a run", where=str(part), rule="part-<spool>-<first>-<end>.parquet", fix="move it elsewhere")
    return match[1], int(match[2]), int(match[3])


def current_parts(folder: Path) -> list[Path]:
    """The Parquet parts to read: those inside a wider one were merged into it, and a kill left them behind."""
    spans = [(*part_span(part), part) for part in folder.glob("part-*.parquet")]
    parts, covered = [], ("", 0)
    for stem, _, end, part in sorted(spans, key=lambda span: (span[0], span[1], -span[2])):
        if (stem, end) > covered:
            parts.append(part)
            covered = (stem, end)
    return parts


def recorded_until(parts: list[Path], spool: Path) -> int:
    """The first record of ``spool`` that no Parquet part holds yet."""
    return max((end for stem, _, end in map(part_span, parts) if stem == spool.stem), default=0)


def phase_columns() -> list[str]:
    """The row's phase columns, in order; they sum to done_at_ns - scheduled_at_ns."""
    return [f"{name}_ns" for name in PHASES]

"""The recorder: a process of its own that turns the fixed-size records of a run's spools into Parquet parts, spans and metrics.

    python -m tracing.recorder --run DIR [--role client|gateway] [--metrics-port N] [--sample-one-in 100] ...

Started by the load generator or the gateway, whose loops must not be blocked by encoding (512 spans: 11 ms; 75,000 rows of
Parquet: 130 ms). It prints {"metrics_port": N} when it listens, ends on SIGTERM or when its stdin closes (its parent is gone)
after reading the spools to their end, and prints what it did as its last line.

The spools are the truth and are only read: killed at any moment, parts and spools together still hold every record once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
from prometheus_client import start_http_server

from replay.errors import InputError
from replay.records import FLEET_STATE_DTYPE, NS_PER_S, OUTCOME_DTYPE
from replay.runs import RunDir, current_parts, outcomes_to_table, part_path, part_span, read_spool, recorded_until
from tracing import names
from tracing.batch import Batch, rows, trace_of
from tracing.export import Exporter, KeptTrace, make_sink
from tracing.meters import Meters
from tracing.sampling import Sampler, Sampling
from tracing.spans import row_spans

POLL_S: Final = 0.25
PART_S: Final = 4.0  # a part at least every 5 s: this, a poll and the time to write it
CHUNK_RECORDS: Final = 50_000  # 23 MB of records at a time, however far behind the recorder is
EXPORT_CLOSE_S: Final = 5.0


class Spool:
    """One spool's reading marks: records below ``seen`` are counted, those below ``written`` are in a Parquet part."""

    def __init__(self, path: Path, written: int = 0) -> None:
        self.path = path
        self.seen = self.written = written


class Recorder:
    """Reads what is new (``poll``), writes parts, and leaves one part a spool at the end (``finish``)."""

    def __init__(self, run: Path, side: str, sampling: dict[str, Any], part_s: float = PART_S) -> None:
        self._run, self._side = RunDir(run), side
        self._manifest, self._plan = self._run.manifest, self._run.plan()
        for key in ("id", "started_at_unix_ns"):
            if key not in self._manifest:
                raise InputError(f"lacks {key}", where=str(run / "run.json"), fix="write the manifest before the recorder starts")
        self._run_id: str = self._manifest["id"]
        self.meters = Meters(self._manifest, side)
        self._sampler = Sampler(Sampling.from_slo(self._manifest.get("slo") or {}, **sampling), self._run_id)
        self._exporter = Exporter(make_sink(run / "spans.jsonl"), self.meters.note_kept)
        self._folder = run / "requests"
        self._folder.mkdir(exist_ok=True)
        for scratch in self._folder.glob("*.tmp"):  # of a recorder that was killed
            scratch.unlink()
        self._outcomes: dict[Path, Spool] = {}
        self._states: dict[Path, Spool] = {}
        self._rows = 0
        self._failure = ""
        self._part_s = part_s
        self._part_due = time.monotonic() + part_s

    def poll(self) -> None:
        """Read what the spools hold beyond what was seen; write parts when they are due."""
        parts: list[Path] | None = None
        for path in sorted((self._run.path / "spool").glob("*.outcomes")):
            if path not in self._outcomes:
                parts = current_parts(self._folder) if parts is None else parts
                self._outcomes[path] = Spool(path, recorded_until(parts, path))
            self._read_outcomes(self._outcomes[path])
        for path in sorted((self._run.path / "spool").glob("*.states")):
            self._read_states(self._states.setdefault(path, Spool(path)))
        if time.monotonic() >= self._part_due:
            self._write_parts()
            self._part_due = time.monotonic() + self._part_s
        self._publish_totals()

    def finish(self) -> dict[str, Any]:
        """Read the spools to their end, merge each one's parts into one, flush the spans; returns the last line."""
        self.poll()
        self._write_parts()
        for spool in self._outcomes.values():
            self._merge_parts(spool)
        self._exporter.close(EXPORT_CLOSE_S)
        self._publish_totals()
        traces, spans = self._exporter.traces, self._exporter.spans
        return {
            "rows": self._rows,
            "spans_kept": spans["kept"],
            "spans_dropped": spans["dropped"],
            "traces_kept": traces["kept"],
            "traces_dropped": traces.total() - traces["kept"] + self._sampler.over_rate,
            **({"error": self._failure} if self._failure else {}),
        }

    def _read_outcomes(self, spool: Spool) -> None:
        while len(records := read_spool(spool.path, OUTCOME_DTYPE, spool.seen, CHUNK_RECORDS)):
            spool.seen += len(records)
            batch = Batch.of(records)
            self.meters.add_outcomes(batch)
            self._offer_spans(batch.where(records["kept_by_client"] == 0))

    def _read_states(self, spool: Spool) -> None:
        states = read_spool(spool.path, FLEET_STATE_DTYPE, spool.seen)
        spool.seen += len(states)
        self.meters.add_states(states)

    def _offer_spans(self, batch: Batch) -> None:
        kept = self._sampler.choose(batch)
        origin_s = self._manifest["started_at_unix_ns"] / NS_PER_S
        for index, row in zip(kept, rows(batch.records, kept), strict=True):
            trace = KeptTrace(
                trace_id=trace_of(row, self._run_id),
                model=row.model.decode("utf-8", "replace"),
                at_unix_s=origin_s + row.done_at_ns / NS_PER_S,
                ttft_s=float(batch.ttft_s[index]),
                tpot_s=float(batch.tpot_s[index]),
                e2e_s=float(batch.e2e_s[index]),
                spans=row_spans(row, self._manifest, self._side),
            )
            self._exporter.offer(trace)

    def _write_parts(self) -> None:
        """Write what was seen since the last part of every spool; a full disk is remembered and tried again at the next."""
        for spool in self._outcomes.values():
            try:
                while spool.written < spool.seen:
                    end = min(spool.written + CHUNK_RECORDS, spool.seen)
                    self._rows += self._write_part(spool, spool.written, end)
                    spool.written = end
            except OSError as error:
                self._failure = f"{spool.path.stem}: rows from {spool.written} on are in the spool only: {error}"
                return
        self._failure = ""

    def _merge_parts(self, spool: Spool) -> None:
        """One part instead of many small ones. The pieces go after the whole is in place: a reader prefers the whole."""
        whole = part_path(self._folder, spool.path.stem, 0, spool.written)
        parts = [part for part in self._folder.glob("part-*.parquet") if part_span(part)[0] == spool.path.stem]
        if self._failure or all(part == whole for part in parts):
            return
        try:
            self._write_part(spool, 0, spool.written)
        except OSError as error:
            self._failure = f"{spool.path.stem}: its parts stay unmerged: {error}"
            return
        for part in parts:
            if part != whole:
                part.unlink()

    def _write_part(self, spool: Spool, first: int, end: int) -> int:
        """Write records ``first`` to ``end`` as one part and return its rows; no file where the client keeps them all.

        A row group a chunk: memory stays bounded, whatever the length of the run.
        """
        path = part_path(self._folder, spool.path.stem, first, end)
        scratch = path.with_name(path.name + ".tmp")
        starts = range(first, end, CHUNK_RECORDS)
        chunks = (read_spool(spool.path, OUTCOME_DTYPE, start, min(CHUNK_RECORDS, end - start)) for start in starts)
        tables = (outcomes_to_table(chunk, self._run_id, self._plan) for chunk in chunks)
        filled = (table for table in tables if len(table))
        table = next(filled, None)
        if table is None:
            return 0
        try:
            count = 0
            with pq.ParquetWriter(scratch, table.schema) as writer:
                while table is not None:
                    writer.write_table(table)
                    count += len(table)
                    table = next(filled, None)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        os.replace(scratch, path)
        return count

    def _publish_totals(self) -> None:
        self.meters.set_total(names.ROWS, self._rows)
        self.meters.set_total(names.TRACES, self._sampler.over_rate, "over_rate")
        for result in ("kept", "queue_full", "failed"):
            self.meters.set_total(names.TRACES, self._exporter.traces[result], result)
        for result in ("kept", "dropped"):
            self.meters.set_total(names.SPANS_EXPORTED, self._exporter.spans[result], result)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tracing.recorder", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory; its run.json is written already")
    parser.add_argument("--role", choices=names.SIDES, default="client", help="whose records these are (default: client)")
    parser.add_argument("--metrics-port", type=int, default=0, help="port of 127.0.0.1 for /metrics (default: any free one)")
    parser.add_argument("--sample-one-in", type=int, dest="one_in", help="keep one trace in N besides the slow and the failed")
    parser.add_argument("--sample-per-s", type=int, dest="per_s", help="keep at most K traces a second")
    parser.add_argument("--slow-ttft-s", type=float, help="keep traces whose TTFT is above (default: the run's target, else 5)")
    parser.add_argument("--slow-e2e-s", type=float, help="keep traces that took longer (default: the run's target, else 60)")
    parser.add_argument("--part-s", type=float, default=PART_S, help="write Parquet this often (default: %(default)s)")
    return parser.parse_args(argv)


def stop_when_told() -> threading.Event:
    """An event set by SIGTERM, or by the end of stdin: then the parent is gone, however it ended.

    Ctrl-C reaches the whole process group while the sender is still draining, so under a parent it is the parent's to say
    when; at a terminal it stops us.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set() if os.isatty(0) else None)

    def read_to_the_end() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        stop.set()

    threading.Thread(target=read_to_the_end, name="stdin", daemon=True).start()
    return stop


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 rows that could not be written as Parquet (they are in the spool), 2 bad input."""
    options = arguments(argv)
    if hasattr(os, "nice"):
        os.nice(10)  # its work can wait, the sender's and the gateway's cannot
    stop = stop_when_told()
    sampling = {name: getattr(options, name) for name in Sampling._fields}
    try:
        recorder = Recorder(options.run, options.role, sampling, options.part_s)
    except (InputError, OSError) as error:
        print(f"recorder: {error}", file=sys.stderr)
        return 2
    server, _ = start_http_server(options.metrics_port, "127.0.0.1", recorder.meters.registry)
    say(metrics_port=server.server_port)
    while not stop.wait(POLL_S):
        recorder.poll()
    summary = recorder.finish()
    say(**summary)
    return 1 if "error" in summary else 0


def say(**values: Any) -> None:
    with suppress(BrokenPipeError):  # the parent was killed: nobody is left to read it
        print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main())

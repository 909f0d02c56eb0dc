"""The side of a replay that decides: one per run, in the local process or the master.

It makes the run directory, asks the server what must be known before the first send, gives all senders one start, gathers what
they report, and says whether the run is valid. Senders are told and heard by Locust's messages; a local runner is its own sender.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import gevent
import numpy as np
import psutil
import pyarrow as pa
from gevent import subprocess

from loadgen._histogram import LogHistogram
from loadgen._openai import connect, resolve
from loadgen._requests import ASSUMED_BYTES_PER_TOKEN, Questions, Server
from loadgen._settings import Settings
from loadgen._verdict import COLUMNS, summary, verdict
from replay import traces
from replay.errors import InputError
from replay.records import NS_PER_S, OUTCOME_DTYPE
from replay.runs import RunDir, write_atomically

START_AHEAD_NS: Final = 2_000_000_000  # for the slowest sender to hear of the start and make its first requests ready,
START_AHEAD_NS_PER_ROW: Final = 2_000  # and to divide the plan and order its turns: a million rows take 2 s
LOAD_LIMIT_S: Final = 300.0
STOP_LIMIT_S: Final = 15.0
RECORDER_LIMIT_S: Final = 60.0
POLL_S: Final = 0.1
LOADED, GO, DONE, STOP = "tidegauge_loaded", "tidegauge_go", "tidegauge_done", "tidegauge_stop"


def load_plan(settings: Settings) -> pa.Table:
    """The shaped trace: the same table in every process that reads the same file with the same options."""
    return traces.shape(traces.read(settings.trace), settings.shaping)


def raise_file_limit() -> None:
    """As many open files as this user may have: one connection a request in flight."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Leader:
    """One run, from its directory to its verdict. ``tell(message, data)`` reaches every sender."""

    def __init__(self, settings: Settings, key: str, tell: Callable[[str, dict[str, Any]], None]) -> None:
        self.settings, self._key, self._tell = settings, key, tell
        self.plan = load_plan(settings)
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.loaded: dict[str, int] = {}  # by sender
        self.failed: dict[str, str] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.live: dict[str, dict[str, Any]] = {}  # what senders last said of themselves
        self.started_at_unix_ns = 0
        self.validity: dict[str, Any] | None = None
        self.lines: list[str] = []  # the summary
        self._recorder: subprocess.Popen[bytes] | None = None
        self._stopping, self._stop_limit = "", math.inf
        self._server = self._ask_server()
        try:
            self._run = RunDir.create(settings.run_dir, self._manifest(), self.plan)
        except OSError as error:
            raise InputError(
                f"cannot be written: {error}", where=settings.run_dir, fix="another --run-dir, or room on the disk"
            ) from error

    @property
    def planned_ns(self) -> int:
        return int(self.plan["arrival_at_ns"][-1].as_py())

    def _ask_server(self) -> Server:
        """The model's name and the bytes of its tokens; with both given, only whether somebody listens."""
        settings = self.settings
        target = resolve(settings.host)
        questions = Questions(target, settings.endpoint, self._key)
        try:
            connect(target).close()
        except OSError as error:
            raise InputError(
                f"nobody listens at {settings.host}: {error.strerror or error}",
                where="--host",
                fix="start the server, or check the port",
            ) from error
        model, notes = (settings.model, ()) if settings.model else questions.model()
        server = Server(model, settings.bytes_per_token or ASSUMED_BYTES_PER_TOKEN, notes=notes)
        if settings.bytes_per_token is None:
            server = questions.calibrate(server, settings.run_id)
        self.notes += server.notes
        return server

    def _manifest(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "id": settings.run_id,
            "kind": "live",
            "operation": "chat" if settings.endpoint == "chat" else "text_completion",
            "ground": {"kind": "fleet", "detail": settings.host},
            "trace": {
                "name": Path(settings.trace).name,
                "sha256": traces.sha256(settings.trace),
                "rows": len(self.plan),
                "shaping": asdict(settings.shaping),
            },
            "seed": settings.shaping.seed,
            "repeat": 0,
            "slo": settings.slo,
            "model": self._server.model,
            "bytes_per_token": self._server.bytes_per_token,
            "output_length": "forced" if self._server.forced else "measured, not forced",
            "started_at_unix_ns": time.time_ns(),  # the first send corrects it
            "planned_ns": self.planned_ns,
            "drain_ns": round(settings.drain_s * NS_PER_S),
            "versions": {name: metadata.version(name) for name in ("tidegauge", "locust", "gevent", "httptools")},
        }

    def conduct(self, senders: list[str], is_lost: Callable[[str], bool]) -> None:
        """The run itself; returns when every sender is done or lost, and the verdict is written."""
        self._gather(senders, self.loaded, is_lost, LOAD_LIMIT_S, "has not read the trace")
        for sender, error in self.failed.items():
            raise InputError(error, where=sender)
        if {*self.loaded.values()} - {len(self.plan)}:
            raise InputError(
                f"senders read different traces: {self.loaded} rows, here {len(self.plan)}", fix="give all the same file"
            )
        if self._stopping:
            self.problems.append(self._stopping)
            self._conclude(psutil.cpu_times())
            return
        working = [sender for sender in senders if sender in self.loaded]
        self.started_at_unix_ns = time.time_ns() + START_AHEAD_NS + START_AHEAD_NS_PER_ROW * len(self.plan)
        self._run.update_manifest(started_at_unix_ns=self.started_at_unix_ns)
        self._start_recorder()
        cpu_before = psutil.cpu_times()
        self._tell(
            GO,
            {
                "started_at_unix_ns": self.started_at_unix_ns,
                "senders": working,
                "run_dir": str(self._run.path.absolute()),  # workers may have been started elsewhere
                "server": {**asdict(self._server), "notes": []},
                "output_cap": int(np.quantile(self.plan["output_tokens"].to_numpy(), 0.99, method="higher")),
            },
        )
        self._gather(working, self.done, is_lost, None, "was lost")
        self._conclude(cpu_before)

    def stop(self, reason: str) -> None:
        """End early; ``conduct`` then concludes with what there is."""
        if not self._stopping:
            self._stopping, self._stop_limit = reason, time.monotonic() + STOP_LIMIT_S
        self._tell(STOP, {"reason": self._stopping})

    def _gather(
        self, senders: list[str], heard: dict[str, Any], is_lost: Callable[[str], bool], limit_s: float | None, missing: str
    ) -> None:  # fmt: skip
        """Wait until each sender was heard of, has failed or is lost, or the limit is over."""
        began = time.monotonic()
        while waiting := [sender for sender in senders if sender not in heard and sender not in self.failed]:
            lost = [sender for sender in waiting if is_lost(sender)]
            now = time.monotonic()
            if now > self._stop_limit or (limit_s is not None and now - began > limit_s):
                lost = waiting
            for sender in lost:
                self.failed[sender] = f"{missing}, with the rows that it had not written"
            gevent.sleep(POLL_S)

    def _start_recorder(self) -> None:
        command = [sys.executable, "-m", "tracing.recorder", "--run", str(self._run.path), "--role", "client"]
        try:
            # A session of its own: Ctrl-C is for the sender; the recorder ends when its stdin does.
            self._recorder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            self.notes.append(f"no recorder ({error}): rows stay in the spool, without spans and metrics")

    def _end_recorder(self) -> None:
        if self._recorder is None:
            return
        try:
            said, _ = self._recorder.communicate(timeout=RECORDER_LIMIT_S)
            last = json.loads(said.splitlines()[-1])
            self.notes.append(f"recorder: {last['rows']} rows, {last['spans_kept']} spans kept, {last['spans_dropped']} dropped")
            self.notes += [f"recorder: {last['error']}"] if "error" in last else []
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, IndexError):
            self._recorder.kill()
            self._recorder.wait()
            code = self._recorder.returncode
            self.notes.append(f"the recorder failed (exit {code}): the rows are complete in the spool, spans and metrics are not")

    def _conclude(self, cpu_before: Any) -> None:
        """Verdict, histogram of gaps, end of the recorder: what completes the run directory."""
        figures = list(self.done.values())
        self.problems += [f"worker {sender} {why}" for sender, why in self.failed.items()]
        self.problems += sorted({worker["ended"] for worker in figures if worker["ended"]})
        ended_at_ns = max(0, time.time_ns() - (self.started_at_unix_ns or time.time_ns()))
        rows = self.columns()
        if elsewhere := sum(worker["rows"] for worker in figures) - len(rows["status"]):
            self.problems.append(
                f"{elsewhere} rows were written on other machines: copy their spool/*.outcomes into {self._run.path}/spool"
            )
        self.validity = verdict(
            rows,
            figures,
            planned=len(self.plan),
            host_busy_share=_busy_share(cpu_before, psutil.cpu_times()),
            problems=self.problems,
        )
        gaps = LogHistogram()
        for worker in figures:
            gaps.merge(worker["gaps"])
        self._end_recorder()
        ended = {"at_ns": ended_at_ns, "reason": "; ".join(self.problems) or "complete"}
        try:
            write_atomically(self._run.path / "gaps.json", json.dumps(gaps.as_json()))
            self._run.update_manifest(ended=ended, validity=self.validity, notes=self.notes)
        except OSError as error:  # a full disk: the rows that are written stay readable, and whoever reads the screen learns why
            self.notes.append(f"the manifest could not be completed: {error}")
        self.lines = list(
            summary(rows, self.validity, run_dir=str(self._run.path), seconds=ended_at_ns / NS_PER_S, notes=self.notes)
        )

    def columns(self) -> dict[str, Any]:
        """The columns that verdict and summary need, of every spool in the run directory (other machines keep theirs)."""
        spools = sorted((self._run.path / "spool").glob("*.outcomes"))
        counts = [path.stat().st_size // OUTCOME_DTYPE.itemsize for path in spools]  # a full disk may have cut a record in half
        parts = [np.memmap(path, OUTCOME_DTYPE, "r", shape=(n,)) for path, n in zip(spools, counts, strict=True) if n]
        return {name: np.concatenate([np.empty(0, OUTCOME_DTYPE)[name], *(part[name] for part in parts)]) for name in COLUMNS}


def _busy_share(before: Any, after: Any) -> float:
    """Share of this machine's cores that worked between two readings; 0 where they are the same reading."""
    idle = sum(getattr(after, name, 0.0) - getattr(before, name, 0.0) for name in ("idle", "iowait"))
    # guest time is part of user time already
    whole = sum(after) - sum(before) - sum(getattr(after, n, 0.0) - getattr(before, n, 0.0) for n in ("guest", "guest_nice"))
    return 1 - idle / whole if whole > 0 else 0.0

"""What a gateway leaves behind while it runs: the fleet's input log, records, the time line, replica lifetimes; and the recorder
process that makes Parquet, spans and metrics of them.

Everything is buffered and written a few times a second, so that the forwarding loop never waits for a disk. A disk that is full
ends the recording (what is written stays readable), never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Final

from replay.records import FLEET_STATE_STRUCT, OUTCOME_STRUCT, FleetState, Outcome, ReplicaLifetime
from replay.runs import Manifest, RunDir

log = logging.getLogger(__name__)

FLUSH_S: Final = 0.25
RECORDER_ENDS_S: Final = 30.0  # it reads the spool to its end, 75,000 rows in about a second, and flushes its spans


class Appender:
    """An append-only file with a buffer. After a failed write it still ends where the last good one did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._buffer: list[bytes] = []
        self.written = 0

    def append(self, record: bytes) -> None:
        self._buffer.append(record)

    def drop(self) -> None:
        self._buffer.clear()

    def flush(self) -> None:
        """Write what is buffered. Raises OSError; the file then ends where it ended before."""
        if not self._buffer:
            return
        data, self._buffer = b"".join(self._buffer), []
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, self.written)
            raise
        self.written = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        os.close(self._descriptor)


class Ledger:
    """The gateway's run directory. Instants are on the gateway's clock, whose zero ``started_at_unix_ns`` names."""

    def __init__(self, path: Path, manifest: Manifest, *, gpu: str, gpu_count: int, usd_per_gpu_hour: float | None) -> None:
        self.run = RunDir.create(path, manifest)
        self.fleet_log = Appender(path / "fleet.log")
        self._outcomes = Appender(path / "spool" / "gateway.outcomes")
        self._states = Appender(path / "spool" / "gateway.states")
        self._lifetimes = Appender(path / "lifetimes.jsonl")
        self._files = (self.fleet_log, self._outcomes, self._states, self._lifetimes)
        self._gpu, self._gpu_count = gpu, gpu_count
        self._usd_per_hour = math.nan if usd_per_gpu_hour is None else usd_per_gpu_hour * gpu_count  # of one replica
        self.billed: set[int] = set()  # replicas requested and not stopped
        self.rows = 0
        self.failure = ""  # why recording ended before the gateway did

    @property
    def usd_per_hour(self) -> float:
        return len(self.billed) * self._usd_per_hour

    def outcome(self, outcome: Outcome) -> None:
        self.rows += 1
        self._outcomes.append(OUTCOME_STRUCT.pack(*outcome))

    def state(self, state: FleetState) -> None:
        self._states.append(FLEET_STATE_STRUCT.pack(*state))

    def replica_requested(self, now_ns: int, replica_id: int, pool: str) -> None:
        self.billed.add(replica_id)
        life = ReplicaLifetime(replica_id, pool, self._gpu, self._gpu_count, now_ns, None, None, "")
        self._life(life._asdict())

    def replica_ready(self, now_ns: int, replica_id: int) -> None:
        self._life({"replica_id": replica_id, "ready_at_ns": now_ns})

    def replica_stopped(self, now_ns: int, replica_id: int, reason: str) -> None:
        if replica_id in self.billed:
            self.billed.remove(replica_id)
            self._life({"replica_id": replica_id, "stopped_at_ns": now_ns, "reason": reason})

    def _life(self, change: dict[str, Any]) -> None:
        self._lifetimes.append(json.dumps(change).encode() + b"\n")

    def flush(self) -> None:
        """Write what is buffered; the first failure ends the recording for good."""
        for file in self._files:
            if self.failure:
                file.drop()
                continue
            try:
                file.flush()
            except OSError as error:
                self.failure = f"{file.path.name}: {error.strerror}"
                log.error("recording ends: %s", self.failure)

    def close(self, **manifest: Any) -> None:
        self.flush()
        with contextlib.suppress(OSError):  # the disk that is full for rows is full for this too
            self.run.update_manifest(**manifest)
        for file in self._files:
            file.close()


class RecorderProcess:
    """``tracing.recorder`` as a process of its own. Its death costs metrics and spans, never a request, and is said in /healthz."""

    def __init__(self) -> None:
        self.metrics_port: int | None = None
        self.deaths = 0
        self.summary: dict[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, run: Path) -> None:
        command = [sys.executable, "-m", "tracing.recorder", "--run", str(run), "--role", "gateway", "--metrics-port", "0"]
        pipe = asyncio.subprocess.PIPE  # its stdin closes with this process, however that ends, and it follows
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                said = json.loads(line)
                self.metrics_port = said.get("metrics_port", self.metrics_port)
                self.summary = said if "rows" in said else self.summary
        await process.wait()
        self.metrics_port = None
        if not self.summary:  # it says what it did only when it was asked to end
            self.deaths += 1
            log.error("the recorder ended with %s: rows stay in the spool, metrics and spans stop", process.returncode)

    async def stop(self) -> None:
        """Close its stdin (a signal could come before it listens for one) and wait until it has read the spool to its end."""
        if self._process is None or self._reader is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(RECORDER_ENDS_S):
                await self._reader
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

"""What the recorder costs: CPU of its process for each 1,000 records, parts, metrics and sampled spans included."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from replay.records import NS_PER_S
from replay.runs import RunDir
from tests.tracing_support import MANIFEST, packed, quick

RECORDS = 50_000
PER_S = 2_000  # so that 25 s of a busy gateway are recorded in one go


def figures() -> Iterator[dict[str, Any]]:
    rows = packed([quick(request, due_at_ns=request * NS_PER_S // PER_S) for request in range(RECORDS)])
    idle, _ = _cpu_s(packed([quick(0)]), "1000000000")  # one record: pyarrow imports pandas when it meets its first array
    default, kept = _cpu_s(rows, "100")
    everything, all_kept = _cpu_s(rows, "1")
    for name, cpu_s, traces, target_ms in (
        ("recorder CPU per 1,000 records, one trace in 100", default, kept, 25.0),
        ("recorder CPU per 1,000 records, every trace up to 100/s", everything, all_kept, None),
    ):
        spent_ms = (cpu_s - idle) / RECORDS * 1000 * 1000
        yield {
            "name": name,
            "value": spent_ms,
            "unit": "ms",
            "against": f"{traces} traces kept; start and end alone take {idle:.2f} s",
            "ratio": None,
            "target": None if target_ms is None else f"at most {target_ms:g} ms",
            "ok": None if target_ms is None else spent_ms <= target_ms,
        }


def _cpu_s(spool: bytes, one_in: str) -> tuple[float, int]:
    """CPU seconds of a recorder that reads this spool, and the traces it kept."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder) / "run", MANIFEST)
        (run.path / "spool" / "w.outcomes").write_bytes(spool)
        command = [sys.executable, "-m", "tracing.recorder", "--run", str(run.path), "--sample-one-in", one_in]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            before = psutil.Process().cpu_times()
            out, _ = process.communicate()
            after = psutil.Process().cpu_times()  # of the children that have been waited for
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, int(json.loads(out.splitlines()[-1])["traces_kept"])

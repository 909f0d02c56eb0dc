"""One live arm: gateway and replicas up, Locust as a process, everything down again, whatever happens.

May live here: starting, watching and stopping of processes. What they do is theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

import loadgen
from replay import traces
from replay.errors import InputError
from replay.policies import spec as policies
from replay.records import NS_PER_S, OUTCOME_STRUCT
from replay.runs import RunDir
from stack.experiment import Arm, Experiment, manifest, versions

GATEWAY_LISTENS_S: Final = 30.0
GATEWAY_STOPS_S: Final = 60.0  # its drain included
READY_BEYOND_COLD_START_S: Final = 60.0
REFUSED_FOR_S: Final = 10.0  # a fleet that still refuses then (an address that does not answer) will not come
BYTES_PER_TOKEN: Final = {"stand-in": "4", "llama": "auto", "urls": "auto"}  # the stand-in's tokenizer is bytes / 4
Progress = Callable[[str, float], None]  # what is going on, share done (0..1)


def run_arm(experiment: Experiment, arm: Arm, table: pa.Table, folder: Path, progress: Progress) -> None:
    """Carry out one arm; its run directory is complete when this returns, and readable when it does not."""
    folder.mkdir(parents=True)
    traces.write(table, folder / "trace.parquet")
    progress("starting the fleet", 0.0)
    known = manifest(experiment, arm, table, simulated=False)
    with _gateway(experiment, arm, folder) as url:
        start = _wait_ready(experiment, url, progress)
        RunDir.prepare(folder, {**known, "start": start, "versions": versions()})
        _replay(experiment, folder, url, progress, planned_s=known["planned_ns"] / NS_PER_S)


@contextlib.contextmanager
def _gateway(experiment: Experiment, arm: Arm, folder: Path) -> Iterator[str]:
    """A gateway process with its fleet; yields its URL, and on the way out stops it by pid, replicas and recorder with it."""
    config = {
        "host": "127.0.0.1",
        "port": 0,
        "run_dir": str((folder / "gateway").absolute()),
        "policy": policies.to_dict(arm.policy),
        "fleet": experiment.fleet.model_dump(),
        "seed": experiment.scalars.seed,
        "slo": experiment.slo.terms(),
    }
    (folder / "gateway.json").write_text(json.dumps(config, indent=1))
    with (folder / "gateway.log").open("wb") as log:
        command = [sys.executable, "-m", "stack.gateway", "--config", str(folder / "gateway.json")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    try:
        yield _listening(process, folder)["url"]
    finally:
        _stop(process, GATEWAY_STOPS_S)


def _listening(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    """The one line that the gateway prints once it listens; its log's last lines where it never does."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(GATEWAY_LISTENS_S) else b""
    try:
        answer: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        raise InputError(
            f"the gateway did not start: {_tail(folder / 'gateway.log')}", fix=f"see {folder / 'gateway.log'}"
        ) from None
    return answer


def _wait_ready(experiment: Experiment, url: str, progress: Progress) -> dict[str, Any]:
    """Poll /readyz until the smallest fleet is ready; its answer is what says that every arm starts equal."""
    began, answer = time.monotonic(), dict[str, Any]()
    limit_s = experiment.cold_start_s + READY_BEYOND_COLD_START_S
    while (waited_s := time.monotonic() - began) < limit_s:
        try:
            with urllib.request.urlopen(url + "/readyz", timeout=5) as response:  # noqa: S310 (our own gateway)
                return {**json.load(response), "caches": "cold" if experiment.fleet.kind != "urls" else "unknown"}
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read() or b"{}")
        except OSError as error:
            fix = "see gateway.log in the arm's folder"
            raise InputError(f"the gateway went away while its fleet started: {error}", fix=fix) from error
        if "refusal" in answer and waited_s > experiment.cold_start_s + REFUSED_FOR_S:
            break
        progress("waiting for the first replicas", waited_s / limit_s)
        time.sleep(0.2)
    why = answer.get("refusal", f"{answer.get('ready', 0)} of {answer.get('replicas_min', '?')} ready")
    raise InputError(f"the first replicas did not come within {waited_s:.0f} s: {why}", fix="see gateway.log and gateway/replicas/")


def _replay(experiment: Experiment, folder: Path, url: str, progress: Progress, *, planned_s: float) -> None:
    """Locust, headless, on the prepared trace; its output goes to locust.log, its exit code 1 means an invalid run and is kept."""
    limits = ",".join(f"{name.removesuffix('_s')}<={seconds:g}s" for name, seconds in experiment.slo.terms().items())
    command = [
        *(sys.executable, "-m", "locust", "-f", str(Path(loadgen.__file__).parent), "--headless", "--host", url),
        *("--trace", str(folder / "trace.parquet"), "--run-dir", str(folder), "--run-id", f"{folder.parent.name}/{folder.name}"),
        *("--drain", f"{experiment.scalars.drain_s}s", "--bytes-per-token", BYTES_PER_TOKEN[experiment.fleet.kind]),
        *(("--slo", limits) if limits else ()),
    ]
    environment = dict(os.environ)
    if experiment.fleet.api_key_env and (key := os.environ.get(experiment.fleet.api_key_env)):
        environment["OPENAI_API_KEY"] = key
    with (folder / "locust.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        began = time.monotonic()
        while process.poll() is None:
            share = min((time.monotonic() - began) / (planned_s + 5), 1.0)
            progress(f"replaying, {_rows(folder)} requests ended", share)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    finally:
        _stop(process, experiment.scalars.drain_s + 30)
    if process.returncode not in (0, 1) or "started_at_unix_ns" not in RunDir(folder).manifest:
        raise InputError(
            f"locust ended with {process.returncode}: {_tail(folder / 'locust.log')}", fix=f"see {folder / 'locust.log'}"
        )


def _rows(folder: Path) -> int:
    """Requests ended so far, by the size of the spools (each row has a fixed size)."""
    return sum(spool.stat().st_size for spool in (folder / "spool").glob("*.outcomes")) // OUTCOME_STRUCT.size


def _stop(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM, wait, SIGKILL to its whole group: nothing is left running."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


def _tail(path: Path, lines: int = 5) -> str:
    return " | ".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "no log"

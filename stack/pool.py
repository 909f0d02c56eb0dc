"""Replicas as processes, or as somebody else's URLs: started, probed until they are ready, stopped by pid.

May live here: lifecycle. When to start or stop one is the fleet's decision; a draining replica is stopped once it is empty, so
stopping never waits for requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol
from urllib.parse import urlsplit

import httptools

from replay.errors import InputError
from replay.hardware import FleetSpec, fleet_spec
from stack.upstream import Address

LISTEN_S: Final = 30.0  # a Python process that imports numpy on a busy machine takes some seconds
READY_BEYOND_COLD_START_S: Final = 60.0
PROBE_S: Final = 5.0  # for one answer
PROBE_EVERY_S: Final = 0.05
STOP_GRACE_S: Final = 5.0  # from SIGTERM to SIGKILL
LOG_TAIL_BYTES: Final = 2000
RETRY_S: Final = 5.0


class PoolRefused(Exception):  # noqa: N818 (the fleet's word: replica_refused)
    """The replica did not come up. Another try is worth it after ``retry_s``."""

    def __init__(self, reason: str, retry_s: float = RETRY_S) -> None:
        super().__init__(reason)
        self.reason, self.retry_s = reason, retry_s


class Pool(Protocol):
    """Where replicas come from. ``on_death(replica_id, reason)`` is called in the loop when a ready one ends by itself."""

    on_death: Callable[[int, str], None]

    async def start(self, replica_id: int, rung: str | None = None) -> Address:
        """The replica's address once it is ready. Raises PoolRefused."""

    async def stop(self, replica_id: int) -> None:
        """Returns when it is gone; one that is still starting is stopped too, and its ``start`` raises PoolRefused."""

    async def close(self) -> None:
        """Stop all; nothing is left running, and ``start`` refuses from now on."""


def make_pool(spec: FleetSpec, run_dir: str | Path, *, seed: int = 0) -> Pool:
    """The pool for a fleet. Raises InputError for URLs that cannot be served."""
    return UrlPool(spec) if spec.kind == "urls" else ProcessPool(spec, Path(run_dir), seed=seed)


class _Child:
    """A replica's process, from the moment it is asked for."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        self.stopping = False
        self.watch: asyncio.Task[None] | None = None
        self._spawn = asyncio.create_task(_spawn(command, log))

    async def process(self) -> asyncio.subprocess.Process:
        """Whoever is cancelled meanwhile, the process comes to be and is known: none is leaked. Raises OSError."""
        return await asyncio.shield(self._spawn)

    async def end(self, grace_s: float) -> None:
        """SIGTERM, and after ``grace_s`` SIGKILL to its group, which exists until its leader has been waited for."""
        self.stopping = True
        try:
            process = await self.process()
        except OSError:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    def refused(self, process: asyncio.subprocess.Process, what: str) -> PoolRefused:
        return PoolRefused("stopped while it started" if self.stopping else f"{what}: {self.ended(process)}")

    def ended(self, process: asyncio.subprocess.Process) -> str:
        """How the process ended, in words, with the last of its log."""
        code = process.returncode
        how = "it runs" if code is None else f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        tail = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
        return f"{how}; {self.log.name} ends in: {tail}" if tail else how


async def _spawn(command: list[str], log: Path) -> asyncio.subprocess.Process:
    with log.open("ab") as stderr:
        return await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=stderr, start_new_session=True
        )


class ProcessPool:
    """Replicas as child processes on free ports, each in a process group of its own, with its log beside the run.

    They hold the other end of a pipe of this process and end with it, even if it is killed.
    """

    def __init__(self, spec: FleetSpec, run_dir: Path, *, seed: int = 0) -> None:
        self.on_death: Callable[[int, str], None] = lambda replica_id, reason: None
        self._spec, self._seed = spec, seed
        self._logs = run_dir / "replicas"
        self._children: dict[int, _Child] = {}
        self._closed = False

    async def start(self, replica_id: int, rung: str | None = None) -> Address:
        assert replica_id not in self._children, f"replica {replica_id} was started before"
        if self._closed:
            raise PoolRefused("the pool is closed")
        asked_at_ns = time.monotonic_ns()
        spec = self._spec if rung is None else fleet_spec({**self._spec.model_dump(), "gpu": rung})
        cold_start_s = spec.phases().total_ns / 1e9 if spec.kind == "stand-in" else 0.0
        self._logs.mkdir(parents=True, exist_ok=True)
        child = self._children[replica_id] = _Child(self._command(spec, asked_at_ns), self._logs / f"{replica_id}.log")
        try:
            process = await child.process()
            address = await self._listening(child, process)
            await self._ready(child, process, address, asked_at_ns / 1e9 + cold_start_s + READY_BEYOND_COLD_START_S)
        except BaseException as error:  # a cancelled start leaves nothing behind either
            await child.end(0)
            self._children.pop(replica_id, None)
            if isinstance(error, OSError):
                raise PoolRefused(f"could not be started: {error}") from error
            raise
        child.watch = asyncio.create_task(self._watch(replica_id, child, process))
        return address

    async def stop(self, replica_id: int) -> None:
        if (child := self._children.pop(replica_id, None)) is not None:
            await child.end(STOP_GRACE_S)

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*(self.stop(replica_id) for replica_id in list(self._children)))

    def _command(self, spec: FleetSpec, asked_at_ns: int) -> list[str]:
        module = "stack.llama" if spec.kind == "llama" else "stack.replica"
        config = {"fleet": spec.model_dump(), "seed": self._seed, "asked_at_ns": asked_at_ns, "follow_parent": True}
        return [sys.executable, "-m", module, "--config", json.dumps(config)]

    async def _listening(self, child: _Child, process: asyncio.subprocess.Process) -> Address:
        """Read the one line that says where it listens."""
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), LISTEN_S)
        except TimeoutError:
            raise child.refused(process, f"did not listen within {LISTEN_S:.0f} s") from None
        if not line:
            await process.wait()
            raise child.refused(process, "did not start")
        return Address("127.0.0.1", json.loads(line)["port"])

    async def _ready(self, child: _Child, process: asyncio.subprocess.Process, address: Address, until_s: float) -> None:
        """Probe until it answers that it is ready; it may say how long that will take."""
        while True:
            status, body = await _probe(address, "/health")
            if child.stopping or process.returncode is not None:
                raise child.refused(process, "died while it started")
            if status == 200:
                return
            if time.monotonic() > until_s:
                raise child.refused(process, f"not ready in time (last answer {status})")
            await asyncio.sleep(min(max(_remaining_s(body), 0.001), PROBE_EVERY_S))

    async def _watch(self, replica_id: int, child: _Child, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        if not child.stopping:
            self._children.pop(replica_id, None)
            self.on_death(replica_id, child.ended(process))


class UrlPool:
    """Servers that run already: starting one is finding it healthy, stopping it is leaving it alone."""

    def __init__(self, spec: FleetSpec) -> None:
        self.on_death: Callable[[int, str], None] = lambda replica_id, reason: None
        self._free = [_address(url, f"fleet.urls.{index}") for index, url in enumerate(spec.urls)]
        if len(set(self._free)) < len(self._free):
            raise InputError("the same URL twice", where="fleet.urls", fix="name each replica once")
        self._used: dict[int, Address] = {}
        key = os.environ.get(spec.api_key_env) if spec.api_key_env else None
        if spec.api_key_env and not key:
            raise InputError(
                f"the environment has no {spec.api_key_env}", where="fleet.api_key_env", fix="export the key under that name"
            )
        self._headers = f"authorization: Bearer {key}\r\n" if key else ""

    async def start(self, replica_id: int, rung: str | None = None) -> Address:
        if not self._free:
            raise PoolRefused(f"all {len(self._used)} urls are in use")
        address = self._free.pop(0)  # taken before the first await: two starts never probe the same one
        try:
            await self._healthy(address)
        except BaseException:
            self._free.append(address)
            raise
        self._used[replica_id] = address
        return address

    async def stop(self, replica_id: int) -> None:
        if (address := self._used.pop(replica_id, None)) is not None:
            self._free.append(address)

    async def close(self) -> None:
        self._used.clear()
        self._free.clear()

    async def _healthy(self, address: Address) -> None:
        """/health, or /v1/models where a server has none (vLLM, SGLang and llama.cpp have both; a hosted API only the second)."""
        where = f"http://{address.host}:{address.port}{address.base_path}"
        for path in ("/health", "/v1/models"):
            status, _ = await _probe(address, path, self._headers)
            if status == 200:
                return
            if status in (401, 403):
                raise PoolRefused(f"{where}{path} answers {status}: the key in fleet.api_key_env is not accepted")
            if status is None:
                raise PoolRefused(f"{where} does not answer")
        raise PoolRefused(f"{where} is not healthy: {path} answers {status}")


def _address(url: str, where: str) -> Address:
    """``http://host[:port][/base][/v1]`` as an address."""
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError as error:
        raise InputError(f"{url!r}: {error}", where=where, rule="http://host:port, with a base path if there is one") from error
    if parts.scheme == "https":
        raise InputError(
            f"{url!r} is https", where=where, rule="http only, so far", fix="put a TLS-terminating proxy in front of it"
        )
    if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"{url!r} is no address of a server", where=where, fix="write it as http://host:8000")
    return Address(parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))


class _Answer(NamedTuple):
    status: int | None  # None: no answer
    body: bytes


async def _probe(address: Address, path: str, headers: str = "") -> _Answer:
    """One GET on a connection of its own."""
    request = f"GET {address.base_path}{path} HTTP/1.1\r\nhost: {address.host}:{address.port}\r\n{headers}connection: close\r\n\r\n"
    reader = _BodyReader()
    try:
        async with asyncio.timeout(PROBE_S):
            source, sink = await asyncio.open_connection(address.host, address.port)
            try:
                sink.write(request.encode())
                while not reader.complete and (data := await source.read(65536)):
                    reader.feed(data)
            finally:
                sink.close()
    except (OSError, TimeoutError, httptools.HttpParserError):
        return _Answer(None, b"")
    return _Answer(reader.status(), b"".join(reader.parts))


class _BodyReader:
    """One HTTP answer."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)
        self.feed = self._parser.feed_data

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True

    def status(self) -> int | None:
        return self._parser.get_status_code() or None


def _remaining_s(body: bytes) -> float:
    """What a starting stand-in says about its cold start; for any other server, a moment."""
    try:
        return float(json.loads(body)["remaining_s"])
    except (ValueError, KeyError, TypeError):
        return PROBE_EVERY_S

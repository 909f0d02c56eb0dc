"""A real gateway in this process, in front of real HTTP servers whose answers a test writes: nothing is mocked but the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from replay import inputs
from replay.records import NS_PER_S, OUTCOME_DTYPE, STATUSES, Outcome
from replay.runs import read_spool
from stack import httpd
from stack.config import GatewayConfig
from stack.gateway import Gateway
from stack.pool import PoolRefused
from stack.upstream import Address
from tests.http_client import until

SSE = [(b"content-type", b"text/event-stream")]
JSON = [(b"content-type", b"application/json")]


def event(text: str | None = None, **fields: Any) -> bytes:
    """One SSE event: a chat delta with ``text``, or whatever ``fields`` say."""
    chunk: dict[str, Any] = {"id": "c", "choices": [{"index": 0, "delta": {"content": text}}]} if text is not None else {}
    return b"data: " + json.dumps({**chunk, **fields}).encode() + b"\n\n"


def usage_event(prompt: int = 9, output: int = 2) -> bytes:
    return event(id="c", choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output})


DONE = b"data: [DONE]\n\n"
STREAM = event("") + event("Hel") + event("lo")


class Replica:
    """An HTTP server on loopback; ``answer(exchange)`` is what it does with a completion, ``seen`` what it was asked."""

    def __init__(self, answer: Callable[[httpd.Exchange], None] | None = None) -> None:
        self.answer = answer or self.stream
        self.seen: list[httpd.Exchange] = []
        self.gone: list[httpd.Exchange] = []
        self.server: httpd.Server | None = None

    async def start(self) -> Address:
        self.server = await httpd.serve(self._handle, "127.0.0.1", 0)
        return Address("127.0.0.1", self.server.port)

    def _handle(self, exchange: httpd.Exchange) -> None:
        if exchange.method == b"GET":
            exchange.respond(200, JSON, b'{"object":"list","data":[{"id":"m"}]}')
            return
        self.seen.append(exchange)
        exchange.on_gone = lambda: self.gone.append(exchange)
        self.answer(exchange)

    def stream(self, exchange: httpd.Exchange) -> None:
        """What an engine does: streams where it was asked to, with usage where it was asked for it."""
        body = json.loads(exchange.body)
        if not body.get("stream"):
            text = {
                "id": "c",
                "choices": [{"message": {"content": "Hello"}}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 2},
            }
            exchange.respond(200, JSON, json.dumps(text).encode())
            return
        exchange.start(200, SSE)
        exchange.write(STREAM)
        if (body.get("stream_options") or {}).get("include_usage"):
            exchange.write(usage_event())
        exchange.end(DONE)

    def hold(self, exchange: httpd.Exchange) -> None:
        """Take the request and say nothing."""

    def close(self) -> None:
        if self.server is not None:
            self.server.close()


class Replicas:
    """A pool of such servers: replica n is the n-th of them; asked for more, it refuses."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas
        self.on_death: Callable[[int, str], None] = lambda replica_id, reason: None
        self.stopped: list[int] = []

    async def start(self, replica_id: int, rung: str | None = None) -> Address:
        if replica_id >= len(self.replicas):
            raise PoolRefused("no more of them", retry_s=0.05)
        return await self.replicas[replica_id].start()

    async def stop(self, replica_id: int) -> None:
        self.stopped.append(replica_id)
        if replica_id < len(self.replicas):
            self.replicas[replica_id].close()

    async def close(self) -> None:
        for replica in self.replicas:
            replica.close()

    def kill(self, replica_id: int) -> None:
        """Its process ends: every connection breaks, and the pool notices."""
        self.replicas[replica_id].close()
        self.on_death(replica_id, "killed by SIGKILL")


class Rig:
    """A gateway under test, and what it has written down."""

    def __init__(self, gateway: Gateway, pool: Replicas, run_dir: Path) -> None:
        self.gateway, self.pool, self.run_dir = gateway, pool, run_dir
        assert gateway.server is not None
        self.port = gateway.server.port

    def records(self) -> list[Outcome]:
        self.gateway.ledger.flush()
        return [Outcome._make(record) for record in read_spool(self.run_dir / "spool" / "gateway.outcomes", OUTCOME_DTYPE).tolist()]

    async def record(self, number: int = 0) -> Outcome:
        """The n-th record, once it is there."""
        await until(lambda: len(self.records()) > number)
        return self.records()[number]

    def statuses(self) -> dict[str, int]:
        return {status: count for status, count in zip(STATUSES, self.gateway.fleet.fleet.counts.by_status, strict=True) if count}


def policy(**parts: Any) -> dict[str, Any]:
    return {"name": "under-test", **parts}


@asynccontextmanager
async def gateway_of(
    tmp_path: Path,
    *replicas: Replica,
    ready: bool = True,
    cut: bool = False,
    policy_spec: dict[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[Rig]:
    """A gateway over ``replicas``; ends with what must hold after every run: conservation, parity, phases that sum up.

    ``ready``: wait for the smallest fleet first. ``cut``: the test itself cuts the recording short.
    """
    count = len(replicas)
    bounds = {"replicas": {"min": count, "max": count}} if count else {}
    document = {
        "run_dir": str(tmp_path / "gateway"), "policy": policy(**{**bounds, **(policy_spec or {})}), "fleet": {"kind": "stand-in"},
        "recorder": False, **config,
    }  # fmt: skip
    config_checked = GatewayConfig.of(document)
    pool = Replicas(*replicas)
    gateway = Gateway(config_checked, pool)
    await gateway.start()
    rig = Rig(gateway, pool, config_checked.run_dir)
    try:
        if ready:
            await until(lambda: len(gateway.replicas.addresses) >= config_checked.policy.replicas.min)
        yield rig
    finally:
        await gateway.stop()
    if not cut:
        check_run(rig)


def check_run(rig: Rig) -> None:
    gateway = rig.gateway
    gateway.fleet.fleet.check()
    ledger = json.loads((rig.run_dir / "run.json").read_text())
    ended = ledger["ended"]
    assert ended["inside"] == 0
    assert ended["arrived"] == sum(ended["statuses"].values())
    records = [Outcome._make(record) for record in read_spool(rig.run_dir / "spool" / "gateway.outcomes", OUTCOME_DTYPE).tolist()]
    assert [sum(record.status == code for record in records) for code in range(len(STATUSES))] == list(ended["statuses"].values())
    for record in records:
        phases = [getattr(record, f"{name}_ns") for name in ("limit", "queue", "cold_start", "route", "prefill", "decode", "retry")]
        spent_ns = sum(phase for phase in phases if phase > 0)
        assert abs(spent_ns - (record.done_at_ns - record.gateway_at_ns)) < 0.001 * NS_PER_S, record
    divergence = inputs.verify((rig.run_dir / "fleet.log").read_bytes())
    assert divergence is None, divergence


def completion(stream: bool = True, **fields: Any) -> bytes:
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": "Say hello"}], **fields}
    return json.dumps({key: value for key, value in body.items() if value is not None}).encode()


def task(coroutine: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine)

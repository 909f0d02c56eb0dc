"""The gateway as its operator sees it: health, readiness, metrics, records, scaling, and how it stops."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from replay.records import CANCELLED, ERROR, OUTCOME_STRUCT
from replay.runs import RunDir
from stack import httpd
from tests.gateway_rig import SSE, Replica, Rig, completion, event, gateway_of, task
from tests.http_client import Client, ask, request_bytes, scenario, until

CHAT = "/v1/chat/completions"


@scenario
async def test_ready_once_the_smallest_fleet_is(tmp_path: Path) -> None:
    release = asyncio.Event()
    slow, fast = Replica(), Replica()
    start = slow.start

    async def cold_start() -> object:
        await release.wait()
        return await start()

    slow.start = cold_start  # type: ignore[method-assign, assignment]
    async with gateway_of(tmp_path, fast, slow, ready=False) as rig:
        await until(lambda: rig.gateway.replicas.addresses)
        answer = await ask(rig.port, "/readyz")
        assert answer.status == 503
        assert json.loads(answer.body) == {"ready": 1, "replicas_min": 2, "starting": 1, "wanted": 2, "draining": 0}
        release.set()
        await until(lambda: len(rig.gateway.replicas.addresses) == 2)
        assert (await ask(rig.port, "/readyz")).status == 200


@scenario
async def test_requests_wait_for_a_cold_start_and_say_so(tmp_path: Path) -> None:
    release = asyncio.Event()
    replica = Replica()
    start = replica.start

    async def cold_start() -> object:
        await release.wait()
        return await start()

    replica.start = cold_start  # type: ignore[method-assign, assignment]
    async with gateway_of(tmp_path, replica, ready=False, policy_spec={"replicas": {"min": 0, "max": 1}}) as rig:
        assert (await ask(rig.port, "/readyz")).status == 200
        assert (await ask(rig.port, "/v1/models")).status == 503
        asked = task(ask(rig.port, CHAT, completion()))
        await until(lambda: rig.gateway.calls)
        release.set()
        answer = await asked
        assert answer.status == 200
        assert "cold_start;dur=" in answer.headers["server-timing"]
        record = await rig.record()
        assert record.cold_start_ns > 0
        assert record.queue_ns == 0


@scenario
async def test_the_autoscaler_starts_and_drains_replicas(tmp_path: Path) -> None:
    replicas = [Replica(), Replica()]
    for replica in replicas:
        replica.answer = replica.hold
    spec = {
        "replicas": {"min": 1, "max": 2}, "slots_per_replica": 1, "balancer": "least_outstanding",
        "autoscaler": {"kind": "concurrency", "target": 1, "interval_s": 0.1, "down_stabilisation_s": 0.1},
    }  # fmt: skip
    async with gateway_of(tmp_path, *replicas, policy_spec=spec) as rig:
        asked = [task(ask(rig.port, CHAT, completion())) for _ in range(2)]
        await until(lambda: replicas[0].seen and replicas[1].seen)
        for replica in replicas:
            replica.stream(replica.seen[0])
        assert [answer.status for answer in await asyncio.gather(*asked)] == [200, 200]
        await until(lambda: rig.pool.stopped == [1])
        stays, stopped = _lifetimes(rig).values()
        assert stays["stopped_at_ns"] is None
        assert stopped["reason"] == "scaled down"
        assert stopped["requested_at_ns"] < stopped["ready_at_ns"] < stopped["stopped_at_ns"]
        assert (stopped["pool"], stopped["gpu"], stopped["gpu_count"]) == ("main", "a100_sxm", 1)


def _lifetimes(rig: Rig) -> dict[int, dict[str, Any]]:
    """The change log, folded."""
    rig.gateway.ledger.flush()
    lives: dict[int, dict[str, Any]] = {}
    for line in (rig.run_dir / "lifetimes.jsonl").read_text().splitlines():
        change = json.loads(line)
        lives.setdefault(change["replica_id"], {}).update(change)
    return lives


@scenario
async def test_a_pool_that_refuses_is_asked_again(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, ready=False, policy_spec={"replicas": {"min": 1, "max": 1}}) as rig:
        await until(lambda: len(rig.pool.stopped) >= 3)
        assert {life["reason"] for life in _lifetimes(rig).values() if life["stopped_at_ns"] is not None} == {"no more of them"}


@scenario
async def test_a_dead_replica_is_replaced(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica(), Replica(), policy_spec={"replicas": {"min": 1, "max": 1}}) as rig:
        rig.pool.kill(0)
        answer = await ask(rig.port, CHAT, completion())
        assert answer.headers["x-tidegauge-replica"] == "1"
        health = json.loads((await ask(rig.port, "/healthz")).body)
        assert health["replicas"]["ready"] == 1
        assert health["statuses"]["ok"] == 1


@scenario
async def test_the_recorder_renders_metrics_and_its_death_hurts_no_request(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica(), recorder=True) as rig:
        recorder = rig.gateway.recorder
        assert (await ask(rig.port, CHAT, completion())).status == 200
        await until(lambda: recorder.metrics_port is not None, 15)
        async with asyncio.timeout(10):
            while b'status="ok"' not in (metrics := await ask(rig.port, "/metrics")).body:
                await asyncio.sleep(0.05)
        assert b'tidegauge_requests_total{model="m",policy="under-test"' in metrics.body
        assert metrics.headers["content-type"].startswith("text/plain")
        assert recorder._process is not None
        recorder._process.kill()
        await until(lambda: recorder.deaths == 1)
        assert (await ask(rig.port, CHAT, completion())).status == 200
        assert (await ask(rig.port, "/metrics")).status == 503
        assert json.loads((await ask(rig.port, "/healthz")).body)["recorder"] == {"alive": False, "deaths": 1}
    rows = RunDir.open(rig.run_dir).outcomes().to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok"]  # what no recorder read is read from the spool


@scenario
async def test_rows_of_clients_that_keep_them_are_not_doubled(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica(), recorder=True) as rig:
        for headers in ({}, {"x-tidegauge-run": "r", "x-tidegauge-request": "5"}):
            await ask(rig.port, CHAT, completion(), headers=headers)
    run = RunDir.open(rig.run_dir)
    assert run.manifest["recorder"]["rows"] == 1
    assert run.outcomes()["request_id"].to_pylist() == [0]


@scenario
async def test_a_full_disk_ends_the_recording_and_no_request(tmp_path: Path) -> None:
    async with gateway_of(tmp_path, Replica(), cut=True) as rig:
        for _ in range(6):
            await ask(rig.port, CHAT, completion())
        whole = len(rig.records()) * OUTCOME_STRUCT.size
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 100, unlimited[1]))  # the next record fits by a fifth
        try:
            await ask(rig.port, CHAT, completion())
            await until(lambda: rig.gateway.ledger.failure)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert (await ask(rig.port, CHAT, completion())).status == 200
        health = json.loads((await ask(rig.port, "/healthz")).body)
        assert health["recording"] == "gateway.outcomes: File too large"
        assert health["statuses"]["ok"] == 8
    assert (rig.run_dir / "spool" / "gateway.outcomes").stat().st_size == whole  # no half record, nothing after the cut
    assert len(RunDir.open(rig.run_dir).outcomes()) == 6


@scenario
async def test_stopping_lets_streams_end_and_turns_the_rest_away(tmp_path: Path) -> None:
    replica = Replica()
    replica.answer = replica.hold
    async with gateway_of(tmp_path, replica, policy_spec={"slots_per_replica": 1}, limits={"drain_s": 0.4}) as rig:
        running, waiting = await Client.connect(rig.port), await Client.connect(rig.port)
        running.send(request_bytes(CHAT, completion()))
        await until(lambda: replica.seen)
        waiting.send(request_bytes(CHAT, completion()))
        await until(lambda: len(rig.gateway.calls) == 2)
        stopping = task(rig.gateway.stop())
        await until(lambda: rig.gateway.stopping)
        with pytest.raises(OSError):
            await Client.connect(rig.port)
        replica.stream(replica.seen[0])
        assert (await running.answer()).status == 200
        await until(lambda: len(replica.seen) == 2)  # the drain serves what waits, too; this one is never answered
        told = await waiting.answer()
        assert told.status == 502
        assert "the gateway stopped" in json.loads(told.body)["error"]["message"]
        await stopping
        assert rig.statuses() == {"ok": 1, "error": 1}


@scenario
async def test_stopping_with_no_time_left_answers_everybody(tmp_path: Path) -> None:
    def begin(exchange: httpd.Exchange) -> None:
        exchange.start(200, SSE)
        exchange.write(event("Hel"))

    replica = Replica(begin)
    async with gateway_of(tmp_path, replica, policy_spec={"slots_per_replica": 1}, limits={"drain_s": 0}) as rig:
        streaming, waiting = await Client.connect(rig.port), await Client.connect(rig.port)
        streaming.send(request_bytes(CHAT, completion(stream_options={"include_usage": True})))
        await streaming.reader.readuntil(b"Hel")
        waiting.send(request_bytes(CHAT, completion()))
        await until(lambda: len(rig.gateway.calls) == 2)
        await rig.gateway.stop()
        assert b"the gateway stopped" in await streaming.rest()
        assert (await waiting.answer()).status == 503
        assert {record.status for record in rig.records()} == {ERROR, CANCELLED}

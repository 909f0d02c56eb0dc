"""Replicas come up, are watched, and are gone afterwards, however their pool ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from replay.errors import InputError
from replay.hardware import fleet_spec
from stack.pool import PoolRefused, ProcessPool, UrlPool, make_pool
from tests.replica_process import get, replica


def spec(**fleet: Any) -> Any:
    return fleet_spec({"kind": "stand-in", "gpu": "h100_sxm", "cold_start": {}, **fleet})


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def gone_within(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


def children() -> list[int]:
    """Processes that a pool of this test has started and that live."""
    ours = [process for process in psutil.Process().children() if alive(process.pid)]
    return [process.pid for process in ours if any("follow_parent" in word for word in process.cmdline())]


def test_replicas_start_ready_and_stop(tmp_path: Path) -> None:
    async def story() -> None:
        pool = make_pool(spec(cold_start={"engine_start": 0.8}), tmp_path)
        began = time.monotonic()
        first, second = await asyncio.gather(pool.start(0), pool.start(1))
        assert time.monotonic() - began == pytest.approx(0.8, abs=0.3), "the cold start takes what was declared, not more"
        assert first.port != second.port
        urls = [f"http://{address.host}:{address.port}" for address in (first, second)]
        assert [(await asyncio.to_thread(get, url, "/health"))[0] for url in urls] == [200, 200]
        pids = children()
        assert len(pids) == 2
        await pool.stop(0)
        assert len(children()) == 1
        await pool.close()
        assert not any(map(alive, pids))
        with pytest.raises(PoolRefused, match="closed"):
            await pool.start(2)

    uvloop.run(story())
    assert {path.name for path in (tmp_path / "replicas").iterdir()} == {"0.log", "1.log"}


def test_a_replica_that_dies_is_reported_and_one_that_is_stopped_is_not(tmp_path: Path) -> None:
    async def story() -> list[tuple[int, str]]:
        pool, deaths, heard = make_pool(spec(), tmp_path), [], asyncio.Event()

        def on_death(replica_id: int, reason: str) -> None:
            deaths.append((replica_id, reason))
            heard.set()

        pool.on_death = on_death
        await pool.start(7)
        os.kill(children()[0], signal.SIGKILL)
        await asyncio.wait_for(heard.wait(), 5)
        await pool.start(8)
        await pool.stop(8)
        await pool.stop(8)
        await pool.close()
        return deaths

    [(replica_id, reason)] = uvloop.run(story())
    assert replica_id == 7
    assert "SIGKILL" in reason


def test_a_replica_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stack.pool.STOP_GRACE_S", 0.2)

    async def story() -> None:
        pool = make_pool(spec(), tmp_path)
        await pool.start(0)
        [pid] = children()
        os.kill(pid, signal.SIGSTOP)  # a stopped process keeps SIGTERM for later
        await pool.stop(0)
        assert not alive(pid)

    uvloop.run(story())


@pytest.mark.parametrize("way", ["stop", "close", "cancel"])
def test_a_replica_can_be_stopped_while_it_starts(tmp_path: Path, way: str) -> None:
    async def story() -> None:
        pool = make_pool(spec(cold_start={"engine_start": 60}), tmp_path)
        starting = asyncio.create_task(pool.start(0))
        while not children():
            await asyncio.sleep(0.01)
        if way == "cancel":
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
        else:
            await (pool.stop(0) if way == "stop" else pool.close())
            with pytest.raises(PoolRefused, match="stopped while it started"):
                await starting
        assert not children()

    uvloop.run(story())


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text("import sys; sys.exit('no such device')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))

    async def story() -> None:
        pool = make_pool(spec(), tmp_path)
        with pytest.raises(PoolRefused, match=r"(?s)did not start: exit code.*no such device") as refused:
            await pool.start(0)
        assert refused.value.retry_s > 0
        assert not children()

    uvloop.run(story())


def test_one_that_never_gets_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stack.pool.READY_BEYOND_COLD_START_S", -59.0)

    async def story() -> None:
        with pytest.raises(PoolRefused, match="not ready in time"):
            await make_pool(spec(cold_start={"engine_start": 60}), tmp_path).start(0)
        assert not children()

    uvloop.run(story())


PARENT = """
import asyncio, sys, uvloop
from replay.hardware import fleet_spec
from stack.pool import make_pool

async def main():
    pool = make_pool(fleet_spec({"kind": "stand-in", "gpu": "h100_sxm", "cold_start": {}}), sys.argv[1])
    await asyncio.gather(*(pool.start(i) for i in range(2)))
    print("up", flush=True)
    await asyncio.sleep(60)

uvloop.run(main())
"""


def test_replicas_end_with_a_killed_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    pids = [process.pid for process in psutil.Process(parent.pid).children()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    assert gone_within(pids, 5)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with replica() as url:
        yield url


def test_urls_are_handed_out_once_and_taken_back(server: str) -> None:
    async def story() -> None:
        pool = make_pool(spec(kind="urls", urls=[f"{server}/v1"]), "unused")
        address = await pool.start(0)
        assert (f"http://{address.host}:{address.port}", address.base_path) == (server, "")
        with pytest.raises(PoolRefused, match="in use"):
            await pool.start(1)
        await pool.stop(0)
        assert await pool.start(2) == address
        await pool.close()
        with pytest.raises(PoolRefused):
            await pool.start(3)

    uvloop.run(story())
    assert get(server, "/health")[0] == 200, "somebody else's server is left alone"


def test_a_url_that_does_not_answer_is_refused_and_tried_again_later(server: str) -> None:
    async def story() -> None:
        pool = make_pool(spec(kind="urls", urls=["http://127.0.0.1:9", server, f"{server}/elsewhere"]), "unused")
        with pytest.raises(PoolRefused, match=r"127\.0\.0\.1:9 does not answer"):
            await pool.start(0)
        assert (await pool.start(1)).port == int(server.rsplit(":", 1)[1])
        with pytest.raises(PoolRefused, match="404"):
            await pool.start(2)

    uvloop.run(story())


@pytest.mark.parametrize(
    ("fleet", "word"),
    [
        ({"urls": ["https://host:8000"]}, "https"),
        ({"urls": ["host:8000"]}, "no address"),
        ({"urls": ["http://host:seven"]}, "seven"),
        ({"urls": ["http://host:1", "http://host:1/v1"]}, "twice"),
        ({"urls": ["http://host:1"], "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
    ],
)
def test_urls_are_checked_before_anything_starts(fleet: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        make_pool(spec(kind="urls", **fleet), "unused")


def test_the_kind_decides_the_pool(tmp_path: Path) -> None:
    assert isinstance(make_pool(spec(), tmp_path), ProcessPool)
    assert isinstance(make_pool(spec(kind="urls", urls=["http://host:1"]), tmp_path), UrlPool)


def test_the_command_line_brings_one_up() -> None:
    command = [sys.executable, "-c", "import stack.cli.replica; from stack.cli import main; main()", "replica", "--json"]
    process = subprocess.Popen([*command, "--gpu", "l40s", "--cold-start", "0"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["pid"] == process.pid
        assert b"l40s" in get(f"http://127.0.0.1:{line['port']}", "/v1/models")[1]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    bad = subprocess.run([*command, "--gpu", "abacus"], capture_output=True, text=True, timeout=30, check=False)
    assert bad.returncode == 2
    assert "abacus" in bad.stderr

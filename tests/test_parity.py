"""One dispatcher, two clocks: the input log of live traffic, fed to a fresh Fleet, gives the same effects to the last one."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from replay import inputs
from stack import httpd
from tests.gateway_rig import DONE, SSE, Replica, Rig, completion, event, gateway_of, task, usage_event
from tests.http_client import Client, request_bytes, scenario

SPEC = {
    "balancer": "least_outstanding", "slots_per_replica": 2, "replicas": {"min": 1, "max": 3},
    "queue": {"kind": "fifo", "length_max": 10, "timeout_s": 0.3},
    "limiter": {"kind": "token_bucket", "requests_per_min": 60_000, "burst_requests": 40},
    "autoscaler": {"kind": "concurrency", "target": 2, "interval_s": 0.05, "down_stabilisation_s": 0.1},
}  # fmt: skip


def moody(seed: int) -> Replica:
    """A replica that takes its time, streams, refuses, errs and breaks off, by chance."""
    chance = random.Random(seed)

    def answer(exchange: httpd.Exchange) -> None:
        async def send() -> None:
            await asyncio.sleep(chance.random() * 0.03)
            mood = chance.random()
            if mood < 0.1:
                exchange.error(503, "loading")
            elif mood < 0.15:
                exchange.error(400, "too long")
            else:
                exchange.start(200, SSE)
                for _ in range(3):
                    exchange.write(event("word"))
                    await asyncio.sleep(chance.random() * 0.01)
                exchange.break_off() if mood < 0.25 else exchange.end(usage_event(40, chance.randrange(50)) + DONE)

        task(send())

    return Replica(answer)


async def burst(rig: Rig, seed: int, count: int = 120) -> None:
    """Clients in a burst: most wait for their answer, some leave."""
    chance = random.Random(seed)

    async def one() -> None:
        patience = 0.02 if chance.random() < 0.15 else 10.0
        body = completion(max_tokens=chance.randrange(1, 400), user="x" * chance.randrange(3000))
        await asyncio.sleep(chance.random() * 0.5)
        client = await Client.connect(rig.port)
        client.send(request_bytes("/v1/chat/completions", body, headers={"x-tidegauge-tenant": chance.choice(["a", "b"])}))
        try:
            async with asyncio.timeout(patience):
                await client.answer()
        except TimeoutError:
            pass
        client.leave()

    await asyncio.gather(*(one() for _ in range(count)))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a burst with retries, cancellations, shedding, limiting, scaling and a death in it."""
    folder = tmp_path_factory.mktemp("parity")

    @scenario
    async def run() -> None:
        replicas = [moody(seed) for seed in range(8)]
        async with gateway_of(folder, *replicas, policy_spec=SPEC) as rig:
            traffic = task(burst(rig, seed=1))
            await asyncio.sleep(0.25)
            rig.pool.kill(0)
            await traffic

    run()
    return folder / "gateway" / "fleet.log"


def test_the_log_holds_every_kind_of_input(log: Path) -> None:
    seen = {inputs.INPUTS[code] for code, *_ in inputs.frames(log.read_bytes())}
    assert seen >= {"start", "arrive", "first_token", "finish", "fail", "cancel", "replica_ready", "replica_gone", "wake"}


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_fresh_fleet_does_what_the_live_one_did(log: Path, hash_seed: str) -> None:
    code = "import sys; from replay import inputs; print(inputs.verify(open(sys.argv[1], 'rb').read()))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", code, str(log)], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "None"


def test_an_input_that_is_missing_is_found(log: Path) -> None:
    raw = log.read_bytes()
    at = raw.index(b"\n") + 1
    frames = list(inputs.frames(raw))
    lost = next(place for place, (code, *_) in enumerate(frames) if inputs.INPUTS[code] == "replica_ready")
    for _ in range(lost):
        at += 4 + int.from_bytes(raw[at : at + 4], "little")
    end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
    divergence = inputs.verify(raw[:at] + raw[end:])
    assert divergence is not None
    assert divergence.place >= lost


def test_no_prompt_text_in_the_log(log: Path) -> None:
    assert b"Say hello" not in log.read_bytes()

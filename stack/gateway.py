"""The gateway: drives a Fleet in wall time and carries out its effects over HTTP. ``python -m stack.gateway --config FILE.json``.

One event loop does everything: a request's last byte -> ``fleet.arrive`` -> Dispatch -> the replica's bytes forwarded. What a
policy decides is not decided here; Parquet, spans and metrics are made by the recorder, a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from replay.effects import Abort, Dispatch, DrainReplica, Reject, Shed, StartReplica, StopReplica
from replay.errors import InputError
from replay.hardware import price
from replay.inputs import LoggedFleet
from replay.policies import spec as policies
from replay.records import NS_PER_S, STATUSES, Outcome
from replay.requests import TokenRatio, observe
from replay.sse import TokenFinder, Usage
from stack import inbound
from stack.call import Call
from stack.config import GatewayConfig, url
from stack.exchange import Exchange
from stack.httpd import Server, serve
from stack.ledger import FLUSH_S, Ledger, RecorderProcess
from stack.pool import Pool, make_pool
from stack.relay import relay_get
from stack.replicas import Replicas
from stack.upstream import Address, Upstreams

log = logging.getLogger(__name__)

STATE_S: Final = 1.0
COMPLETIONS: Final = ("/v1/chat/completions", "/v1/completions")


class Gateway:
    """One gateway: ``start``, then requests arrive; ``stop`` ends it. ``pool`` starts and stops the replicas."""

    def __init__(self, config: GatewayConfig, pool: Pool) -> None:
        self.config = config
        self.origin_ns, self.started_at_unix_ns = time.monotonic_ns(), time.time_ns()
        self.run_id = config.id or f"gateway-{self.started_at_unix_ns:x}"
        cost = price(config.fleet)
        self.ledger = Ledger(
            config.run_dir, self._manifest(), gpu=config.gpu, gpu_count=config.fleet.tensor_parallel,
            usd_per_gpu_hour=cost.usd_per_gpu_hour if cost else None,
        )  # fmt: skip
        self.fleet = LoggedFleet(config.policy, config.seed, self.ledger.fleet_log.append)
        self.upstreams = Upstreams(config.limits.waits())
        self.recorder = RecorderProcess()
        self.tenants = inbound.Tenants(config.api_keys)
        self.upstream_key = os.environ.get(config.fleet.api_key_env) if config.fleet.api_key_env else None
        self.finder, self.ratio = TokenFinder(), TokenRatio()
        self.calls: dict[int, Call] = {}
        self.replicas = Replicas(self, pool)
        self.refused = 0  # before they entered the fleet: bad JSON, unknown key
        self.stopping = False
        self.server: Server | None = None
        self._loop = asyncio.get_running_loop()
        self._next_id = 0
        self._emptied = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._flusher: asyncio.TimerHandle | None = None
        self._next_state_ns = 0
        self._carry: dict[type, Callable[[Any], None]] = {
            Dispatch: self._dispatch, Reject: self._refuse, Shed: self._refuse, Abort: self._abort,
            StartReplica: self.replicas.start, StopReplica: self.replicas.stop, DrainReplica: self.write_state,
        }  # fmt: skip

    def now_ns(self) -> int:
        return time.monotonic_ns() - self.origin_ns

    # --- life

    async def start(self) -> None:
        """Listen, start the recorder, and let the fleet ask for its first replicas."""
        self.server = await serve(self.handle, self.config.host, self.config.port, self.config.limits.http())
        if self.config.recorder:
            self.ledger.flush()
            await self.recorder.start(self.config.run_dir)
        self.fleet.start(self.now_ns())
        self.carry_out()
        self._flush()

    async def stop(self) -> None:
        """Accept nothing more, let what is inside end (at most ``drain_s``), stop the replicas, write everything down."""
        if self.stopping or self.server is None:
            return
        self.stopping = True
        self.server.stop_accepting()
        self._emptied.clear()
        if self.calls:
            try:
                async with asyncio.timeout(self.config.limits.drain_s):
                    await self._emptied.wait()
            except TimeoutError:
                self._give_up()
        for handle in (self._timer, self._flusher):
            if handle is not None:
                handle.cancel()
        await self.replicas.close()
        await asyncio.sleep(0)  # the last answers leave before their connections close
        self.server.close()
        self.upstreams.close()
        self.ledger.state(self.fleet.fleet.state(self.now_ns(), self.ledger.usd_per_hour))
        self.ledger.flush()
        await self.recorder.stop()
        self.fleet.fleet.check()
        self.ledger.close(ended={"at_ns": self.now_ns(), "reason": "stopped", **self._counts()}, recorder=self.recorder.summary)

    def _give_up(self) -> None:
        """End what is still inside: first what waits, so that no freed slot takes it in again."""
        for call in [call for call in self.calls.values() if not call.in_flight]:
            self.cancelled(call)
            call.turn_away()
        for call in list(self.calls.values()):
            call.detail = "the gateway stopped"
            self.failed(call, "gone", tokens_out=1)  # 1: nowhere else to try

    def _manifest(self) -> dict[str, Any]:
        config = self.config
        return {
            "id": self.run_id,
            "kind": "live",
            "policy": {"name": config.policy.name, "spec": policies.to_dict(config.policy)},
            "fleet": config.fleet.model_dump(),
            "seed": config.seed,
            "slo": config.slo,
            "started_at_unix_ns": self.started_at_unix_ns,
        }

    # --- requests

    def handle(self, exchange: Exchange) -> None:
        """Every request of every client comes in here."""
        path = exchange.path
        if path in COMPLETIONS:
            self._complete(exchange) if self._allowed(exchange, b"POST") else None
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            self._models(exchange) if self._allowed(exchange, b"GET", b"HEAD") else None
        elif path in ("/healthz", "/readyz", "/metrics"):
            self._operate(exchange, path) if self._allowed(exchange, b"GET", b"HEAD") else None
        else:
            exchange.error(404, f"no such path: {path}", code="not_found")

    @staticmethod
    def _allowed(exchange: Exchange, *methods: bytes) -> bool:
        if exchange.method in methods:
            return True
        allow = [(b"allow", b", ".join(methods))]
        exchange.error(405, f"{exchange.method.decode()} is not allowed here", code="method_not_allowed", headers=allow)
        return False

    def _complete(self, exchange: Exchange) -> None:
        """A completion: read it, let the fleet decide."""
        if self.stopping:
            self.refused += 1
            exchange.error(503, "the gateway is stopping", code="stopping", headers=[(b"retry-after", b"1")])
            return
        try:
            request = inbound.read(exchange, self.tenants, self.upstream_key)
        except inbound.RefusedError as error:
            self.refused += 1
            exchange.error(error.status, str(error), code=error.code)
            return
        request_id = self._number(request.run_request)
        self.calls[request_id] = Call(self, exchange, request, request_id)
        seen = observe(
            request_id, prompt_bytes=request.prompt_bytes, prefix_hashes=request.prefix_hashes, ratio=self.ratio,
            tenant=request.tenant, model=request.model, priority=request.priority, session=request.session,
            output_cap=request.output_cap,
        )  # fmt: skip
        self.fleet.arrive(self.now_ns(), seen)
        self.carry_out()

    def _number(self, wanted: int | None) -> int:
        """The request's number in the fleet: our load generator's own where it is free, so that log and rows name the same."""
        if wanted is not None and wanted not in self.calls:
            return wanted
        while self._next_id in self.calls:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1

    # --- what calls report

    def first_token(self, call: Call) -> None:
        self.fleet.first_token(self.now_ns(), call.request_id)
        self.carry_out()

    def finished(self, call: Call, usage: Usage) -> None:
        if usage.prompt_tokens > 0:
            self.ratio.observe(call.inbound.prompt_bytes, usage.prompt_tokens)
        self.fleet.finish(self.now_ns(), call.request_id, max(usage.prompt_tokens, 0), max(usage.output_tokens, 0))
        self.carry_out()

    def failed(self, call: Call, kind: str, *, tokens_out: int) -> None:
        self.fleet.fail(self.now_ns(), call.request_id, kind, tokens_out)
        self.carry_out()

    def cancelled(self, call: Call) -> None:
        self.fleet.cancel(self.now_ns(), call.request_id)
        self.carry_out()

    def ended(self, call: Call, outcome: Outcome) -> None:
        del self.calls[call.request_id]
        self.ledger.outcome(outcome)
        if not self.calls:
            self._emptied.set()

    # --- effects

    def carry_out(self) -> None:
        for effect in self.fleet.drain():
            self._carry[type(effect)](effect)
        self.fleet.log()
        self._arm()

    def _dispatch(self, effect: Dispatch) -> None:
        self.calls[effect.request_id].dispatch(effect, self.replicas.addresses[effect.replica_id])

    def _refuse(self, effect: Reject | Shed) -> None:
        self.calls[effect.request_id].refuse(effect)

    def _abort(self, effect: Abort) -> None:
        self.calls[effect.request_id].abort(effect.why)

    def write_state(self, _effect: object = None) -> None:
        """A sample of the time line, once the other effects of the same input are carried out too."""
        self._loop.call_soon(self._sample)

    # --- time

    def _arm(self) -> None:
        """Have the timer fire when the fleet wants to be woken. One that fires too early only looks again."""
        wake_ns = self.fleet.next_wake_ns()
        if wake_ns is None or (self._timer is not None and self._timer_ns <= wake_ns):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ns = wake_ns
        self._timer = self._loop.call_later(max(wake_ns - self.now_ns(), 0) / NS_PER_S, self._wake)

    def _wake(self) -> None:
        self._timer = None
        now_ns, wake_ns = self.now_ns(), self.fleet.next_wake_ns()
        if wake_ns is not None and now_ns >= wake_ns:
            self.fleet.wake(now_ns)
            self.carry_out()
        else:
            self._arm()

    def _flush(self) -> None:
        if self.now_ns() >= self._next_state_ns:
            self._sample()
            self._next_state_ns = self.now_ns() + round(STATE_S * NS_PER_S)
        self.ledger.flush()
        self._flusher = self._loop.call_later(FLUSH_S, self._flush)

    def _sample(self) -> None:
        self.ledger.state(self.fleet.fleet.state(self.now_ns(), self.ledger.usd_per_hour))

    # --- the operator's side

    def _operate(self, exchange: Exchange, path: str) -> None:
        if path == "/metrics":
            port = self.recorder.metrics_port
            if port is None:
                exchange.error(503, "no recorder is running: there are no metrics", code="no_recorder")
            else:
                relay_get(self.upstreams, Address("127.0.0.1", port), exchange)
            return
        status, document = self._ready() if path == "/readyz" else (200, self._health())
        exchange.respond(status, [(b"content-type", b"application/json")], json.dumps(document).encode())

    def _ready(self) -> tuple[int, dict[str, Any]]:
        state, least = self.fleet.fleet.state(self.now_ns(), 0.0), self.config.policy.replicas.min
        document: dict[str, Any] = {"ready": state.ready, "replicas_min": least, "starting": state.starting, "wanted": state.wanted}
        document |= {"draining": state.draining, **({"refusal": self.replicas.refusal} if self.replicas.refusal else {})}
        return (200 if state.ready >= least and not self.stopping else 503), document

    def _health(self) -> dict[str, Any]:
        return {
            "status": "stopping" if self.stopping else "ok",
            "run": self.run_id,
            "policy": self.config.policy.name,
            "uptime_s": round(self.now_ns() / NS_PER_S, 3),
            "replicas": self._ready()[1],
            **self._counts(),
            "recorder": {"alive": self.recorder.alive, "deaths": self.recorder.deaths},
            "recording": self.ledger.failure or "on",
        }

    def _counts(self) -> dict[str, Any]:
        """Conservation, as it is shown: arrived = the sum of the statuses + inside."""
        counts = self.fleet.fleet.counts
        statuses = dict(zip(STATUSES, counts.by_status, strict=True))
        return {"arrived": counts.arrived, "inside": len(self.calls), "statuses": statuses, "refused": self.refused}

    def _models(self, exchange: Exchange) -> None:
        """What the fleet serves: any ready replica says so."""
        try:
            self.tenants.of(exchange)
        except inbound.RefusedError as error:
            exchange.error(error.status, str(error), code=error.code)
            return
        address = next(iter(self.replicas.addresses.values()), None)
        if address is None:
            exchange.error(503, "no replica is ready", code="no_replica", headers=[(b"retry-after", b"1")])
        else:
            relay_get(self.upstreams, address, exchange, key=self.upstream_key)


async def run(config: GatewayConfig, announce: Callable[[int], None]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. ``announce`` gets the port once it listens."""
    gateway = Gateway(config, make_pool(config.fleet, config.run_dir, seed=config.seed))
    told = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, told.set)
    try:
        await gateway.start()
    except OSError as error:
        raise InputError(
            f"cannot listen: {error.strerror or error}", where=f"{config.host}:{config.port}", fix="another --port"
        ) from error
    assert gateway.server is not None
    announce(gateway.server.port)
    # A full collection walks every object of the imports (50 ms and more): they live for ever, so they are taken out of it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # requests leave no cycles behind: a young collection every few of them finds nothing
    await told.wait()
    await gateway.stop()
    return 1 if gateway.ledger.failure else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stack.gateway", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--config", type=Path, required=True, help="JSON file: host, port, run_dir, policy, fleet, seed, api_keys, limits"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        config = GatewayConfig.read(options.config)

        def announce(port: int) -> None:
            print(json.dumps({"port": port, "url": url(config.host, port), "pid": os.getpid()}), flush=True)

        return uvloop.run(run(config, announce))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

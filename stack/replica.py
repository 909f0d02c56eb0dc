"""A stand-in GPU server: speaks OpenAI's API with vLLM's manners, generates filler words, and keeps time by ``Engine``.

Time inside is the modelled engine's: a request enters 3 ms (the API front end) after its last byte was read, every step ends
at the instant the profile says, and one timer wakes for the next of them. Being woken late delays what is written and nothing
else: no lateness adds up. Once the cold start has been lived through, ``/health`` answers 200.

Run as ``python -m stack.replica --config JSON`` (see ``ReplicaConfig``); it prints ``{"port":..,"pid":..}`` when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import uvloop

from replay.engine import FRONT_END_NS, Engine
from replay.errors import InputError
from replay.hardware import BLOCK_TOKENS, FleetSpec, fleet_spec, profile
from replay.wire import H_REQUEST_ID
from stack.child import announce, follow_parent
from stack.completions import Answer, Ask, RequestError
from stack.exchange import Exchange
from stack.httpd import Server, serve
from stack.timer import precise_timer
from stack.vllm_metrics import Phases, VllmMetrics, per_request_metrics

H_STAND_IN: Final = b"x-tidegauge-stand-in"
OWNED_BY: Final = "tidegauge-stand-in"
JSON: Final = (b"content-type", b"application/json")
EVENT_STREAM: Final = (b"content-type", b"text/event-stream; charset=utf-8")


class ReplicaConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The ``--config`` of a replica process, stand-in or llama.cpp."""

    fleet: dict[str, Any]  # a FleetSpec
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    seed: int = 0  # for lengths that the client leaves open
    asked_at_ns: int | None = None  # time.monotonic_ns() when the replica was asked for: its cold start begins there
    per_request_metrics: bool = True  # vLLM's --enable-per-request-metrics
    follow_parent: bool = False  # end when stdin closes

    @classmethod
    def from_command_line(cls, module: str) -> tuple[ReplicaConfig, FleetSpec]:
        """What ``--config`` says; exits with 2 and one line where it is wrong."""
        parser = argparse.ArgumentParser(prog=f"python -m {module}")
        parser.add_argument("--config", required=True, metavar="JSON", help='{"fleet": {"kind": ..}, "port": 0, ..}')
        try:
            config = msgspec.json.decode(parser.parse_args().config, type=cls)
            return config, fleet_spec(config.fleet)
        except (msgspec.MsgspecError, InputError) as error:
            parser.error(str(error))


class _Job:
    """A request inside: its client, its answer, and the instants that its phases are made of (ns, -1: not yet)."""

    __slots__ = (
        "admitted_at_ns",
        "answer",
        "arrived_at_ns",
        "ask",
        "due_ns",
        "exchange",
        "first_token_at_ns",
        "gone",
        "made",
        "number",
    )

    def __init__(self, number: int, exchange: Exchange, answer: Answer, due_ns: int) -> None:
        self.number, self.exchange, self.answer, self.ask = number, exchange, answer, answer.ask
        self.arrived_at_ns, self.due_ns = exchange.received_at_ns, due_ns  # due: leaves the front end for the engine
        self.admitted_at_ns = self.first_token_at_ns = -1
        self.made = 0
        self.gone = False


class StandIn:
    """The server's state: the engine, what is in front of it, and who gets its tokens."""

    def __init__(self, spec: FleetSpec, config: ReplicaConfig) -> None:
        self.spec, self.config = spec, config
        self.engine = Engine.of(spec)
        self.context_max = self.engine.kv_blocks * BLOCK_TOKENS
        self.metrics = VllmMetrics(spec.model, self.context_max)
        self.phase: str | None = "starting"  # of the cold start; None: ready
        self.ready_at_ns = 0
        self._described = profile(spec).describe()
        self._timer = precise_timer(self._wake)
        self._count = 0
        self._front: deque[_Job] = deque()  # in the front end, in order of due_ns
        self._queued: deque[_Job] = deque()  # in the engine's queue, which is served in order of arrival
        self._inside: dict[int, _Job] = {}
        self._decoding: dict[int, _Job] = {}
        self._now_ns = self._last_step_ns = 0  # everything up to _now_ns has happened
        self._routes: dict[tuple[bytes, str], Callable[[Exchange], None]] = {
            (b"POST", "/v1/chat/completions"): lambda exchange: self._complete(exchange, chat=True),
            (b"POST", "/v1/completions"): lambda exchange: self._complete(exchange, chat=False),
            (b"GET", "/v1/models"): self._models,
            (b"GET", "/health"): self._health,
            (b"GET", "/metrics"): self._render_metrics,
        }

    # --- cold start ----------------------------------------------------------------------------------------------------------

    async def start_cold(self) -> None:
        """Live through the phases of the profile's cold start, to absolute instants."""
        until_ns = self.config.asked_at_ns or time.monotonic_ns()
        self.ready_at_ns = until_ns + self.spec.phases().total_ns
        for name, seconds in self.spec.phases()._asdict().items():
            self.phase = name.removesuffix("_s")
            until_ns += round(seconds * 1e9)
            while (left_ns := until_ns - time.monotonic_ns()) > 0:
                await asyncio.sleep(left_ns / 1e9)
        gc.collect()
        gc.freeze()  # what the imports left behind is never looked at again: a full collection took 20 ms of a step
        self.phase = None

    # --- HTTP ----------------------------------------------------------------------------------------------------------------

    def handle(self, exchange: Exchange) -> None:
        route = self._routes.get((exchange.method, exchange.path))
        if route is None:
            known = any(exchange.path == path for _, path in self._routes)
            exchange.error(405 if known else 404, f"no {exchange.method.decode()} {exchange.path} here")
        else:
            route(exchange)

    def _health(self, exchange: Exchange) -> None:
        phases = {name: seconds for name, seconds in self.spec.phases()._asdict().items() if seconds}
        body: dict[str, Any] = {"status": "ok", "stand_in": self._described, "cold_start": phases}
        if self.phase is not None:
            remaining_s = max(self.ready_at_ns - time.monotonic_ns(), 0) / 1e9
            body |= {"status": "starting", "phase": self.phase, "remaining_s": remaining_s}
        exchange.respond(200 if self.phase is None else 503, [JSON], msgspec.json.encode(body))

    def _models(self, exchange: Exchange) -> None:
        card = {
            "id": self.spec.model, "object": "model", "created": 0, "owned_by": OWNED_BY, "max_model_len": self.context_max,
            "stand_in": self._described,
        }  # fmt: skip
        exchange.respond(200, [JSON], msgspec.json.encode({"object": "list", "data": [card]}))

    def _render_metrics(self, exchange: Exchange) -> None:
        text = self.metrics.render(self.engine.snapshot())
        exchange.respond(200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], text)

    def _complete(self, exchange: Exchange, *, chat: bool) -> None:
        if self.phase is not None:
            exchange.error(503, f"still starting: {self.phase}", headers=[(b"retry-after", b"1")])
            return
        try:
            ask = Ask(exchange.body, chat=chat, model=self.spec.model, context_max=self.context_max, seed=self.config.seed)
        except RequestError as error:
            exchange.error(400, str(error))
            return
        named = exchange.get(H_REQUEST_ID)
        base_id = uuid.uuid4().hex if named is None else named.decode("latin-1")
        answer = Answer(ask, f"{'chatcmpl' if chat else 'cmpl'}-{base_id}", int(time.time()))
        # a pipelined request was read before others that were handed over first: it goes behind them
        due_ns = max(exchange.received_at_ns + FRONT_END_NS, self._now_ns, self._front[-1].due_ns if self._front else 0)
        job = _Job(self._count, exchange, answer, due_ns)
        self._count += 1
        exchange.on_gone = lambda: self._leave(job)
        self._front.append(job)
        self._set_timer()

    def _headers(self, job: _Job, kind: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        named = job.exchange.get(H_REQUEST_ID)
        headers = [kind, (H_STAND_IN, self.spec.gpu.encode())]
        return headers if named is None else [*headers, (H_REQUEST_ID, named)]

    def _leave(self, job: _Job) -> None:
        """The client has gone: nothing is generated for it any more."""
        self._wake()
        if job.gone or job.number not in self._inside:
            job.gone = True  # still in the front end, or ended by the wake above
            return
        self.engine.cancel(self._now_ns, job.number)  # not a later instant: a step that ends before it would be missed
        self._remove(job)
        self.metrics.success["abort"] += 1
        self._set_timer()

    def _remove(self, job: _Job) -> None:
        job.gone = True
        del self._inside[job.number]
        self._decoding.pop(job.number, None)
        if job.admitted_at_ns < 0:
            self._queued.remove(job)

    # --- the engine's time ---------------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        step_ns = self.engine.next_step_ns()
        due_ns = self._front[0].due_ns if self._front else None
        self._timer.set(min(step_ns, due_ns) if step_ns is not None and due_ns is not None else step_ns or due_ns)

    def _wake(self) -> None:
        """Let everything happen that is due, each at its own instant and in order."""
        now_ns = self._now_ns = time.monotonic_ns()
        while True:
            step_ns = self.engine.next_step_ns()
            due_ns = self._front[0].due_ns if self._front else None
            if step_ns is not None and step_ns <= now_ns and (due_ns is None or step_ns <= due_ns):
                self.metrics.lateness.observe((now_ns - step_ns) / 1e9)
                self._step(step_ns)
            elif due_ns is not None and due_ns <= now_ns:
                self._submit(self._front.popleft())
            else:
                break
        self._set_timer()

    def _submit(self, job: _Job) -> None:
        if job.gone:
            return
        if job.ask.stream:
            job.exchange.start(200, self._headers(job, EVENT_STREAM))
            job.exchange.flush()  # as uvicorn does: the head leaves before the first token
        self._inside[job.number] = job
        self._queued.append(job)
        self.engine.submit(job.due_ns, job.number, job.ask.prompt_tokens, job.ask.output_tokens)
        self._note_admitted(job.due_ns)

    def _note_admitted(self, now_ns: int) -> None:
        """Whoever is not in the engine's queue any more was admitted in the step that begins now."""
        waiting = self.engine.snapshot().waiting
        while len(self._queued) > waiting:
            self._queued.popleft().admitted_at_ns = now_ns

    def _step(self, now_ns: int) -> None:
        """One step has ended: every decoding request has one more token, and all of them are written in this pass."""
        events = self.engine.advance(now_ns)
        if self._decoding:
            self.metrics.itl.observe((now_ns - self._last_step_ns) / 1e9, len(self._decoding))
            self.metrics.generation_tokens += len(self._decoding)
        self._last_step_ns = now_ns
        started: list[_Job] = []
        for event in events:
            job = self._inside[event.request_id]
            if event.kind == "first_token":
                job.first_token_at_ns = event.at_ns
                started.append(job)
            else:
                assert event.kind == "finished", "Ask lets in only what fits"
                self._finish(job, event.at_ns)
        for job in self._decoding.values():
            if job.ask.stream:
                job.exchange.write(job.answer.token(job.made))
            job.made += 1
        for job in started:
            self.metrics.generation_tokens += 1
            self.metrics.prompt_tokens += job.ask.prompt_tokens
            if not job.gone:  # it may have been its only token
                if job.ask.stream:
                    job.exchange.write(job.answer.role() + job.answer.token(0))
                job.made = 1
                self._decoding[job.number] = job
        self._note_admitted(now_ns)

    def _finish(self, job: _Job, now_ns: int) -> None:
        assert job.made == job.ask.output_tokens - 1, "a token is written in every step"
        self._remove(job)
        seconds = Phases(
            (job.admitted_at_ns - job.due_ns) / 1e9, (job.first_token_at_ns - job.admitted_at_ns) / 1e9,
            (now_ns - job.first_token_at_ns) / 1e9,
        )  # fmt: skip
        ask = job.ask
        self.metrics.finished(ask.finish_reason, ask.prompt_tokens, ask.output_tokens, seconds, (now_ns - job.arrived_at_ns) / 1e9)
        metrics = per_request_metrics(seconds, ask.output_tokens) if self.config.per_request_metrics else b""
        if not ask.stream:
            job.exchange.respond(200, self._headers(job, JSON), job.answer.whole(metrics))
        else:
            opening = job.answer.role() if job.made == 0 else b""
            job.exchange.end(opening + job.answer.ending(metrics))


async def run(spec: FleetSpec, config: ReplicaConfig, listening: Callable[[int], None]) -> None:
    """Serve until SIGTERM or SIGINT. ``listening(port)`` is called once the socket is bound.

    Raises SystemExit(1) after an error in the engine's loop: a dead replica is noticed, one that stands still is not.
    """
    loop, stop, failures = asyncio.get_running_loop(), asyncio.Event(), []

    def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        failures.append(context)
        stop.set()

    stand_in = StandIn(spec, config)
    server: Server = await serve(stand_in.handle, config.host, config.port)
    loop.set_exception_handler(failed)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listening(server.port)
    starting = asyncio.create_task(stand_in.start_cold())
    await stop.wait()
    starting.cancel()
    server.close()
    if failures:
        sys.exit(1)


def main() -> None:
    config, spec = ReplicaConfig.from_command_line("stack.replica")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if config.follow_parent:
        follow_parent()
    uvloop.run(run(spec, config, announce))


if __name__ == "__main__":
    main()

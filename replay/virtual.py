"""Client, gateway and replicas around one ``Fleet``, in virtual time.

What the gateway's driver takes from sockets and clocks comes here from an agenda: arrivals, steps of the replicas' engines,
cold starts, scrapes. May live here: that agenda, what becomes of effects, and one row of numbers a request. Nothing is random.
"""

from __future__ import annotations

import heapq
import math
from array import array
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from replay.effects import Abort, Dispatch, Effect, Reject, Shed, StartReplica, StopReplica
from replay.engine import FRONT_END_NS, Engine
from replay.fleet import Fleet
from replay.hardware import FleetSpec, price
from replay.prompts import prefix_hashes_of
from replay.records import ERROR, FLEET_STATE_STRUCT, LIMITED, NS_PER_S, OK, SHED, TIMEOUT, ReplicaLifetime
from replay.requests import Request, TokenRatio, declared_output_cap, observe
from replay.schedule import Schedule

SAMPLE_NS: Final = NS_PER_S  # the time line
BYTES_PER_TOKEN: Final = 4  # of the prompts that the load generator makes

# Kinds of agenda entries; at one instant they are taken in this order.
_READY, _STEP, _SUBMIT, _ARRIVE, _SAMPLE, _END = range(6)
_NEVER_NS: Final = 2**63
_NOT_DISPATCHED: Final = Dispatch(-1, -1, 0, limit_ns=-1, queue_ns=-1, cold_start_ns=-1, retry_ns=-1)


class Row(NamedTuple):
    """What a request's end is known by, in whole numbers; the outcome's other fields follow from them and the plan."""

    request_id: int
    status: int
    scheduled_at_ns: int
    limit_ns: int
    queue_ns: int
    cold_start_ns: int
    retry_ns: int
    queue_reason: int
    replica_id: int
    attempts: int
    sent_at_ns: int
    dispatched_at_ns: int
    first_at_ns: int  # at the gateway, as the next
    ended_at_ns: int
    done_at_ns: int  # at the client
    tokens: int  # published by then
    detail: int  # the driver's texts by number


class Flight:
    """A request between its arrival at the gateway and its end."""

    __slots__ = ("dispatch", "dispatched_at_ns", "first_at_ns", "scheduled_at_ns", "sent")

    def __init__(self, scheduled_at_ns: int, *, sent: bool = True) -> None:
        self.scheduled_at_ns, self.sent = scheduled_at_ns, sent
        self.dispatch: Dispatch = _NOT_DISPATCHED
        self.dispatched_at_ns = self.first_at_ns = -1


class Requests:
    """The plan's rows as the gateway observes them: what is on the wire before the first token, never the true length."""

    def __init__(self, plan: pa.Table) -> None:
        def column(name: str, default: Any) -> list[Any]:
            return [default if value is None else value for value in plan[name].to_pylist()]

        # A server refuses an empty prompt and makes at least one token, also where a trace says 0.
        self.prompt_tokens: list[int] = np.maximum(plan["prompt_tokens"].to_numpy(), 1).tolist()
        self.output_tokens: list[int] = np.maximum(plan["output_tokens"].to_numpy(), 1).tolist()
        self._output_cap = declared_output_cap(self.output_tokens)
        self._ratio = TokenRatio(float(BYTES_PER_TOKEN))  # usage confirms it, so learning would not move it
        self._tenants, self._models, self._sessions = column("tenant", ""), column("model", ""), column("session_id", "")
        self._priorities, self._deadlines_ns = column("priority", 0), column("deadline_ns", None)
        self._prefix_hashes = column("prefix_hashes", ())

    def observe(self, request_id: int, gateway_at_ns: int) -> Request:
        prompt_tokens, deadline_ns = self.prompt_tokens[request_id], self._deadlines_ns[request_id]
        return observe(
            request_id,
            prompt_bytes=prompt_tokens * BYTES_PER_TOKEN,
            prefix_hashes=prefix_hashes_of(request_id, prompt_tokens, self._prefix_hashes[request_id]),
            ratio=self._ratio,
            tenant=self._tenants[request_id],
            model=self._models[request_id],
            priority=self._priorities[request_id],
            session=self._sessions[request_id],
            deadline_at_ns=None if deadline_ns is None else gateway_at_ns + deadline_ns,
            output_cap=self._output_cap,
        )


class Driver:
    """Client, gateway and replicas around one fleet. An agenda entry is (at_ns, kind, request or replica)."""

    def __init__(
        self, plan: pa.Table, fleet: Fleet, spec: FleetSpec, network_ns: int, gateway_ns: int, slowness: list[float]
    ) -> None:
        self.plan, self.fleet, self.spec = plan, fleet, spec
        self.network_ns, self.gateway_ns, self.slowness = network_ns, gateway_ns, slowness
        self.states = bytearray()
        self.rows = array("q")  # Row after Row
        self.texts: dict[str, int] = {"": 0}  # detail -> its number in the rows
        self.lifetimes: dict[int, ReplicaLifetime] = {}
        self.ended_at_ns = 0
        self.requests, self._schedule = Requests(plan), Schedule(plan)
        self._initial = self._schedule.initial()
        self._next_initial = -1
        self._cold_start_ns = spec.phases().total_ns
        cost = price(spec)
        self._usd_per_hour = math.nan if cost is None else cost.usd_per_gpu_hour * spec.tensor_parallel  # of one replica
        self._agenda: list[tuple[int, int, int]] = []
        self._due: dict[int, int | None] = {}  # replica -> the one of its _STEP entries that counts
        self._engines: dict[int, Engine] = {}  # of replicas that are ready
        self._flights: dict[int, Flight] = {}
        self._wake_ns = _NEVER_NS

    # --- the loop ------------------------------------------------------------------------------------------------------------

    def run(self, drain_ns: int) -> None:
        """From the start of the first replicas to the last end."""
        agenda, fleet, rows_len = self._agenda, self.fleet, len(self.plan) * len(Row._fields)
        fleet.start(-self._cold_start_ns)
        self._carry_out(-self._cold_start_ns)
        heapq.heappush(agenda, (0, _SAMPLE, 0))
        heapq.heappush(agenda, (self.plan["arrival_at_ns"][-1].as_py() + drain_ns, _END, 0))
        self._plan_next_initial()
        handlers = (self._ready, self._step, self._submit, self._arrive, self._sample, self._end)
        while len(self.rows) < rows_len:
            if (wake_ns := self._wake_ns) < agenda[0][0]:
                fleet.wake(wake_ns)
                self._carry_out(wake_ns)
            else:
                at_ns, kind, subject = heapq.heappop(agenda)
                handlers[kind](at_ns, subject)
        self._close()

    def _plan_next_initial(self) -> None:
        if released := next(self._initial, None):
            due_ns, self._next_initial = released
            heapq.heappush(self._agenda, (due_ns + self.network_ns, _ARRIVE, self._next_initial))

    def _ready(self, at_ns: int, replica_id: int) -> None:
        life = self.lifetimes[replica_id]
        if life.stopped_at_ns is None:
            self.lifetimes[replica_id] = life._replace(ready_at_ns=at_ns)
            self._engines[replica_id] = Engine.of(self.spec)
            self._due[replica_id] = None
            self.fleet.replica_ready(at_ns, replica_id)
            self._carry_out(at_ns)
            self._record_state(at_ns)

    def _step(self, at_ns: int, replica_id: int) -> None:
        if self._due.get(replica_id) != at_ns:
            return  # an input moved the engine's next event since
        engine, fleet = self._engines[replica_id], self.fleet
        for _, request_id, kind in engine.advance(at_ns):
            if kind == "first_token":
                self._flights[request_id].first_at_ns = at_ns
                fleet.first_token(at_ns, request_id)
            elif kind == "finished":
                prompt, output = self.requests.prompt_tokens[request_id], self.requests.output_tokens[request_id]
                fleet.finish(at_ns, request_id, prompt, output)
                self._end_request(at_ns, request_id, OK, tokens=output)
            else:  # it can never fit: a server answers 400, and another replica would say the same
                fleet.fail(at_ns, request_id, "client_error", 0)
        self._carry_out(at_ns)
        self._plan_step(replica_id, engine)

    def _plan_step(self, replica_id: int, engine: Engine) -> None:
        due_ns = engine.next_event_ns()
        if due_ns != self._due.get(replica_id):
            self._due[replica_id] = due_ns
            if due_ns is not None:
                heapq.heappush(self._agenda, (due_ns, _STEP, replica_id))

    def _submit(self, at_ns: int, request_id: int) -> None:
        if (flight := self._flights.get(request_id)) is None:
            return  # cut off by the end of the run on its way
        replica_id, requests = flight.dispatch.replica_id, self.requests
        engine = self._engines[replica_id]
        prompt, output = requests.prompt_tokens[request_id], requests.output_tokens[request_id]
        engine.submit(at_ns, request_id, prompt, output, self.slowness[request_id])
        self._plan_step(replica_id, engine)

    def _arrive(self, at_ns: int, request_id: int) -> None:
        if request_id == self._next_initial:
            self._plan_next_initial()
        self._flights[request_id] = Flight(at_ns - self.network_ns)
        self.fleet.arrive(at_ns, self.requests.observe(request_id, at_ns))
        self._carry_out(at_ns)

    def _sample(self, at_ns: int, _: int) -> None:
        """Once a second: the time line. (Replicas are not scraped: the live gateway does not either, and no policy asks.)"""
        self._record_state(at_ns)
        heapq.heappush(self._agenda, (at_ns + SAMPLE_NS, _SAMPLE, 0))

    def _end(self, at_ns: int, _: int) -> None:
        """The drain is over: the client gives up what is inside, and turns that waited for it are not sent."""
        for request_id, flight in list(self._flights.items()):
            if request_id not in self._flights:
                continue  # shed, when the cancel of another made the fleet look at its queue
            engine, tokens = self._engines.get(flight.dispatch.replica_id), 0
            if engine is not None:
                engine.advance(at_ns)  # its events up to now are on the agenda before this entry: there are none left
                tokens = engine.generated(request_id) if flight.first_at_ns >= 0 else 0
                engine.cancel(at_ns, request_id)
            self.fleet.cancel(at_ns, request_id)
            self._end_request(at_ns, request_id, TIMEOUT, tokens=tokens, detail="inside at the end of the drain")
            self._carry_out(at_ns)
        sent = {self.rows[at] for at in range(0, len(self.rows), len(Row._fields))}
        arrivals = self.plan["arrival_at_ns"]
        for request_id in range(len(self.plan)):
            if request_id not in sent:
                self._flights[request_id] = Flight(arrivals[request_id].as_py(), sent=False)
                self._end_request(at_ns, request_id, TIMEOUT, detail="not sent by the end of the drain")

    def _close(self) -> None:
        """Conservation, the last state, and the end of what still runs: the gateway stops its replicas with the run."""
        self.fleet.check()
        assert self.fleet.counts.arrived == self.fleet.counts.ended, "a request is still inside"
        self._record_state(self.ended_at_ns)
        for replica_id, life in self.lifetimes.items():
            if life.stopped_at_ns is None:
                self.lifetimes[replica_id] = life._replace(stopped_at_ns=self.ended_at_ns, reason="end of the run")

    # --- effects -------------------------------------------------------------------------------------------------------------

    def _carry_out(self, at_ns: int) -> None:
        """To be called after every input that may have effects or move the fleet's next wake."""
        wake_ns = self.fleet.next_wake_ns()
        self._wake_ns = _NEVER_NS if wake_ns is None else wake_ns
        for effect in self.fleet.drain():
            if isinstance(effect, Dispatch):
                flight = self._flights[effect.request_id]
                flight.dispatch, flight.dispatched_at_ns = effect, at_ns
                heapq.heappush(self._agenda, (at_ns + self.gateway_ns + FRONT_END_NS, _SUBMIT, effect.request_id))
            elif isinstance(effect, Reject):
                self._end_request(at_ns, effect.request_id, LIMITED, waits=(effect.limit_ns, 0, 0, 0, 0), detail=effect.reason)
            elif isinstance(effect, Shed):
                waits = (effect.limit_ns, effect.queue_ns, effect.cold_start_ns, effect.retry_ns, effect.queue_reason)
                self._end_request(at_ns, effect.request_id, SHED, waits=waits, detail=effect.reason)
            elif isinstance(effect, Abort):
                self._end_request(at_ns, effect.request_id, ERROR, detail=effect.why)
            else:
                self._change_replica(at_ns, effect)

    def _change_replica(self, at_ns: int, effect: Effect) -> None:
        if isinstance(effect, StartReplica):
            requested_at_ns = max(at_ns, 0)  # the first ones are asked for before the run and billed from its beginning
            self.lifetimes[effect.replica_id] = ReplicaLifetime(
                effect.replica_id, effect.pool, self.spec.gpu, self.spec.tensor_parallel, requested_at_ns, None, None, ""
            )
            heapq.heappush(self._agenda, (at_ns + self._cold_start_ns, _READY, effect.replica_id))
        elif isinstance(effect, StopReplica):
            life = self.lifetimes[effect.replica_id]
            self.lifetimes[effect.replica_id] = life._replace(stopped_at_ns=max(at_ns, 0), reason=effect.reason)
            self._engines.pop(effect.replica_id, None)
            self._due.pop(effect.replica_id, None)
        self._record_state(at_ns)

    def _record_state(self, at_ns: int) -> None:
        if at_ns >= 0:
            billed = sum(1 for life in self.lifetimes.values() if life.stopped_at_ns is None)
            self.states += FLEET_STATE_STRUCT.pack(*self.fleet.state(at_ns, billed * self._usd_per_hour))

    def _end_request(
        self,
        at_ns: int,
        request_id: int,
        status: int,
        *,
        tokens: int = 0,
        waits: tuple[int, int, int, int, int] | None = None,
        detail: str = "",
    ) -> None:
        """Its one row, and the turn that waited for it. At the end of the drain it is the client that ends it."""
        flight = self._flights.pop(request_id)
        dispatch, network_ns = flight.dispatch, self.network_ns
        done_at_ns = at_ns if status == TIMEOUT else at_ns + network_ns
        self.ended_at_ns = max(self.ended_at_ns, done_at_ns)
        self.rows.extend(
            Row(
                request_id,
                status,
                flight.scheduled_at_ns,
                *(
                    waits
                    or (dispatch.limit_ns, dispatch.queue_ns, dispatch.cold_start_ns, dispatch.retry_ns, dispatch.queue_reason)
                ),
                dispatch.replica_id,
                dispatch.attempt,
                flight.scheduled_at_ns if flight.sent else -1,
                flight.dispatched_at_ns,
                flight.first_at_ns if flight.first_at_ns + network_ns <= done_at_ns else -1,
                at_ns,
                done_at_ns,
                tokens,
                self.texts.setdefault(detail, len(self.texts)),
            )
        )
        if released := self._schedule.after(request_id, done_at_ns):
            heapq.heappush(self._agenda, (released[0] + network_ns, _ARRIVE, released[1]))

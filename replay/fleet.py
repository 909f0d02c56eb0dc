"""The dispatcher: limiter -> queue -> balancer -> replica, and the replicas' lifecycle. Sans-IO: inputs in, effects out.

The asyncio gateway and the virtual-time simulation are thin drivers of this very object, so what was simulated is what runs.
Call an input method with the driver's ``now_ns`` (never decreasing), then carry out ``drain()``; call ``wake`` at ``next_wake_ns``.
May live here: decisions and their bookkeeping. No clock, no socket, no randomness of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from replay.effects import (
    COLD_START,
    HELD,
    NO_SLOT,
    NO_WAIT,
    Abort,
    AskLimiter,
    Dispatch,
    DrainReplica,
    Effect,
    Reject,
    Shed,
    StartReplica,
    StopReplica,
)
from replay.policies.protocols import Autoscaler, Balancer, Charge, FleetSample, QueueDiscipline, RateLimiter, Signals
from replay.records import CANCELLED, ERROR, LIMITED, NS_PER_S, OK, SHED, STATUSES, FleetState
from replay.requests import Request
from replay.windows import StepIntegral

RETRY_AFTER_NS = 1 * NS_PER_S  # what a shed client is told: the queue turns over in about that time


# --- state -------------------------------------------------------------------------------------------------------------------


class ReplicaState(IntEnum):
    STARTING = 0
    READY = 1
    DRAINING = 2


@dataclass(slots=True, eq=False)
class Replica:
    """One replica; the object that balancers see (``protocols.ReplicaView``), updated in place."""

    replica_id: int
    pool: str
    slots: int | None
    state: ReplicaState = ReplicaState.STARTING
    outstanding: int = 0
    outstanding_tokens: int = 0
    signals: Signals | None = None


@dataclass(slots=True, eq=False)
class Entry:
    """A request inside the fleet."""

    request: Request
    arrived_at_ns: int
    waiting_since_ns: int = 0  # admitted, or failed and waiting for another replica
    unready_ns: int = 0  # the fleet's no-replica-ready clock at that instant
    replica: Replica | None = None
    attempt: int = 0
    limit_ns: int = 0
    queue_ns: int = 0
    cold_start_ns: int = 0
    retry_ns: int = 0
    dispatched_at_ns: int = 0
    queue_reason: int = NO_WAIT
    failed_on: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Policy:
    """The four roles and the bounds the fleet applies to them; made by ``policies.spec.build``."""

    name: str
    balancer: Balancer
    queue: QueueDiscipline
    limiter: RateLimiter
    autoscaler: Autoscaler
    replicas_min: int = 1
    replicas_max: int = 1
    slots_per_replica: int | None = None
    attempts_max: int = 2


@dataclass(slots=True)
class Counts:
    arrived: int = 0
    by_status: list[int] = field(default_factory=lambda: [0] * len(STATUSES))

    @property
    def ended(self) -> int:
        return sum(self.by_status)


class Fleet:
    """See the module's text. ``start`` first; it asks for the smallest fleet the policy allows."""

    def __init__(self, policy: Policy, pool: str = "main") -> None:
        self.policy, self.pool = policy, pool
        self.counts = Counts()
        self.replicas: dict[int, Replica] = {}
        self._ready: list[Replica] = []  # by replica_id
        self._inside: dict[int, Entry] = {}
        self._effects: list[Effect] = []
        self._live = 0  # starting + ready
        self._next_replica = 0
        self._wanted = 0
        self._decide_at_ns = 0
        self._decided_at_ns = 0
        self._start_not_before_ns = 0
        self._concurrency = StepIntegral()
        self._unready = StepIntegral(value=1)  # 1 while no replica is ready: its integral is the cold-start clock
        self._since_decide = [0, 0, 0, 0]  # arrivals, finished, output tokens, concurrency area at the last decision

    # --- inputs: requests ----------------------------------------------------------------------------------------------------

    def start(self, now_ns: int) -> None:
        self._decided_at_ns = self._start_not_before_ns = now_ns  # a clock may begin below zero: the run starts when all are ready
        self._unready.since_ns = self._concurrency.since_ns = now_ns
        self._decide_at_ns = now_ns + self.policy.autoscaler.interval_ns
        first = self.policy.autoscaler.decide(now_ns, self._sample(now_ns))
        self._scale(now_ns, first.replicas, first.rung)

    def arrive(self, now_ns: int, request: Request) -> None:
        self.counts.arrived += 1
        self._since_decide[0] += 1
        assert request.request_id not in self._inside, f"request {request.request_id} arrived twice"
        entry = self._inside[request.request_id] = Entry(request, now_ns)
        self._concurrency.set(now_ns, len(self._inside))
        answer = self.policy.limiter.admit(now_ns, request)
        if isinstance(answer, Charge):
            self._effects.append(AskLimiter(request.request_id, answer))
        else:
            self._admitted(now_ns, entry, answer)

    def charged(self, now_ns: int, request_id: int, retry_ns: int) -> None:
        """The outside limiter's answer: 0 = admitted."""
        if entry := self._inside.get(request_id):
            self._admitted(now_ns, entry, retry_ns)

    def first_token(self, now_ns: int, request_id: int) -> None:
        entry = self._inside.get(request_id)
        if entry and entry.replica:
            self.policy.balancer.observe(now_ns, entry.replica, entry.request, "first_token")

    def finish(self, now_ns: int, request_id: int, prompt_tokens: int, output_tokens: int) -> None:
        entry = self._inside.get(request_id)
        if entry is None or entry.replica is None:
            return
        self._since_decide[1] += 1
        self._since_decide[2] += output_tokens
        self._leave_replica(now_ns, entry, "finished", output_tokens)
        self._end(now_ns, entry, OK, output_tokens)
        self._pump(now_ns)

    def fail(self, now_ns: int, request_id: int, kind: str, tokens_out: int) -> None:
        """A dispatch failed. Nothing sent yet and attempts left: it goes to another replica; else it ends as ``error``.

        ``client_error`` (a 4xx of the replica) is never tried again: another replica would say the same.
        """
        entry = self._inside.get(request_id)
        if entry is None or entry.replica is None:
            return
        entry.failed_on.append(entry.replica.replica_id)
        self._leave_replica(now_ns, entry, "failed", tokens_out)
        if tokens_out == 0 and kind != "client_error" and entry.attempt < self.policy.attempts_max:
            entry.retry_ns += now_ns - entry.dispatched_at_ns
            entry.waiting_since_ns, entry.unready_ns = now_ns, self._unready.until(now_ns)
            self._enqueue(now_ns, entry)
        else:
            self._effects.append(Abort(request_id, kind))
            self._end(now_ns, entry, ERROR, tokens_out)
        self._pump(now_ns)

    def cancel(self, now_ns: int, request_id: int) -> None:
        """The client left; the driver has closed the upstream stream."""
        if entry := self._inside.get(request_id):
            if entry.replica is None:
                self.policy.queue.remove(request_id)
            self._leave_replica(now_ns, entry, "failed", 0)
            self._end(now_ns, entry, CANCELLED, 0)
            self._pump(now_ns)

    # --- inputs: replicas and time -------------------------------------------------------------------------------------------

    def signals(self, now_ns: int, replica_id: int, signals: Signals) -> None:
        if replica := self.replicas.get(replica_id):
            replica.signals = signals

    def replica_ready(self, now_ns: int, replica_id: int) -> None:
        replica = self.replicas.get(replica_id)
        if replica and replica.state is ReplicaState.STARTING:
            replica.state = ReplicaState.READY
            self._members_changed(now_ns)
            self._pump(now_ns)

    def replica_refused(self, now_ns: int, replica_id: int, reason: str, retry_ns: int) -> None:
        """It could not be started; no other start is tried before ``retry_ns`` have passed."""
        self._start_not_before_ns = max(self._start_not_before_ns, now_ns + retry_ns)
        self.replica_gone(now_ns, replica_id, reason)

    def replica_notice(self, now_ns: int, replica_id: int, deadline_at_ns: int) -> None:
        """It will be taken away (spot): send it nothing more, so that what runs may end before the deadline."""
        if (replica := self.replicas.get(replica_id)) and replica.state is not ReplicaState.DRAINING:
            self._retire(now_ns, replica, "notice")

    def replica_gone(self, now_ns: int, replica_id: int, reason: str) -> None:
        """It is no more. The driver fails the streams it held; the wanted number is restored at once, not at the next decision."""
        if replica := self.replicas.pop(replica_id, None):
            if replica.state is not ReplicaState.DRAINING:
                self._live -= 1
            if replica.state is ReplicaState.READY:
                self._members_changed(now_ns)
            self._effects.append(StopReplica(replica_id, reason))
            self._scale(now_ns, self._wanted, None)

    def wake(self, now_ns: int) -> None:
        if now_ns >= self._decide_at_ns:
            want = self.policy.autoscaler.decide(now_ns, self._sample(now_ns))
            self._decide_at_ns = now_ns + self.policy.autoscaler.interval_ns
            self._scale(now_ns, want.replicas, want.rung)
        elif self._lacking() > 0 and now_ns >= self._start_not_before_ns:
            self._scale(now_ns, self._wanted, None)
        self._pump(now_ns)

    # --- outputs -------------------------------------------------------------------------------------------------------------

    def drain(self) -> list[Effect]:
        """The effects since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_wake_ns(self) -> int | None:
        wake_ns = self._decide_at_ns
        expiry_ns = self.policy.queue.next_expiry_ns()
        if expiry_ns is not None and expiry_ns < wake_ns:
            wake_ns = expiry_ns
        if self._lacking() > 0:
            wake_ns = min(wake_ns, self._start_not_before_ns)
        return wake_ns

    def state(self, now_ns: int, usd_per_hour: float) -> FleetState:
        ready, queued = len(self._ready), len(self.policy.queue)
        return FleetState(
            now_ns,
            queued,
            len(self._inside) - queued,
            self._wanted,
            starting=self._live - ready,
            ready=ready,
            draining=len(self.replicas) - self._live,
            arrived=self.counts.arrived,
            ended=self.counts.ended,
            usd_per_hour=usd_per_hour,
        )

    def check(self) -> None:
        """Conservation: arrived = sum of the statuses + inside; what replicas hold = what is dispatched."""
        assert self.counts.arrived == self.counts.ended + len(self._inside), f"{self.counts} but {len(self._inside)} inside"
        dispatched = sum(1 for entry in self._inside.values() if entry.replica is not None)
        held = sum(replica.outstanding for replica in self.replicas.values())
        gone = sum(1 for entry in self._inside.values() if entry.replica and entry.replica.replica_id not in self.replicas)
        assert held + gone == dispatched, f"replicas hold {held}, {gone} on replicas that are gone, {dispatched} dispatched"

    # --- decisions -----------------------------------------------------------------------------------------------------------

    def _admitted(self, now_ns: int, entry: Entry, retry_ns: int) -> None:
        entry.limit_ns = now_ns - entry.arrived_at_ns
        if retry_ns:
            self._effects.append(Reject(entry.request.request_id, retry_ns, "rate limit", entry.limit_ns))
            self._end(now_ns, entry, LIMITED, None)
            return
        entry.waiting_since_ns, entry.unready_ns = now_ns, self._unready.until(now_ns)
        self._enqueue(now_ns, entry)

    def _enqueue(self, now_ns: int, entry: Entry) -> None:
        """Dispatch at once where nobody waits and a replica is free; otherwise queue, and shed the victim if there is one."""
        if len(self.policy.queue) == 0 and self._try_dispatch(now_ns, entry):
            return
        if entry.queue_reason != HELD:  # the balancer has just said so itself
            entry.queue_reason = NO_SLOT if self._ready else COLD_START
        victim = self.policy.queue.push(now_ns, entry.request)
        if victim is not None:
            self._shed(now_ns, victim, "queue full")
        if not self.replicas:  # scaled to zero: do not wait for the next decision
            self._scale(now_ns, 1, None)

    def _pump(self, now_ns: int) -> None:
        """Shed those who waited too long, then dispatch from the head while a replica takes it."""
        queue = self.policy.queue
        if len(queue) == 0:
            return
        while expired := queue.expire(now_ns):
            self._shed(now_ns, expired, "queue timeout")
        while (head := queue.peek(now_ns)) is not None and self._try_dispatch(now_ns, self._inside[head.request_id], queued=True):
            pass

    def _try_dispatch(self, now_ns: int, entry: Entry, *, queued: bool = False) -> bool:
        candidates = self._candidates(entry)
        if not candidates:
            return False
        index = self.policy.balancer.pick(now_ns, entry.request, candidates)
        if index is None:
            entry.queue_reason = HELD
            return False
        if queued:
            self.policy.queue.pop(now_ns)
        replica = entry.replica = candidates[index]
        replica.outstanding += 1
        replica.outstanding_tokens += entry.request.prompt_tokens_est
        entry.attempt += 1
        self._add_wait(now_ns, entry)
        entry.dispatched_at_ns = now_ns
        self._effects.append(
            Dispatch(
                entry.request.request_id,
                replica.replica_id,
                entry.attempt,
                limit_ns=entry.limit_ns,
                queue_ns=entry.queue_ns,
                cold_start_ns=entry.cold_start_ns,
                retry_ns=entry.retry_ns,
                queue_reason=entry.queue_reason,
            )
        )
        self.policy.balancer.observe(now_ns, replica, entry.request, "dispatched")
        return True

    def _candidates(self, entry: Entry) -> list[Replica]:
        """Ready, with a free slot, and not one that has failed this request while there is another."""
        candidates = self._ready
        if self.policy.slots_per_replica is not None:
            candidates = [replica for replica in candidates if replica.outstanding < self.policy.slots_per_replica]
        if entry.failed_on:
            candidates = [replica for replica in candidates if replica.replica_id not in entry.failed_on] or candidates
        return candidates

    def _scale(self, now_ns: int, wanted: int, rung: str | None) -> None:
        """Bring starting + ready to ``wanted`` within min and max. Down: those still starting first, then the emptiest."""
        self._wanted = min(max(wanted, self.policy.replicas_min), self.policy.replicas_max)
        while self._lacking() > 0 and now_ns >= self._start_not_before_ns:
            replica = Replica(self._next_replica, self.pool, self.policy.slots_per_replica)
            self.replicas[replica.replica_id] = replica
            self._next_replica += 1
            self._live += 1
            self._effects.append(StartReplica(replica.replica_id, self.pool, rung))
        if self._lacking() < 0:
            live = [replica for replica in self.replicas.values() if replica.state is not ReplicaState.DRAINING]
            live.sort(key=lambda replica: (replica.state, replica.outstanding, -replica.replica_id))
            for replica in live[: -self._lacking()]:
                self._retire(now_ns, replica, "scaled down")

    def _retire(self, now_ns: int, replica: Replica, reason: str) -> None:
        """Out of service without killing a stream: an empty replica stops now, another drains first."""
        was_ready = replica.state is ReplicaState.READY
        replica.state = ReplicaState.DRAINING
        self._live -= 1
        if was_ready:
            self._members_changed(now_ns)
            self._effects.append(DrainReplica(replica.replica_id))
        self._stop_if_empty(replica, reason)

    def _stop_if_empty(self, replica: Replica, reason: str) -> None:
        if replica.state is ReplicaState.DRAINING and replica.outstanding == 0 and replica.replica_id in self.replicas:
            del self.replicas[replica.replica_id]
            self._effects.append(StopReplica(replica.replica_id, reason))

    # --- bookkeeping ---------------------------------------------------------------------------------------------------------

    def _sample(self, now_ns: int) -> FleetSample:
        area, interval_ns = self._concurrency.until(now_ns), now_ns - self._decided_at_ns
        arrivals, finished, output_tokens, area_before = self._since_decide
        self._since_decide, self._decided_at_ns = [0, 0, 0, area], now_ns
        state = self.state(now_ns, 0.0)
        return FleetSample(
            interval_ns,
            (area - area_before) / interval_ns if interval_ns else 0.0,
            state.queued,
            state.running,
            state.ready,
            state.starting,
            state.draining,
            arrivals,
            finished,
            output_tokens,
            tuple(replica.signals for replica in self._ready if replica.signals),
        )

    def _lacking(self) -> int:
        return self._wanted - self._live

    def _members_changed(self, now_ns: int) -> None:
        self._ready = [replica for replica in self.replicas.values() if replica.state is ReplicaState.READY]
        self._unready.set(now_ns, 0 if self._ready else 1)
        self.policy.balancer.members(now_ns, self._ready)

    def _add_wait(self, now_ns: int, entry: Entry) -> None:
        """Split the wait since admission: cold start while no replica was ready, queue otherwise; after a failure all is retry."""
        waited_ns = now_ns - entry.waiting_since_ns
        if entry.failed_on:
            entry.retry_ns += waited_ns
        else:
            entry.cold_start_ns = self._unready.until(now_ns) - entry.unready_ns
            entry.queue_ns = waited_ns - entry.cold_start_ns
            if waited_ns == 0:
                entry.queue_reason = NO_WAIT

    def _shed(self, now_ns: int, request: Request, reason: str) -> None:
        entry = self._inside[request.request_id]
        self._add_wait(now_ns, entry)
        self._effects.append(
            Shed(
                request.request_id,
                RETRY_AFTER_NS,
                reason,
                entry.limit_ns,
                entry.queue_ns,
                entry.cold_start_ns,
                entry.retry_ns,
                entry.queue_reason,
            )
        )
        self._end(now_ns, entry, SHED, 0)

    def _leave_replica(self, now_ns: int, entry: Entry, event: str, output_tokens: int) -> None:
        replica = entry.replica
        if replica is None:
            return
        replica.outstanding -= 1
        replica.outstanding_tokens -= entry.request.prompt_tokens_est
        entry.replica = None
        self.policy.balancer.observe(now_ns, replica, entry.request, "finished" if event == "finished" else "failed", output_tokens)
        self._stop_if_empty(replica, "drained")

    def _end(self, now_ns: int, entry: Entry, status: int, output_tokens: int | None) -> None:
        """The request leaves in exactly one status. ``output_tokens`` None: it was never charged, so nothing is settled."""
        del self._inside[entry.request.request_id]
        self.counts.by_status[status] += 1
        self._concurrency.set(now_ns, len(self._inside))
        if output_tokens is not None:
            self.policy.limiter.settle(now_ns, entry.request, output_tokens)

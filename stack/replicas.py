"""The fleet's replicas as things that take time: what StartReplica and StopReplica ask of the pool, and what became of it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from replay.effects import StartReplica, StopReplica
from replay.records import NS_PER_S
from stack.pool import Pool, PoolRefused
from stack.upstream import Address

if TYPE_CHECKING:
    from stack.gateway import Gateway

log = logging.getLogger(__name__)

START_RETRY_S: Final = 5.0  # after a pool failed in a way it did not expect itself


class Replicas:
    """Carries out the fleet's wishes, and tells it (and the ledger) what came of them. ``addresses`` are those in service."""

    def __init__(self, gateway: Gateway, pool: Pool) -> None:
        self.gateway, self.pool = gateway, pool
        self.addresses: dict[int, Address] = {}
        self.refusal = ""  # why a replica could not be started, the last time one could not
        self._starts: dict[int, asyncio.Task[None]] = {}
        self._stops: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        pool.on_death = self._died

    async def close(self) -> None:
        """Stop all of them, those that are still starting included."""
        for task in self._starts.values():
            task.cancel()
        await asyncio.gather(*self._starts.values(), *self._stops, return_exceptions=True)
        await self.pool.close()
        for replica_id in sorted(self.gateway.ledger.billed):
            self.gateway.ledger.replica_stopped(self.gateway.now_ns(), replica_id, "end of the run")

    def start(self, effect: StartReplica) -> None:
        self.gateway.ledger.replica_requested(self.gateway.now_ns(), effect.replica_id, effect.pool)
        self.gateway.write_state()
        task = self._loop.create_task(self._bring_up(effect.replica_id, effect.rung))
        self._starts[effect.replica_id] = task
        task.add_done_callback(lambda _: self._starts.pop(effect.replica_id, None))

    async def _bring_up(self, replica_id: int, rung: str | None) -> None:
        gateway = self.gateway
        try:
            address = await self.pool.start(replica_id, rung)
        except PoolRefused as refusal:
            self.refusal = refusal.reason
            gateway.fleet.replica_refused(gateway.now_ns(), replica_id, refusal.reason, round(refusal.retry_s * NS_PER_S))
        except Exception as error:  # whatever it was, the fleet must learn that this replica will not come
            log.exception("replica %d could not be started", replica_id)
            gateway.fleet.replica_refused(gateway.now_ns(), replica_id, f"start failed: {error}", round(START_RETRY_S * NS_PER_S))
        else:
            self.addresses[replica_id] = address
            gateway.ledger.replica_ready(gateway.now_ns(), replica_id)
            gateway.fleet.replica_ready(gateway.now_ns(), replica_id)
        gateway.carry_out()
        gateway.write_state()

    def stop(self, effect: StopReplica) -> None:
        self.gateway.ledger.replica_stopped(self.gateway.now_ns(), effect.replica_id, effect.reason)
        self.gateway.write_state()
        address = self.addresses.pop(effect.replica_id, None)
        if address is not None:
            self.gateway.upstreams.forget(address)
        start = self._starts.get(effect.replica_id)
        if start is not None and start is not asyncio.current_task():
            start.cancel()
        task = self._loop.create_task(self.pool.stop(effect.replica_id))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    def _died(self, replica_id: int, reason: str) -> None:
        """A replica's process ended by itself: it leaves the fleet first, so that no retry goes there, then its streams fail."""
        self.gateway.fleet.replica_gone(self.gateway.now_ns(), replica_id, reason)
        self.gateway.carry_out()
        for call in [call for call in self.gateway.calls.values() if call.in_flight and call.replica_id == replica_id]:
            call.lost(reason)

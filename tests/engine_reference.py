"""One replica step by step: the slow, plain statement of what ``Engine`` must do, kept for tests and benchmarks.

Every step looks at every request again; nothing is summed up or carried over but what a scheduler cannot do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from replay.engine import BLOCK_TOKENS, HOST_REQUEST_MS, HOST_STEP_MS, TICKS_PER_NS, Event
from replay.hardware import Profile

AS_PER_MS = 10**15


class Operation(NamedTuple):
    """A submit, or with ``prompt`` 0 the cancel of that request."""

    at_ns: int
    request_id: int
    prompt: int = 0
    output: int = 0
    slowness: float = 1.0


@dataclass
class Job:
    request_id: int
    prompt: int
    output: int
    slowness: int
    visible_step: int
    prefilled: int = 0
    made: int = 0  # tokens published

    @property
    def blocks(self) -> int:
        return -(-(self.prompt + self.output) // BLOCK_TOKENS)


def step_ticks(profile: Profile, chunks: list[tuple[Job, int]], decoding: list[Job]) -> int:
    """The formula, coefficient by coefficient rounded to an attosecond, times the mean slowness in 1/1024."""
    prefill = sum(chunk for _, chunk in chunks)
    halves = sum(chunk * (2 * job.prefilled + chunk) for job, chunk in chunks)
    context = sum(job.prompt + job.made for job in decoding)
    members = [job for job, _ in chunks] + decoding
    floor, a, b, c_half, d, e, host, host_request = (
        round(value * AS_PER_MS)
        for value in (profile.F, profile.a, profile.b, profile.c / 2, profile.d, profile.e, HOST_STEP_MS, HOST_REQUEST_MS)
    )
    attoseconds = max(floor, a + b * prefill) + c_half * halves + d * len(decoding) + e * context + host
    return (attoseconds + host_request * len(members)) * (sum(job.slowness for job in members) // len(members))


def simulate(
    profile: Profile, operations: Iterable[Operation], *, max_num_seqs: int, token_budget: int, kv_blocks: int
) -> Iterator[Event]:
    """Every event of a workload (operations in order of time), one step after the other."""
    pending = list(operations)
    waiting: list[Job] = []
    running: list[Job] = []  # in order of admission
    step, now = 0, 0
    while pending or waiting or running:
        if not waiting and not running:
            now = pending[0].at_ns * TICKS_PER_NS
            yield from _take(pending.pop(0), waiting, set(), step, kv_blocks)
            continue
        decoding = [job for job in running if job.made]
        budget = token_budget - len(decoding)
        nothing_runs = not running
        chunks: list[tuple[Job, int]] = []
        for job in running:
            if not job.made and (chunk := min(budget, job.prompt - job.prefilled)):
                chunks.append((job, chunk))
                budget -= chunk
        while waiting and budget and len(running) < max_num_seqs and (nothing_runs or waiting[0].visible_step <= step):
            if waiting[0].blocks > kv_blocks - sum(job.blocks for job in running):
                break
            job = waiting.pop(0)
            running.append(job)
            chunks.append((job, min(budget, job.prompt)))
            budget -= chunks[-1][1]
        now += step_ticks(profile, chunks, decoding)
        cancelled: set[int] = set()
        while pending and pending[0].at_ns * TICKS_PER_NS < now:
            yield from _take(pending.pop(0), waiting, cancelled, step + 2, kv_blocks)
        running = [job for job in running if job.request_id not in cancelled]
        step += 1
        at_ns = -(-now // TICKS_PER_NS)
        for job, chunk in chunks:
            job.prefilled += chunk
        for job in running:
            if job.prefilled == job.prompt:
                job.made += 1
                if job.made == 1:
                    yield Event(at_ns, job.request_id, "first_token")
                if job.made == job.output:
                    yield Event(at_ns, job.request_id, "finished")
        running = [job for job in running if job.made < job.output]


def _take(operation: Operation, waiting: list[Job], cancelled: set[int], visible_step: int, kv_blocks: int) -> Iterator[Event]:
    if not operation.prompt:
        cancelled.add(operation.request_id)
        waiting[:] = [job for job in waiting if job.request_id != operation.request_id]
        return
    job = Job(operation.request_id, operation.prompt, operation.output, round(operation.slowness * 1024), visible_step)
    if job.blocks > kv_blocks:
        yield Event(operation.at_ns, operation.request_id, "refused")
    else:
        waiting.append(job)

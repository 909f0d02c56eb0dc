"""One replica: continuous batching after vLLM v1's scheduler, as a pure state machine in virtual or wall time.

A step decodes one token of every running request first and spends the rest of the token budget on chunked prefill, in
arrival order. Steps between two events (a finish, an admission, a cancel) differ only by contexts that grow by one token each,
so a run of them is advanced in closed form. All time is integer arithmetic: the closed form equals the step-by-step result to
the bit, wherever a run is cut.

May live here: the scheduler, its clock and its memory. No randomness (service noise is handed in per request).
"""

from __future__ import annotations

import heapq
from collections import deque
from math import sqrt
from typing import Final, Literal, NamedTuple

from replay.hardware import BLOCK_TOKENS, FleetSpec, Profile, kv_blocks, profile

HOST_STEP_MS: Final = 0.5  # scheduler, sampling and detokenising around a step; without it capacity is 22 % too high
HOST_REQUEST_MS: Final = 0.006  # and for every request in it
FRONT_END_NS: Final = 3_000_000  # the replica's API server before the scheduler sees a request; the server around adds it

# Time inside: coefficients are whole attoseconds (1e-18 s; at femtoseconds, 25 M token pairs of attention would be 6 ns off), and
# a step is scaled by a mean slowness in 1/1024, so a tick is an attosecond/1024.
_SLOWNESS_ONE: Final = 1024
_AS_PER_MS: Final = 10**15
TICKS_PER_NS: Final = 10**9 * _SLOWNESS_ONE


class Event(NamedTuple):
    """``first_token`` when the step that ends the prefill ends, ``finished`` with the last token; ``refused``: it can never fit."""

    at_ns: int
    request_id: int
    kind: Literal["first_token", "finished", "refused"]


class Load(NamedTuple):
    running: int
    waiting: int
    kv_usage: float  # share of KV blocks reserved, 0..1


class StepTime:
    """The profile's formula and the host's overhead, in whole attoseconds."""

    __slots__ = ("a", "b", "c_half", "d", "e", "floor", "host")

    def __init__(self, profile: Profile) -> None:
        def attoseconds(milliseconds: float) -> int:
            return round(milliseconds * _AS_PER_MS)

        self.floor, self.a, self.b = attoseconds(profile.F), attoseconds(profile.a), attoseconds(profile.b)
        self.c_half = attoseconds(profile.c / 2)  # attention is counted in halves: chunk * (2*past + chunk)
        self.e, self.host = attoseconds(profile.e), attoseconds(HOST_STEP_MS)
        self.d = attoseconds(profile.d)

    def ticks(self, prefill: int, attention_halves: int, chunks: int, decoding: int, context: int, slowness_sum: int) -> int:
        """One step. Its slowness is the mean over its requests, in 1/1024."""
        requests = decoding + chunks
        step = (
            max(self.floor, self.a + self.b * prefill)
            + self.c_half * attention_halves
            + self.d * decoding
            + self.e * context
            + self.host
            + _HOST_REQUEST_AS * requests
        )
        return step * (slowness_sum // requests)


_HOST_REQUEST_AS: Final = round(HOST_REQUEST_MS * _AS_PER_MS)


class _Sequence:
    """A request inside the engine: waiting -> admitted (prefilling) -> decoding since ``joined_step``."""

    __slots__ = (
        "admitted",
        "blocks",
        "gone",
        "joined_step",
        "output",
        "prefilled",
        "prompt",
        "request_id",
        "slowness",
        "visible_step",
    )

    def __init__(self, request_id: int, prompt: int, output: int, slowness: int, visible_step: int) -> None:
        self.request_id, self.prompt, self.output, self.slowness = request_id, prompt, output, slowness
        self.blocks = -(-(prompt + output) // BLOCK_TOKENS)
        self.visible_step = visible_step  # the scheduler may admit it once so many steps are done
        self.prefilled = 0
        self.joined_step = -1
        self.admitted = self.gone = False


class Engine:
    """See the module's text. Inputs carry the driver's ``now_ns``, which never decreases.

    Admission is pipelined as with vLLM's asynchronous scheduling: while a step runs, the next one is already fixed, so a
    request that arrives during step n joins step n + 2 (1.5 steps on average), unless the engine would have nothing to run.
    KV blocks for prompt and answer are reserved at admission, so nothing is preempted; the head of the queue waits for them.
    """

    def __init__(self, profile: Profile, *, max_num_seqs: int = 256, token_budget: int = 2048, kv_blocks: int) -> None:
        assert 1 <= max_num_seqs <= token_budget, "a step must hold one token of every running request"
        assert kv_blocks >= 1
        self.max_num_seqs, self.token_budget, self.kv_blocks = max_num_seqs, token_budget, kv_blocks
        self._time = StepTime(profile)
        self._now_ns = 0
        self._events: list[Event] = []
        self._sequences: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._waiting_gone = 0  # cancelled ones that are still in the deque
        self._free_blocks = kv_blocks
        self._admitted = 0
        self._partial: _Sequence | None = None  # the one prefill that a step's budget may leave unfinished
        # the decoding requests: their number, contexts and slowness in sum, and when each will have its last token
        self._decoding = self._context = self._slowness = 0
        self._last_steps: list[tuple[int, int, _Sequence]] = []  # heap of (step, join order, sequence)
        self._joins = 0
        self._leaving: list[_Sequence] = []  # cancelled while decoding: they leave when the step in flight ends
        # the run in flight: ``_run_steps`` steps after ``_step`` done ones, the first of _first ticks, each _growth longer
        self._step = 0
        self._chunks: list[tuple[_Sequence, int]] = []
        self._origin = self._first = self._growth = self._run_steps = 0
        self._end_ns: int | None = None  # None: idle

    @classmethod
    def of(cls, spec: FleetSpec) -> Engine:
        """The engine of one replica of this fleet; simulation and stand-in make theirs here."""
        step = profile(spec)
        return cls(step, max_num_seqs=spec.max_num_seqs, token_budget=spec.token_budget, kv_blocks=kv_blocks(step))

    # --- inputs --------------------------------------------------------------------------------------------------------------

    def submit(self, now_ns: int, request_id: int, prompt_tokens: int, output_tokens: int, slowness: float = 1.0) -> None:
        """Queue a request of at least one prompt and one output token; ``slowness`` scales its share of every step it is in."""
        assert min(prompt_tokens, output_tokens) >= 1, f"request {request_id}: {prompt_tokens} in, {output_tokens} out"
        assert request_id not in self._sequences, f"request {request_id} is inside already"
        self._run_to(now_ns)
        visible_step = self._step if self._end_ns is None else self._step + self._passed() + 2
        sequence = _Sequence(request_id, prompt_tokens, output_tokens, round(slowness * _SLOWNESS_ONE), visible_step)
        if sequence.blocks > self.kv_blocks:
            self._events.append(Event(now_ns, request_id, "refused"))
            return
        self._sequences[request_id] = sequence
        self._waiting.append(sequence)
        if self._end_ns is None:
            self._origin = now_ns * TICKS_PER_NS
            self._begin()
        elif len(self._waiting) == 1:  # behind others, the head decides when the run must be cut
            self._cut(visible_step - self._step)

    def cancel(self, now_ns: int, request_id: int) -> None:
        """The client left: no further event of this request. What it holds is free when the step in flight ends."""
        self._run_to(now_ns)
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        sequence.gone = True
        if sequence.joined_step >= 0:
            self._leaving.append(sequence)
        elif not sequence.admitted:
            self._waiting_gone += 1
        if self._end_ns is not None:
            self._cut(self._passed() + 1)

    def advance(self, now_ns: int) -> list[Event]:
        """What happened up to and including ``now_ns``, in order."""
        self._run_to(now_ns)
        events, self._events = self._events, []
        return events

    # --- outputs -------------------------------------------------------------------------------------------------------------

    def next_event_ns(self) -> int | None:
        """When to call ``advance`` next (it may return nothing: a request was admitted); None while idle."""
        return self._events[0].at_ns if self._events else self._end_ns

    def next_step_ns(self) -> int | None:
        """When the step in flight ends; None while idle."""
        return None if self._end_ns is None else _ceil_ns(self._boundary(self._passed() + 1))

    def generated(self, request_id: int) -> int:
        """Tokens published so far of a request that is inside. Raises KeyError for one that has ended."""
        joined = self._sequences[request_id].joined_step
        return 0 if joined < 0 else 1 + self._step + self._passed() - joined

    def snapshot(self) -> Load:
        waiting = len(self._waiting) - self._waiting_gone
        return Load(self._admitted, waiting, 1 - self._free_blocks / self.kv_blocks)

    # --- the run in flight ---------------------------------------------------------------------------------------------------

    def _run_to(self, now_ns: int) -> None:
        assert now_ns >= self._now_ns, f"time went back from {self._now_ns} to {now_ns}"
        while self._end_ns is not None and self._end_ns <= now_ns:
            self._finish()
            self._begin()
        self._now_ns = now_ns

    def _boundary(self, steps: int) -> int:
        """End of the run's step number ``steps`` (from 1), in ticks: an arithmetic series."""
        return self._origin + steps * self._first + self._growth * (steps * (steps - 1) // 2)

    def _passed(self) -> int:
        """Steps of the run in flight that have ended by now: the root of the series, put right in whole numbers."""
        if self._end_ns is None or self._run_steps == 1:
            return 0
        now = self._now_ns * TICKS_PER_NS
        since = now - self._origin
        linear = self._first - self._growth / 2
        steps = int(2 * since / (linear + sqrt(linear * linear + 2 * self._growth * since)))
        while self._boundary(steps) > now:
            steps -= 1
        while self._boundary(steps + 1) <= now:
            steps += 1
        return steps

    def _cut(self, steps: int) -> None:
        """Let the run end after ``steps`` steps: what follows is scheduled anew (cutting changes no instant)."""
        if steps < self._run_steps:
            self._run_steps = steps
            self._end_ns = _ceil_ns(self._boundary(steps))

    def _begin(self) -> None:
        """Schedule the next step; where nothing is prefilled, all steps up to the next change at once."""
        prefill, attention_halves, slowness = 0, 0, self._slowness
        if self._partial is not None or self._waiting:
            prefill, attention_halves, slowness = self._schedule_prefill()
        chunks = len(self._chunks)
        if self._decoding + chunks == 0:
            self._end_ns = None
            return
        first = self._time.ticks(prefill, attention_halves, chunks, self._decoding, self._context, slowness)
        if chunks:
            self._growth, steps = 0, 1
        else:
            self._growth = self._time.e * self._decoding * (slowness // self._decoding)
            steps = self._last_steps[0][0] - self._step
            if self._waiting and self._waiting[0].visible_step > self._step:
                steps = min(steps, self._waiting[0].visible_step - self._step)
        self._first, self._run_steps = first, steps
        self._end_ns = _ceil_ns(self._boundary(steps))

    def _schedule_prefill(self) -> tuple[int, int, int]:
        """Fill ``_chunks`` within the budget that decoding leaves: tokens, attention in halves, slowness of all requests in sum."""
        budget = self.token_budget - self._decoding
        attention_halves, slowness = 0, self._slowness
        nothing_runs = self._decoding == 0 and self._partial is None
        # max_num_seqs <= token_budget: where a prefill is unfinished or a place free, decoding leaves at least one token
        sequence = self._partial or self._admit(nothing_runs)
        self._partial = None
        while sequence is not None:
            chunk = min(budget, sequence.prompt - sequence.prefilled)
            self._chunks.append((sequence, chunk))
            attention_halves += chunk * (2 * sequence.prefilled + chunk)
            slowness += sequence.slowness
            budget -= chunk
            sequence = self._admit(nothing_runs) if budget else None
        return self.token_budget - self._decoding - budget, attention_halves, slowness

    def _admit(self, nothing_runs: bool) -> _Sequence | None:
        """The head of the queue, admitted, if it is visible and a place and its blocks are free."""
        while self._waiting and self._waiting[0].gone:
            self._waiting.popleft()
            self._waiting_gone -= 1
        if not self._waiting or self._admitted >= self.max_num_seqs:
            return None
        head = self._waiting[0]
        if head.blocks > self._free_blocks or (head.visible_step > self._step and not nothing_runs):
            return None
        self._waiting.popleft()
        head.admitted = True
        self._admitted += 1
        self._free_blocks -= head.blocks
        return head

    def _finish(self) -> None:
        """The run has ended: publish first and last tokens, free what has left."""
        assert self._end_ns is not None
        self._origin = self._boundary(self._run_steps)
        self._step += self._run_steps
        self._context += self._run_steps * self._decoding
        for sequence in self._leaving:
            self._stop_decoding(sequence)
        self._leaving.clear()
        last_steps = self._last_steps
        while last_steps and (last_steps[0][2].gone or last_steps[0][0] == self._step):
            sequence = heapq.heappop(last_steps)[2]
            if not sequence.gone:
                self._stop_decoding(sequence)
                self._ended(sequence)
        for sequence, chunk in self._chunks:
            sequence.prefilled += chunk
            if sequence.gone:
                self._free(sequence)
            elif sequence.prefilled < sequence.prompt:
                self._partial = sequence
            else:
                self._first_token(sequence)
        self._chunks.clear()

    def _first_token(self, sequence: _Sequence) -> None:
        assert self._end_ns is not None
        self._events.append(Event(self._end_ns, sequence.request_id, "first_token"))
        if sequence.output == 1:
            self._free(sequence)
            self._ended(sequence)
            return
        sequence.joined_step = self._step
        self._decoding += 1
        self._context += sequence.prompt + 1
        self._slowness += sequence.slowness
        self._joins += 1
        heapq.heappush(self._last_steps, (self._step + sequence.output - 1, self._joins, sequence))

    def _ended(self, sequence: _Sequence) -> None:
        assert self._end_ns is not None
        del self._sequences[sequence.request_id]
        self._events.append(Event(self._end_ns, sequence.request_id, "finished"))

    def _stop_decoding(self, sequence: _Sequence) -> None:
        self._decoding -= 1
        self._context -= sequence.prompt + 1 + self._step - sequence.joined_step
        self._slowness -= sequence.slowness
        self._free(sequence)

    def _free(self, sequence: _Sequence) -> None:
        self._admitted -= 1
        self._free_blocks += sequence.blocks


def _ceil_ns(ticks: int) -> int:
    return -(-ticks // TICKS_PER_NS)

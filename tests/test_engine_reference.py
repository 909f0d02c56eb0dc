"""The compressed engine against the step-by-step reference: the same instants to the bit, over random workloads."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from replay.engine import Engine, Event
from replay.hardware import FleetSpec, Profile, profile
from tests.engine_reference import Operation, simulate

A100 = profile(FleetSpec(kind="stand-in"))
L40S = profile(FleetSpec(kind="stand-in", gpu="l40s"))
PREFILL_BOUND = Profile(2.0, 5.0, 0.5, 1e-4, 0.3, 2e-3, "none", "none", 1, "test")  # a > F, and contexts matter


@st.composite
def workloads(draw: st.DrawFn) -> list[Operation]:
    """Bursts and pauses of submits, a quarter of them cancelled some time later (maybe after their end)."""
    operations, now_ns = [], 0
    for request_id in range(draw(st.integers(1, 25))):
        now_ns += draw(st.sampled_from([0, 0, 1, 7_000_000, 40_000_000, 2_000_000_000]) | st.integers(0, 300_000_000))
        prompt = draw(st.integers(1, 64) | st.integers(1, 3000))
        output = draw(st.sampled_from([1, 2]) | st.integers(1, 120))
        operations.append(Operation(now_ns, request_id, prompt, output, draw(st.sampled_from([1.0, 0.93, 1.07]))))
        if draw(st.integers(0, 3)) == 0:
            operations.append(Operation(now_ns + draw(st.integers(0, 900_000_000)), request_id))
    return sorted(operations, key=lambda operation: operation.at_ns)


def run(engine: Engine, operations: list[Operation], wakes: list[int]) -> list[Event]:
    """Drive it as a simulation does, jumping to the next event, and look in at the instants of ``wakes`` besides."""
    events: list[Event] = []
    inputs: list[tuple[int, Operation | None]] = [(operation.at_ns, operation) for operation in operations]
    inputs += [(at_ns, None) for at_ns in wakes]
    for at_ns, operation in sorted(inputs, key=lambda pair: pair[0]):
        while (due_ns := engine.next_event_ns()) is not None and due_ns <= at_ns:
            events += engine.advance(due_ns)
        if operation is None:
            assert engine.advance(at_ns) == []
            engine.next_step_ns()
        elif operation.prompt:
            engine.submit(at_ns, operation.request_id, operation.prompt, operation.output, operation.slowness)
        else:
            engine.cancel(at_ns, operation.request_id)
    while (due_ns := engine.next_event_ns()) is not None:
        events += engine.advance(due_ns)
    return events


@settings(max_examples=250, deadline=None)
@given(
    operations=workloads(),
    step=st.sampled_from([A100, L40S, PREFILL_BOUND]),
    seqs=st.sampled_from([1, 3, 16]),
    budget=st.sampled_from([16, 100, 2048]),
    blocks=st.sampled_from([20, 200, 10_000]),
    wakes=st.lists(st.integers(0, 5_000_000_000), max_size=8),
)
def test_equals_the_reference_to_the_bit(
    operations: list[Operation], step: Profile, seqs: int, budget: int, blocks: int, wakes: list[int]
) -> None:
    engine = Engine(step, max_num_seqs=seqs, token_budget=budget, kv_blocks=blocks)
    limits = {"max_num_seqs": seqs, "token_budget": budget, "kv_blocks": blocks}
    expected = list(simulate(step, operations, **limits))
    assert sorted(run(engine, operations, wakes)) == sorted(expected)
    assert engine.snapshot() == (0, 0, 0.0)  # nothing is left behind


@settings(max_examples=60, deadline=None)
@given(operations=workloads(), seqs=st.sampled_from([2, 16]))
def test_every_request_ends_once_unless_cancelled(operations: list[Operation], seqs: int) -> None:
    engine = Engine(A100, max_num_seqs=seqs, token_budget=64, kv_blocks=220)
    events = run(engine, operations, [])
    cancelled = {operation.request_id for operation in operations if not operation.prompt}
    for request_id in {operation.request_id for operation in operations}:
        kinds = [event.kind for event in events if event.request_id == request_id]
        ends = [["first_token", "finished"], ["refused"]]
        assert kinds in (ends if request_id not in cancelled else [*ends, ["first_token"], []])

"""What one replica does, told in virtual time."""

from __future__ import annotations

import pytest

from replay.engine import HOST_REQUEST_MS, HOST_STEP_MS, Engine, Event
from replay.hardware import FleetSpec, profile

A100 = profile(FleetSpec(kind="stand-in"))
MS = 1_000_000


def make(*, seqs: int = 256, budget: int = 2048, blocks: int = 10_000) -> Engine:
    return Engine(A100, max_num_seqs=seqs, token_budget=budget, kv_blocks=blocks)


def host_ms(requests: int) -> float:
    return HOST_STEP_MS + HOST_REQUEST_MS * requests


def run_out(engine: Engine) -> dict[tuple[int, str], float]:
    """Advance to the end: (request, kind) -> instant in ms."""
    seen = {}
    while (at_ns := engine.next_event_ns()) is not None:
        seen.update({(event.request_id, event.kind): event.at_ns / MS for event in engine.advance(at_ns)})
    return seen


def test_a_request_alone_takes_one_prefill_step_and_then_a_step_a_token() -> None:
    engine = make()
    engine.submit(5 * MS, 1, 1000, 4)
    seen = run_out(engine)
    first_ms = 5 + A100.step_ms(1000, 1000 * 500) + host_ms(1)
    assert seen[1, "first_token"] == pytest.approx(first_ms, abs=2e-6)
    decode_ms = sum(A100.step_ms(decoding=1, context=1000 + made) + host_ms(1) for made in (1, 2, 3))
    assert seen[1, "finished"] == pytest.approx(first_ms + decode_ms, abs=2e-6)


def test_a_single_token_ends_with_the_prefill() -> None:
    engine = make()
    engine.submit(0, 1, 100, 1)
    at_ns = engine.next_event_ns()
    assert at_ns is not None
    assert engine.advance(at_ns) == [Event(at_ns, 1, "first_token"), Event(at_ns, 1, "finished")]


def test_a_prompt_beyond_the_budget_is_prefilled_in_chunks_that_attend_to_what_is_past() -> None:
    engine = make()
    engine.submit(0, 1, 5000, 1)
    chunks = [(0, 2048), (2048, 2048), (4096, 904)]
    expected_ms = sum(A100.step_ms(size, size * (past + size / 2)) + host_ms(1) for past, size in chunks)
    assert run_out(engine)[1, "first_token"] == pytest.approx(expected_ms, abs=2e-6)


def test_decoding_requests_share_steps_and_pay_for_each_other() -> None:
    """Eight alike, admitted together behind a ninth that runs: each later step decodes all eight."""
    engine = make()
    engine.submit(0, 0, 16, 3)
    for request_id in range(1, 9):
        engine.submit(1, request_id, 100, 50)
    seen = run_out(engine)
    assert len({seen[request_id, "first_token"] for request_id in range(1, 9)}) == 1
    assert len({seen[request_id, "finished"] for request_id in range(1, 9)}) == 1
    decode_ms = sum(A100.step_ms(decoding=8, context=8 * (100 + made)) + host_ms(8) for made in range(1, 50))
    assert seen[1, "finished"] - seen[1, "first_token"] == pytest.approx(decode_ms, abs=2e-6)


def test_an_arrival_during_step_n_joins_step_n_plus_2() -> None:
    engine = make()
    engine.submit(0, 1, 100, 10)
    boundaries_ms = [A100.step_ms(100, 100 * 50) + host_ms(1)]
    boundaries_ms += [boundaries_ms[0] + A100.step_ms(decoding=1, context=101) + host_ms(1)]
    engine.submit(1 * MS, 2, 200, 5)  # during step 1: step 2 is fixed already, the prefill rides on step 3
    step_3_ms = A100.step_ms(200, 200 * 100, 1, 102) + host_ms(2)
    assert run_out(engine)[2, "first_token"] == pytest.approx(boundaries_ms[1] + step_3_ms, abs=2e-6)


def test_an_arrival_does_not_wait_for_a_step_that_has_nothing_to_run() -> None:
    engine = make()
    engine.submit(0, 1, 100, 1)
    engine.submit(1 * MS, 2, 100, 1)
    step_ms = A100.step_ms(100, 100 * 50) + host_ms(1)
    assert run_out(engine)[2, "first_token"] == pytest.approx(2 * step_ms, abs=2e-6)


def test_the_kv_cache_full_the_next_waits_for_blocks_and_nobody_is_preempted() -> None:
    engine = make(blocks=20)  # 320 tokens: one of 200 + 50 fits, two do not
    engine.submit(0, 1, 200, 50)
    engine.submit(0, 2, 200, 50)
    assert engine.advance(500 * MS)[0] == Event(engine_first_ns(200), 1, "first_token")
    assert engine.snapshot() == (1, 1, 16 / 20)
    seen = run_out(engine)
    step_ms = A100.step_ms(200, 200 * 100) + host_ms(1)
    assert seen[2, "first_token"] == pytest.approx(seen[1, "finished"] + step_ms, abs=2e-6)
    assert engine.snapshot() == (0, 0, 0.0)


def engine_first_ns(prompt: int) -> int:
    engine = make()
    engine.submit(0, 0, prompt, 2)
    at_ns = engine.next_event_ns()
    assert at_ns is not None
    return at_ns


def test_a_request_that_can_never_fit_is_refused_at_once_and_others_go_on() -> None:
    engine = make(blocks=20)
    engine.submit(0, 1, 100, 20)
    engine.submit(3 * MS, 2, 300, 21)  # 321 tokens: 21 blocks
    assert engine.next_event_ns() == 3 * MS
    assert engine.advance(3 * MS) == [Event(3 * MS, 2, "refused")]
    assert (1, "finished") in run_out(engine)


def test_a_cancel_takes_effect_when_the_step_in_flight_ends() -> None:
    engine = make()
    engine.submit(0, 1, 100, 1000)
    engine.submit(0, 2, 100, 1000)
    engine.advance(2_000 * MS)
    step_ends_ns = engine.next_step_ns()
    engine.cancel(2_000 * MS, 2)
    assert engine.next_step_ns() == step_ends_ns, "the step that runs is not undone"
    assert engine.snapshot().running == 2
    assert step_ends_ns is not None
    engine.advance(step_ends_ns)
    assert engine.snapshot().running == 1
    later_ns = engine.next_step_ns()
    assert later_ns is not None
    context = 100 + engine.generated(1)
    assert (later_ns - step_ends_ns) / MS == pytest.approx(A100.step_ms(decoding=1, context=context) + host_ms(1), abs=2e-6)
    assert (2, "finished") not in run_out(engine)


def test_cancelling_the_head_that_waits_for_memory_lets_the_next_one_in() -> None:
    engine = make(blocks=40)
    engine.submit(0, 1, 300, 300)  # 38 blocks
    engine.submit(1, 2, 200, 100)
    engine.submit(2, 3, 16, 2)
    engine.advance(1_000 * MS)
    assert engine.snapshot().waiting == 2, "first come, first served: the small one does not pass the head"
    engine.cancel(1_000 * MS, 2)
    seen = run_out(engine)
    assert seen[3, "finished"] < 1_050 < seen[1, "finished"]


def test_a_server_can_follow_it_step_by_step() -> None:
    """``next_step_ns`` and ``generated``: every step publishes one token of every decoding request, up to the last."""
    engine = make()
    engine.submit(0, 1, 100, 30)
    engine.submit(0, 2, 3000, 10)
    published: dict[int, list[int]] = {1: [], 2: []}
    ended: set[int] = set()
    while (at_ns := engine.next_step_ns()) is not None:
        ended |= {event.request_id for event in engine.advance(at_ns) if event.kind == "finished"}
        for request_id in published.keys() - ended:
            published[request_id].append(engine.generated(request_id))
    for request_id, output in ((1, 30), (2, 10)):
        counts = [count for count in published[request_id] if count]
        assert counts == list(range(1, output)), "no token is skipped and none comes twice; the last comes with the event"


def test_slowness_scales_the_steps_a_request_is_in() -> None:
    plain, slow = make(), make()
    plain.submit(0, 1, 700, 20)
    slow.submit(0, 1, 700, 20, slowness=1.125)  # a whole number of 1/1024
    assert run_out(slow)[1, "finished"] == pytest.approx(1.125 * run_out(plain)[1, "finished"], abs=2e-6)


def test_a_week_is_advanced_as_exactly_as_a_second() -> None:
    early, late = make(), make()
    week_ns = 7 * 86_400 * 1_000_000_000
    early.submit(0, 1, 777, 400)
    late.submit(week_ns, 1, 777, 400)
    while (at_ns := early.next_event_ns()) is not None:
        assert late.next_event_ns() == week_ns + at_ns
        early.advance(at_ns)
        late.advance(week_ns + at_ns)

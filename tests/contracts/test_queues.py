"""One suite over every queue discipline: nobody is lost, nobody comes out twice, limits hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.policies.queues import QUEUES, Fifo
from tests.fleet_driver import S, request

STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "pop", "remove", "expire"]), st.integers(0, 40), st.integers(0, 2 * S)),
    max_size=200,
)


@pytest.mark.parametrize("kind", QUEUES)
@given(steps=STEPS)
def test_every_request_leaves_exactly_once(kind: str, steps: list[tuple[str, int, int]]) -> None:
    queue = QUEUES[kind]()
    now_ns, inside, seen = 0, set(), set()
    for what, number, pause_ns in steps:
        now_ns += pause_ns
        if what == "push" and number not in seen:
            seen.add(number)
            victim = queue.push(now_ns, request(number))
            inside.add(number)
            if victim is not None:
                inside.remove(victim.request_id)
        elif what == "pop":
            head, popped = queue.peek(now_ns), queue.pop(now_ns)
            assert head == popped
            if popped is not None:
                inside.remove(popped.request_id)
        elif what == "remove":
            assert queue.remove(number) == (number in inside)
            inside.discard(number)
        elif what == "expire":
            while (expired := queue.expire(now_ns)) is not None:
                inside.remove(expired.request_id)
            expiry_ns = queue.next_expiry_ns()
            assert expiry_ns is None or expiry_ns > now_ns
        assert len(queue) == len(inside)


def test_fifo_is_in_order_bounded_and_impatient() -> None:
    queue = Fifo(length_max=2, timeout_s=3)
    assert queue.push(0, request(1)) is None
    assert queue.push(1 * S, request(2)) is None
    victim = queue.push(1 * S, request(3))
    assert victim is not None
    assert victim.request_id == 3
    assert queue.next_expiry_ns() == 3 * S
    assert queue.expire(3 * S - 1) is None
    expired = queue.expire(3 * S)
    assert expired is not None
    assert expired.request_id == 1
    assert queue.next_expiry_ns() == 4 * S

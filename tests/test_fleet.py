"""Stories of the dispatcher in virtual time: who waits, who goes where, what scales when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.effects import COLD_START, HELD, NO_SLOT, Abort, Dispatch, DrainReplica, Reject, Shed, StartReplica, StopReplica
from replay.fleet import Fleet
from replay.policies import spec
from replay.policies.balancers import LeastOutstanding
from replay.records import CANCELLED, ERROR, LIMITED, OK, SHED, STATUSES
from tests.fleet_driver import S, Story, request


def policy(**fields: Any) -> dict[str, Any]:
    return {"name": "story", "balancer": "least_outstanding", **fields}


def test_a_request_that_finds_a_free_replica_waits_for_nothing() -> None:
    story = Story(policy())
    story.arrivals([6.0])
    story.run(10)
    [(at, dispatch)] = story.effects(Dispatch)
    assert (at, dispatch.replica_id, dispatch.queue_ns, dispatch.cold_start_ns, dispatch.queue_reason) == (6.0, 0, 0, 0, 0)
    assert story.fleet.counts.by_status[OK] == 1


def test_waiting_for_the_first_replica_is_cold_start_not_queue() -> None:
    story = Story(policy(), cold_start_s=5)
    story.arrivals([2.0])
    story.run(10)
    [(at, dispatch)] = story.effects(Dispatch)
    assert (at, dispatch.cold_start_ns, dispatch.queue_ns, dispatch.queue_reason) == (5.0, 3 * S, 0, COLD_START)


def test_waiting_for_a_slot_is_queue() -> None:
    story = Story(policy(slots_per_replica=1), service_s=1)
    story.arrivals([10.0, 10.0, 10.0])
    story.run(20)
    waits = [(at, dispatch.queue_ns / S, dispatch.queue_reason) for at, dispatch in story.effects(Dispatch)]
    assert waits == [(10.0, 0.0, 0), (11.0, 1.0, NO_SLOT), (12.0, 2.0, NO_SLOT)]


class HoldsUntil(LeastOutstanding):
    """Holds every request until a given second, as a balancer that watches a token budget does."""

    until_ns = 12 * S

    def pick(self, now_ns: int, *arguments: Any, **more: Any) -> int | None:
        return super().pick(now_ns, *arguments, **more) if now_ns >= self.until_ns else None


def test_a_request_that_the_balancer_holds_says_so() -> None:
    story = Story(policy())
    story.fleet.policy.balancer = HoldsUntil()
    story.arrivals([11.0])
    story.at(12, "wake")
    story.run(20)
    [(at, dispatch)] = story.effects(Dispatch)
    assert (at, dispatch.queue_ns, dispatch.queue_reason) == (12.0, 1 * S, HELD)


def test_a_full_queue_sheds_the_newcomer_and_a_long_wait_sheds_the_head() -> None:
    story = Story(policy(slots_per_replica=1, queue={"kind": "fifo", "length_max": 2, "timeout_s": 1.5}), service_s=10)
    story.arrivals([10.0, 10.1, 10.2, 10.3])
    story.run(30)
    shed = [(at, effect.request_id, effect.reason) for at, effect in story.effects(Shed)]
    assert shed == [(10.3, 3, "queue full"), (11.6, 1, "queue timeout"), (11.7, 2, "queue timeout")]
    assert story.effects(Shed)[1][1].queue_ns == pytest.approx(1.5 * S)
    assert story.fleet.counts.by_status[SHED] == 3


def test_a_limited_request_is_told_when_to_come_back() -> None:
    story = Story(policy(limiter={"kind": "token_bucket", "requests_per_min": 60, "burst_requests": 2}))
    story.arrivals([10.0, 10.0, 10.0, 11.1])
    story.run(20)
    [(at, reject)] = story.effects(Reject)
    assert (at, reject.request_id) == (10.0, 2)
    assert reject.retry_after_ns == pytest.approx(1 * S)
    assert (story.fleet.counts.by_status[LIMITED], story.fleet.counts.by_status[OK]) == (1, 3)


def test_tokens_are_charged_by_estimate_and_settled_by_usage() -> None:
    # 100 prompt + cap 1000 charged; 10 used: 990 come back, so the next one fits a second later.
    story = Story(policy(limiter={"kind": "token_bucket", "tokens_per_min": 60, "burst_tokens": 1500}), service_s=1)
    story.at(10, "arrive", request(0, cap=1000))
    story.at(10.5, "arrive", request(1, cap=1000))
    story.at(11.5, "arrive", request(2, cap=1000))
    story.run(20)
    assert [effect.request_id for _, effect in story.effects(Reject)] == [1]


def test_a_dispatch_that_fails_before_its_first_token_goes_to_another_replica() -> None:
    story = Story(policy(replicas={"min": 2, "max": 2}), service_s=3)
    story.arrivals([10.0])
    story.at(11, "fail", 0, "connect", 0)
    story.run(20)
    (_, first), (at, second) = story.effects(Dispatch)
    assert (at, second.attempt, second.retry_ns) == (11.0, 2, 1 * S)
    assert first.replica_id != second.replica_id
    assert story.fleet.counts.by_status[OK] == 1


def test_a_stream_that_broke_after_its_first_token_is_an_error_not_a_retry() -> None:
    story = Story(policy(), service_s=3)
    story.arrivals([10.0])
    story.at(11, "fail", 0, "gone", 5)
    story.run(20)
    assert [(at, effect.why) for at, effect in story.effects(Abort)] == [(11.0, "gone")]
    assert story.fleet.counts.by_status[ERROR] == 1


def test_attempts_are_bounded() -> None:
    story = Story(policy(attempts_max=2, replicas={"min": 3, "max": 3}), service_s=30)
    story.arrivals([10.0])
    story.at(11, "fail", 0, "connect", 0)
    story.at(12, "fail", 0, "connect", 0)
    story.run(20)
    assert len(story.effects(Dispatch)) == 2
    assert story.fleet.counts.by_status[ERROR] == 1


def test_a_client_that_leaves_frees_its_place_in_the_queue_and_on_the_replica() -> None:
    story = Story(policy(slots_per_replica=1), service_s=100)
    story.arrivals([10.0, 10.0, 10.0])
    story.at(11, "cancel", 1)  # waits
    story.at(12, "cancel", 0)  # runs
    story.run(13)
    assert [(at, effect.request_id) for at, effect in story.effects(Dispatch)] == [(10.0, 0), (12.0, 2)]
    assert story.fleet.counts.by_status[CANCELLED] == 2


def test_concurrency_scales_up_at_once_and_down_after_its_window() -> None:
    scaler = {"kind": "concurrency", "target": 2, "interval_s": 5, "down_stabilisation_s": 60}
    story = Story(policy(autoscaler=scaler, replicas={"min": 1, "max": 4}), cold_start_s=5, service_s=20)
    story.arrivals([11.0] * 8)  # 8 in the system from 11 s to 31 s: (15 - 11) / 5 x 8 / 2 = 3.2 -> 4 replicas
    story.run(14.9)
    assert story.ready() == 1
    story.run(20.1)
    assert story.ready() == 4, "asked for at 15 s, ready 5 s later"
    story.run(94)
    assert story.ready() == 4, "a pause shorter than the window costs nothing"
    story.run(101)
    assert story.ready() == 1


def test_queue_depth_scales_on_those_who_wait() -> None:
    scaler = {"kind": "queue_depth", "target": 2, "running_per_replica": 1, "interval_s": 5, "down_stabilisation_s": 30}
    story = Story(policy(autoscaler=scaler, slots_per_replica=1, replicas={"min": 1, "max": 8}), cold_start_s=5, service_s=10)
    story.arrivals([11.0] * 7)  # one runs, six wait
    story.run(15.1)
    assert len(story.effects(StartReplica)) == 3, "six waiting / 2 = 3 wanted, one was there"
    story.run(200)
    assert story.ready() == 1, "and down again, a step a window"


def test_scaling_down_drains_and_never_kills_a_stream() -> None:
    scaler = {"kind": "concurrency", "target": 1, "interval_s": 5, "down_stabilisation_s": 0}
    story = Story(policy(autoscaler=scaler, replicas={"min": 1, "max": 2}), cold_start_s=1, service_s=1)
    story.arrivals([11.0, 11.0])
    story.service_ns = 40 * S  # two long streams, then the mean concurrency of a window falls as one ends by itself
    story.run(30)
    assert story.ready() == 2
    story.at(31, "finish", 0, 100, 10)
    story.run(45)
    drains, stops = story.effects(DrainReplica), story.effects(StopReplica)
    held = {dispatch.replica_id for _, dispatch in story.effects(Dispatch) if dispatch.request_id == 1}
    assert len(drains) == len(stops) == 1
    assert stops[0][1].replica_id not in held, "the empty one goes"
    assert story.fleet.counts.by_status[OK] == 1


def test_a_draining_replica_stops_when_its_last_stream_ends() -> None:
    story = Story(policy(replicas={"min": 1, "max": 1}), cold_start_s=1, service_s=10)
    story.arrivals([5.0])
    story.at(6, "replica_notice", 0, 120 * S)
    story.run(14)
    assert story.effects(DrainReplica)[0][0] == 6.0
    assert not story.effects(StopReplica), "one stream is still on it"
    story.run(16)
    assert [(at, effect.replica_id) for at, effect in story.effects(StopReplica)] == [(15.0, 0)]


def test_scale_to_zero_starts_at_the_first_arrival_not_at_the_next_decision() -> None:
    story = Story(policy(autoscaler={"kind": "concurrency", "interval_s": 60}, replicas={"min": 0, "max": 2}), cold_start_s=5)
    story.arrivals([10.0])
    story.run(20)
    assert story.effects(StartReplica)[0][0] == 10.0
    assert story.effects(Dispatch)[0][1].cold_start_ns == 5 * S


def test_a_dead_replica_is_replaced_at_once() -> None:
    story = Story(policy(), cold_start_s=5)
    story.at(10, "replica_gone", 0, "exit 137")
    story.run(16)
    assert [at for at, _ in story.effects(StartReplica)] == [0.0, 10.0]
    assert story.ready() == 1


def test_a_refused_start_is_tried_again_after_the_stated_pause() -> None:
    story = Story(policy(), cold_start_s=100)
    story.at(2, "replica_refused", 0, "no capacity", 30 * S)
    story.run(40)
    assert [at for at, _ in story.effects(StartReplica)] == [0.0, 32.0]


def test_requests_on_a_replica_that_is_gone_are_counted_until_the_driver_fails_them() -> None:
    story = Story(policy(attempts_max=1), service_s=100)
    story.arrivals([10.0])
    story.at(11, "replica_gone", 0, "killed")
    story.at(11.1, "fail", 0, "gone", 3)
    story.run(12)
    assert story.fleet.counts.by_status[ERROR] == 1


NAMES = ["arrive", "finish", "fail", "cancel", "first_token", "replica_ready", "replica_gone", "replica_notice", "wake"]
INPUTS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 30), st.integers(0, 3 * S), st.integers(0, 3)),
    max_size=120,
)


@given(
    inputs=INPUTS,
    slots=st.sampled_from(["unlimited", 1, 3]),
    balancer=st.sampled_from(sorted(spec.BALANCERS)),
    scaler=st.sampled_from(sorted(spec.AUTOSCALERS)),
    limiter=st.sampled_from([{"kind": "unlimited"}, {"kind": "token_bucket", "requests_per_min": 100, "tokens_per_min": 9000}]),
    bounds=st.sampled_from([(0, 2), (1, 1), (2, 4)]),
)
def test_whatever_happens_every_request_ends_once_or_is_inside(
    inputs: list[tuple[str, int, int, int]],
    slots: Any,
    balancer: str,
    scaler: str,
    limiter: dict[str, Any],
    bounds: tuple[int, int],
) -> None:
    """Conservation and causality under arbitrary, even senseless, input orders; limits on slots and replicas hold throughout."""
    low, high = bounds
    slots = 3 if scaler == "queue_depth" and slots == "unlimited" else slots  # refused at load time
    written = policy(
        balancer=balancer, autoscaler=scaler, limiter=limiter, slots_per_replica=slots, replicas={"min": low, "max": high}
    )
    written["queue"] = {"kind": "fifo", "length_max": 5, "timeout_s": 4}
    fleet = Fleet(spec.build(spec.from_dict(written), 1))
    now_ns, arrived, terminal = 0, set(), []
    fleet.start(0)
    for name, number, pause_ns, count in inputs:
        now_ns += pause_ns
        if name == "arrive":
            if number in arrived:
                continue
            arrived.add(number)
            fleet.arrive(now_ns, request(number))
        elif name in ("finish", "fail"):
            fleet.finish(now_ns, number, 100, count) if name == "finish" else fleet.fail(now_ns, number, "gone", count)
        elif name in ("cancel", "first_token", "replica_ready"):
            getattr(fleet, name)(now_ns, number)
        elif name in ("replica_gone", "replica_notice"):
            fleet.replica_gone(now_ns, number, "x") if name == "replica_gone" else fleet.replica_notice(now_ns, number, now_ns + S)
        else:
            fleet.wake(now_ns)
        terminal += [effect.request_id for effect in fleet.drain() if isinstance(effect, Reject | Shed | Abort)]
        fleet.check()
        state = fleet.state(now_ns, 0.0)
        assert state.starting + state.ready <= high
        assert all(slots == "unlimited" or replica.outstanding <= slots for replica in fleet.replicas.values())
        assert all(replica.outstanding >= 0 for replica in fleet.replicas.values())
    assert len(terminal) == len(set(terminal)), "one end each"
    assert set(terminal) <= arrived
    by_effect = sum(fleet.counts.by_status[status] for status in (LIMITED, SHED, ERROR))
    assert by_effect == len(terminal)
    assert len(fleet.counts.by_status) == len(STATUSES)

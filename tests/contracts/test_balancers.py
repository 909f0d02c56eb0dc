"""One suite over every balancer of the table: a new one is covered unasked."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.fleet import Replica
from replay.policies.balancers import BALANCERS
from replay.policies.protocols import Balancer
from tests.fleet_driver import request


def make(kind: str) -> Balancer:
    balancer = BALANCERS[kind]()
    if hasattr(type(balancer), "rng"):
        balancer.rng = Random(7)  # type: ignore[attr-defined]
    return balancer


def replicas(loads: list[int]) -> list[Replica]:
    return [Replica(i * 2, "main", None, outstanding=load) for i, load in enumerate(loads)]


@pytest.mark.parametrize("kind", BALANCERS)
@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_it_picks_one_of_the_offered_replicas_or_holds(kind: str, loads: list[int]) -> None:
    balancer, offered = make(kind), replicas(loads)
    balancer.members(0, offered)
    for n in range(5):
        index = balancer.pick(n, request(n), offered)
        assert index is None or 0 <= index < len(offered)


@pytest.mark.parametrize("kind", BALANCERS)
def test_equal_replicas_share_the_work(kind: str) -> None:
    balancer, offered = make(kind), replicas([0, 0, 0, 0])
    balancer.members(0, offered)
    for n in range(400):
        index = balancer.pick(n, request(n), offered)
        assert index is not None
        offered[index].outstanding += 1
    assert max(replica.outstanding for replica in offered) <= 150, "nobody gets far more than the 100 that are fair"
    assert min(replica.outstanding for replica in offered) >= 60


@pytest.mark.parametrize("kind", BALANCERS)
def test_it_survives_members_coming_and_going(kind: str) -> None:
    balancer = make(kind)
    for size in (3, 1, 5, 2):
        offered = replicas([1] * size)
        balancer.members(0, offered)
        assert balancer.pick(0, request(size), offered) in range(size)


@pytest.mark.parametrize("kind", BALANCERS)
def test_the_same_seed_gives_the_same_choices(kind: str) -> None:
    def choices() -> list[int | None]:
        balancer, offered = make(kind), replicas([3, 1, 2])
        balancer.members(0, offered)
        return [balancer.pick(n, request(n), offered) for n in range(50)]

    assert choices() == choices()


def test_least_outstanding_goes_round_among_equals_and_follows_load() -> None:
    balancer, offered = make("least_outstanding"), replicas([0, 0, 0])
    assert [balancer.pick(0, request(n), offered) for n in range(4)] == [0, 1, 2, 0]
    offered[1].outstanding = -1
    assert balancer.pick(0, request(9), offered) == 1


def test_round_robin_keeps_its_place_when_the_set_changes() -> None:
    balancer = make("round_robin")
    offered = replicas([0, 0, 0])  # ids 0, 2, 4
    assert [balancer.pick(0, request(n), offered) for n in range(2)] == [0, 1]
    assert balancer.pick(0, request(2), [offered[0], offered[2]]) == 1, "4 is next after 2, though 2 left"


def test_p2c_prefers_the_less_loaded_of_two() -> None:
    balancer, offered = make("p2c"), replicas([100, 0])
    assert all(balancer.pick(0, request(n), offered) == 1 for n in range(50))

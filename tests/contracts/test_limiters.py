"""One suite over every limiter; the bucket never lets more than rate x time + burst through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.errors import InputError
from replay.policies.limiters import LIMITERS, TokenBucket
from tests.fleet_driver import S, request

PARAMETERS = {"unlimited": {}, "token_bucket": {"requests_per_min": 600}}


@pytest.mark.parametrize("kind", LIMITERS)
def test_it_admits_someone_and_settles_without_complaint(kind: str) -> None:
    limiter = LIMITERS[kind](**PARAMETERS[kind])
    assert limiter.admit(0, request(1)) == 0
    limiter.settle(1, request(1), 10)


@given(
    pauses=st.lists(st.integers(0, 3 * S), min_size=1, max_size=150),
    per_min=st.floats(1, 1000),
    burst=st.floats(1, 50),
)
def test_never_more_than_rate_times_time_plus_burst(pauses: list[int], per_min: float, burst: float) -> None:
    bucket = TokenBucket(requests_per_min=per_min, burst_requests=burst)
    now_ns = admitted = 0
    for n, pause_ns in enumerate(pauses):
        now_ns += pause_ns
        answer = bucket.admit(now_ns, request(n))
        assert isinstance(answer, int)
        admitted += answer == 0
        assert admitted <= per_min * now_ns / (60 * S) + burst + 1e-6


@given(per_min=st.floats(1, 1000), burst=st.floats(1, 50), drained=st.integers(1, 60))
def test_the_stated_wait_is_long_enough_and_not_longer(per_min: float, burst: float, drained: int) -> None:
    bucket = TokenBucket(requests_per_min=per_min, burst_requests=burst)
    wait_ns = 0
    for n in range(drained):
        answer = bucket.admit(0, request(n))
        assert isinstance(answer, int)
        wait_ns = answer
    if wait_ns:
        assert bucket.admit(wait_ns - wait_ns // 10 - 2, request(98)) != 0 or wait_ns < 100
        assert bucket.admit(wait_ns + 1, request(99)) == 0


def test_tenants_do_not_share_a_bucket_unless_told() -> None:
    apart = TokenBucket(requests_per_min=60, burst_requests=1)
    assert [apart.admit(0, request(1, tenant="a")), apart.admit(0, request(2, tenant="b"))] == [0, 0]
    together = TokenBucket(requests_per_min=60, burst_requests=1, per="all")
    assert together.admit(0, request(1, tenant="a")) == 0
    assert together.admit(0, request(2, tenant="b")) == 1 * S


@pytest.mark.parametrize(
    "parameters", [{}, {"requests_per_min": 0}, {"tokens_per_min": -1}, {"tokens_per_min": 5, "output_default": -1}]
)
def test_a_senseless_limit_is_refused_at_construction(parameters: dict[str, float]) -> None:
    with pytest.raises(InputError):
        TokenBucket(**parameters)  # type: ignore[arg-type]

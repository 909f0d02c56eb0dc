"""One suite over every autoscaler: pure in its samples, never negative, calm under constant load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.policies.autoscalers import AUTOSCALERS
from replay.policies.protocols import FleetSample
from replay.records import NS_PER_S as S

SAMPLES = st.builds(
    FleetSample,
    interval_ns=st.just(5 * S),
    concurrency=st.floats(0, 500),
    queued=st.integers(0, 500),
    running=st.integers(0, 500),
    ready=st.integers(0, 16),
    starting=st.integers(0, 4),
    draining=st.integers(0, 4),
    arrivals=st.integers(0, 100),
    finished=st.integers(0, 100),
    output_tokens=st.integers(0, 10_000),
)


@pytest.mark.parametrize("kind", AUTOSCALERS)
@given(samples=st.lists(SAMPLES, min_size=1, max_size=40))
def test_it_wants_a_number_and_gives_a_reason_and_equal_samples_give_equal_decisions(kind: str, samples: list[FleetSample]) -> None:
    first, second = AUTOSCALERS[kind](), AUTOSCALERS[kind]()
    assert first.interval_ns > 0
    for n, sample in enumerate(samples):
        want = first.decide(n * first.interval_ns, sample)
        assert want.reason
        assert want == second.decide(n * second.interval_ns, sample)


@pytest.mark.parametrize("kind", AUTOSCALERS)
def test_it_settles_under_constant_load(kind: str) -> None:
    """16 requests always inside, at most 12 running a replica: after ten minutes the wanted number no longer moves."""
    scaler, have, wanted = AUTOSCALERS[kind](), 1, []
    for n in range(400):
        running = min(16, 12 * have)
        sample = FleetSample(scaler.interval_ns, 16.0, 16 - running, running, have, 0, 0, 8, 8, 800)
        have = max(1, scaler.decide(n * scaler.interval_ns, sample).replicas)
        wanted.append(have)
    assert len(set(wanted[-100:])) == 1

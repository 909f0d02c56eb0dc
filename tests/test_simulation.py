"""A fleet in virtual time: stories of requests and replicas, conservation, and the same bytes twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay import traces
from replay.engine import FRONT_END_NS, HOST_REQUEST_MS, HOST_STEP_MS
from replay.errors import InputError
from replay.hardware import FleetSpec, profile
from replay.policies import spec
from replay.records import ERROR, LIMITED, NS_PER_S, OK, SHED, TIMEOUT
from replay.runs import RunDir, phase_columns
from replay.simulation import SimResult, service_noise, simulate, write
from replay.traces import SCHEMA
from replay.virtual import Requests

A100 = FleetSpec(kind="stand-in")
NETWORK_NS, GATEWAY_NS = 50_000, 150_000


def plan_of(arrivals_s: Sequence[float], prompt: Any = 500, output: Any = 50, **columns: Sequence[Any]) -> pa.Table:
    """A plan of requests 0..n-1; ``prompt`` and ``output`` are one number or a list, other trace columns are optional."""
    count = len(arrivals_s)
    known: dict[str, Any] = {
        "request_id": range(count),
        "arrival_at_ns": [round(at * NS_PER_S) for at in arrivals_s],
        "prompt_tokens": prompt if isinstance(prompt, list) else [prompt] * count,
        "output_tokens": output if isinstance(output, list) else [output] * count,
        **columns,
    }
    return pa.table([pa.array(known.get(name, [None] * count), SCHEMA.field(name).type) for name in SCHEMA.names], SCHEMA)


def policy(**roles: Any) -> spec.PolicySpec:
    return spec.from_dict({"name": "test", **roles})


def run(plan: pa.Table, rules: spec.PolicySpec, fleet: FleetSpec = A100, **options: Any) -> SimResult:
    result = simulate(plan, rules, fleet, seed=7, **{"noise_sigma": 0.0, **options})
    assert result.outcomes["request_id"].tolist() == list(range(len(plan))), "one row a request"
    check_phases(result)
    return result


def check_phases(result: SimResult) -> None:
    rows = result.outcomes
    phases = np.stack([rows[name] for name in phase_columns()])
    assert (phases >= -1).all()
    end_to_end_ns = rows["done_at_ns"] - rows["scheduled_at_ns"]
    assert np.maximum(phases, 0).sum(axis=0).tolist() == end_to_end_ns.tolist()
    answered = rows["status"] != TIMEOUT
    assert not rows["unexplained_ns"][answered].any(), "a request that was answered has no unexplained time"


def test_a_request_alone_spends_its_time_where_the_formula_says() -> None:
    (row,) = run(plan_of([2.0], 1000, 2), policy()).outcomes
    step = profile(A100)
    prefill_ms = step.step_ms(1000, 1000 * 500) + HOST_STEP_MS + HOST_REQUEST_MS
    decode_ms = step.step_ms(decoding=1, context=1001) + HOST_STEP_MS + HOST_REQUEST_MS
    assert row["prefill_ns"] == pytest.approx(FRONT_END_NS + prefill_ms * 1e6, abs=2)
    assert row["decode_ns"] == pytest.approx(decode_ms * 1e6, abs=2)
    assert (row["route_ns"], row["network_ns"], row["queue_ns"], row["cold_start_ns"]) == (GATEWAY_NS, 2 * NETWORK_NS, 0, 0)
    assert row["scheduled_at_ns"] == row["sent_at_ns"] == 2 * NS_PER_S
    assert row["first_token_at_ns"] == 2 * NS_PER_S + 2 * NETWORK_NS + GATEWAY_NS + row["prefill_ns"]
    assert (row["status"], row["http_status"], row["output_tokens"], row["chunks"], row["attempts"]) == (OK, 200, 2, 2, 1)


def test_first_replicas_are_ready_and_billed_from_time_zero() -> None:
    result = run(plan_of([0.0, 0.5]), policy(replicas={"min": 2, "max": 2}), FleetSpec(kind="stand-in", cold_start="uncached"))
    assert [(life.requested_at_ns, life.ready_at_ns, life.reason) for life in result.lifetimes] == [(0, 0, "end of the run")] * 2
    assert {life.stopped_at_ns for life in result.lifetimes} == {result.ended_at_ns}
    assert (result.states["at_ns"] >= 0).all()
    assert set(result.states["usd_per_hour"].tolist()) == {2 * 3.43}


def test_scaling_up_adds_capacity_after_exactly_the_cold_start() -> None:
    """One slot, ten requests at once, a decision every 5 s that sees them wait: the second replica comes 7 s after it."""
    rules = policy(
        queue={"kind": "fifo", "timeout_s": 600},
        autoscaler={"kind": "queue_depth", "target": 4, "interval_s": 5},
        replicas={"min": 1, "max": 2},
        slots_per_replica=1,
    )
    result = run(plan_of([0.0] * 10, 500, 400), rules)
    first, second = result.lifetimes
    assert second.requested_at_ns % (5 * NS_PER_S) == 3 * NS_PER_S, "decisions run from the fleet's start, 7 s before time 0"
    assert second.ready_at_ns == second.requested_at_ns + 7 * NS_PER_S
    on_second = result.outcomes[result.outcomes["replica_id"] == second.replica_id]
    began_ns = on_second["done_at_ns"] - on_second["decode_ns"] - on_second["prefill_ns"] - NETWORK_NS - GATEWAY_NS
    assert began_ns.min() == second.ready_at_ns, "the head of the queue goes to it the instant it is ready"
    assert first.ready_at_ns == 0
    ready = dict(zip(result.states["at_ns"].tolist(), result.states["ready"].tolist(), strict=True))
    assert ready[second.ready_at_ns] == 2


def test_waiting_without_any_replica_is_cold_start_and_not_queue() -> None:
    rules = policy(
        autoscaler={"kind": "concurrency", "target": 8}, replicas={"min": 0, "max": 1}, queue={"kind": "fifo", "timeout_s": 60}
    )
    result = run(plan_of([200.0]), rules)
    (row,) = result.outcomes
    assert (row["cold_start_ns"], row["queue_ns"], row["status"]) == (7 * NS_PER_S, 0, OK)
    assert result.lifetimes[0].requested_at_ns == row["gateway_at_ns"], "an arrival at zero replicas starts one at once"


def test_scaling_down_drains_and_loses_nothing() -> None:
    rules = policy(
        autoscaler={"kind": "concurrency", "target": 4, "interval_s": 5, "down_stabilisation_s": 10},
        queue={"kind": "fifo", "timeout_s": 600},
        replicas={"min": 1, "max": 4},
        slots_per_replica=8,
    )
    arrivals = [*np.linspace(0, 30, 200).tolist(), *np.linspace(60, 120, 20).tolist()]
    result = run(plan_of(arrivals, 800, 300), rules)
    assert (result.outcomes["status"] == OK).all()
    assert result.states["ready"].max() > 1
    ended_early = [life for life in result.lifetimes if life.reason != "end of the run"]
    assert ended_early
    for life in ended_early:
        served = result.outcomes[result.outcomes["replica_id"] == life.replica_id]
        assert life.stopped_at_ns is not None
        assert (served["done_at_ns"] - NETWORK_NS <= life.stopped_at_ns).all(), "it stops once it is empty, not before"


def test_limited_shed_and_refused_requests_have_rows_that_say_so() -> None:
    limited = run(plan_of([0.0] * 5), policy(limiter={"kind": "token_bucket", "requests_per_min": 2, "burst_requests": 2}))
    codes = limited.outcomes["http_status"][limited.outcomes["status"] == LIMITED]
    assert len(codes) == 3
    assert set(codes.tolist()) == {429}
    shed = run(plan_of([0.0] * 5, 500, 1000), policy(queue={"kind": "fifo", "length_max": 2, "timeout_s": 5}, slots_per_replica=1))
    assert shed.outcomes["status"].tolist() == [OK, SHED, SHED, SHED, SHED]
    assert sorted(shed.outcomes["queue_ns"][1:].tolist()) == [0, 0, 5 * NS_PER_S, 5 * NS_PER_S]
    assert {bytes(detail) for detail in shed.outcomes["detail"]} == {b"", b"queue full", b"queue timeout"}
    beyond_memory = run(plan_of([0.0, 0.0], [500, 1_000_000]), policy(replicas={"min": 2, "max": 2}))
    assert beyond_memory.outcomes["status"].tolist() == [OK, ERROR]
    (_, refused) = beyond_memory.outcomes
    assert (refused["http_status"], refused["attempts"], bytes(refused["detail"])) == (400, 1, b"client_error")


def test_what_is_inside_at_the_end_of_the_drain_is_timeout_and_counted() -> None:
    plan = plan_of([0.0] * 40 + [1.0] * 3, 2000, 600, session_id=[None] * 40 + ["s"] * 3, turn=[None] * 40 + [1, 2, 3])
    result = run(plan, policy(slots_per_replica=4, queue={"kind": "fifo", "timeout_s": 600}), drain_ns=12 * NS_PER_S)
    rows = result.outcomes
    timeouts = rows[rows["status"] == TIMEOUT]
    assert result.ended_at_ns == 13 * NS_PER_S
    assert (timeouts["done_at_ns"] == result.ended_at_ns).all()
    assert (rows["status"] == OK).sum() == 4
    assert sorted(timeouts["attempts"].tolist())[-4:] == [1, 1, 1, 1], "some were streaming"
    streaming = timeouts[timeouts["first_token_at_ns"] >= 0]
    assert ((streaming["chunks"] > 1) & (streaming["chunks"] < 600)).all()
    assert (rows["sent_at_ns"][-2:] == -1).all(), "turns whose turn never came are counted, but were not sent"


def test_a_queue_that_times_out_at_the_very_end_of_the_drain_still_counts_everybody_once() -> None:
    result = run(
        plan_of([0.0] * 6, 2000, 600),
        policy(slots_per_replica=2, queue={"kind": "fifo", "timeout_s": 1}),
        network_ns=0,
        drain_ns=NS_PER_S,
    )
    assert result.outcomes["status"].tolist() == [TIMEOUT] * 2 + [SHED] * 4


def test_a_turn_waits_for_the_answer_before_it_and_for_its_user() -> None:
    plan = plan_of([0.0, 0.1, 50.0], session_id=["s"] * 3, turn=[1, 2, 3], think_ns=[None, 2 * NS_PER_S, None])
    first, second, third = run(plan, policy()).outcomes
    assert second["scheduled_at_ns"] == first["done_at_ns"] + 2 * NS_PER_S
    assert third["scheduled_at_ns"] == 50 * NS_PER_S, "its predecessor had long ended"


def test_policies_never_see_the_recorded_output_length() -> None:
    """Two traces that differ in one row's recorded output: what the gateway observes of it is equal."""
    outputs = [100] * 200
    one, other = (Requests(plan_of([0.0] * 200, 500, [*outputs[:-1], last])) for last in (3, 100))
    assert one.observe(199, 5) == other.observe(199, 5)
    assert one.output_tokens[199] != other.output_tokens[199]


def test_service_noise_belongs_to_the_request_and_not_to_the_policy() -> None:
    assert service_noise(3, 1000, 0.03)[:10] == service_noise(3, 10, 0.03)
    assert service_noise(3, 10, 0.03) != service_noise(4, 10, 0.03)
    drawn = np.array(service_noise(3, 20_000, 0.03))
    assert drawn.mean() == pytest.approx(1, abs=0.001)
    assert np.log(drawn).std() == pytest.approx(0.03, rel=0.02)


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(InputError, match="stand-in"):
        simulate(plan_of([0.0]), policy(), FleetSpec(kind="llama"), seed=0)
    with pytest.raises(InputError, match="at least one"):
        simulate(plan_of([]), policy(), A100, seed=0)
    with pytest.raises(InputError, match="request_id"):
        simulate(plan_of([0.0, 1.0]).slice(1), policy(), A100, seed=0)


@settings(max_examples=150, deadline=None)
@given(
    gaps_ms=st.lists(st.integers(0, 3000), min_size=1, max_size=60),
    seed=st.integers(0, 2**32),
    preset=st.sampled_from(list(spec.preset_names())),
    slots=st.sampled_from([1, 4, "unlimited"]),
    timeout_s=st.sampled_from([0.5, 30.0]),
    drain_s=st.sampled_from([0, 1, 60]),
)
def test_every_request_of_any_workload_gets_one_row(
    gaps_ms: list[int], seed: int, preset: str, slots: int | str, timeout_s: float, drain_s: int
) -> None:
    draw = np.random.default_rng(seed)
    count = len(gaps_ms)
    sessions = [None if n < 0 else str(n) for n in draw.integers(-3, 3, count).tolist()]
    plan = plan_of(
        (np.cumsum(gaps_ms) / 1000).tolist(),
        draw.integers(1, 5000, count).tolist(),
        draw.integers(1, 500, count).tolist(),
        session_id=sessions,
        turn=list(range(count)),
    )
    if "queue-depth" in preset and slots == "unlimited":
        slots = 4  # refused at load time: it would never see a queue
    document = {**spec.to_dict(spec.load(preset)), "slots_per_replica": slots, "queue": {"kind": "fifo", "timeout_s": timeout_s}}
    run(plan, spec.from_dict(document), drain_ns=drain_s * NS_PER_S, noise_sigma=0.05)


def test_the_busiest_minutes_of_the_shipped_hour_leave_a_run_like_a_live_one(tmp_path: Path) -> None:
    plan = traces.shape(traces.read("azure-code-2023"), traces.Shaping(busiest_s=120))
    result = run(plan, spec.load("lo-concurrency"), noise_sigma=0.03)
    written = write(result, tmp_path / "arm", {"policy": {"name": "lo-concurrency"}, "repeat": 0})
    opened = RunDir.open(written.path)
    rows = opened.outcomes()
    assert len(rows) == len(plan)
    assert rows["recorded_output_tokens"].to_pylist() == plan["output_tokens"].to_pylist()
    assert opened.lifetimes() == result.lifetimes
    assert opened.states().tobytes() == result.states.tobytes()
    manifest = opened.manifest
    assert (manifest["kind"], manifest["repeat"], manifest["ended"]["at_ns"]) == ("simulated", 0, result.ended_at_ns)
    assert manifest["id"].startswith("sim-")
    again = opened.plan()
    assert again is not None
    assert again.equals(plan)


_SCRIPT = """
import sys
from replay import traces
from replay.hardware import FleetSpec
from replay.policies import spec
from replay.simulation import simulate, write
plan = traces.shape(traces.read("azure-code-2023"), traces.Shaping(busiest_s=60))
write(simulate(plan, spec.load("lo-queue-depth"), FleetSpec(kind="stand-in"), seed=int(sys.argv[2])), sys.argv[1], {})
"""


def test_the_same_inputs_give_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Two processes with different hash seeds; another seed of the run gives other bytes and another id."""
    for name, hash_seed, seed in (("a", "1", "5"), ("b", "2", "5"), ("c", "1", "6")):
        command = [sys.executable, "-c", _SCRIPT, str(tmp_path / name), seed]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": hash_seed}, cwd=Path(__file__).parent.parent)
    contents = {
        name: {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in "abc"
    }
    assert contents["a"] == contents["b"]
    assert len(contents["a"]) >= 6
    ids = [json.loads(contents[name]["run.json"])["id"] for name in "abc"]
    assert ids[0] == ids[1] != ids[2]
    assert all(contents["a"][path] != contents["c"][path] for path in contents["a"] if path.startswith("requests/"))

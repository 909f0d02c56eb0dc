"""What a scrape shows, read back by prometheus_client's own parsers."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from replay.records import ERROR, FLEET_STATE_DTYPE, FLEET_STATE_STRUCT, LIMITED, NS_PER_S, FleetState, Outcome
from tests.tracing_support import MANIFEST, outcome, quick, records
from tracing import names
from tracing.batch import Batch
from tracing.export import KeptTrace
from tracing.meters import MODELS_MOST, Meters

HOUR_NS = 3600 * NS_PER_S


def fed(rows: list[Outcome], side: str = "client") -> Meters:
    meters = Meters(MANIFEST, side)
    meters.add_outcomes(Batch.of(records(rows)))
    return meters


def samples(meters: Meters) -> list[Sample]:
    return [
        sample for family in text_string_to_metric_families(generate_latest(meters.registry).decode()) for sample in family.samples
    ]


def value(meters: Meters, name: str, **labels: str) -> float:
    """The sum of the samples of that name that carry these labels."""
    found = [sample.value for sample in samples(meters) if sample.name == name and labels.items() <= sample.labels.items()]
    assert found, f"no sample {name} {labels}"
    return sum(found)


def test_requests_tokens_and_phases_are_counted() -> None:
    meters = fed(
        [outcome(0), quick(1), quick(2, status=LIMITED, output_tokens=-1), quick(3, status=ERROR, tokens_lost=4, model=b"qwen")]
    )
    assert value(meters, "tidegauge_requests_total", status="ok") == 2
    assert value(meters, "tidegauge_requests_total", status="limited", model="llama") == 1
    assert value(meters, "tidegauge_requests_total", status="error", model="qwen") == 1
    assert value(meters, "tidegauge_requests_total", status="shed") == 0
    assert value(meters, "tidegauge_tokens_total", type="output") == 30
    assert value(meters, "tidegauge_tokens_total", type="lost") == 4
    assert math.isclose(value(meters, "tidegauge_phase_seconds_total", phase="queue"), 1.5)
    assert value(meters, "tidegauge_records_total", kind="outcomes") == 4
    for sample in samples(meters):
        assert {name: sample.labels[name] for name in names.COMMON_LABELS} == {"side": "client", "policy": "p2c", "run": "run-1"}


def test_good_means_ok_and_every_term_of_the_target_met() -> None:
    slow_tokens = quick(3, last_token_at_ns=1_050_000_000 + 9 * 110_000_000)
    one_token = quick(4, output_tokens=1)
    meters = fed([outcome(0), quick(1), quick(2, status=ERROR), slow_tokens, one_token])
    assert value(meters, "tidegauge_slo_requests_total") == 5
    assert value(meters, "tidegauge_slo_good_requests_total") == 2  # 1 and 4: one token has no TPOT to miss
    without = Meters({**MANIFEST, "slo": {}}, "client")
    without.add_outcomes(Batch.of(records([quick(0)])))
    assert not [sample for sample in samples(without) if "slo" in sample.name]


def test_genai_histograms_depend_on_the_side() -> None:
    client, gateway = fed([outcome(0), quick(1, status=ERROR)]), fed([outcome(0)], side="gateway")
    assert value(client, "gen_ai_client_operation_duration_seconds_count", error_type="") == 1
    assert value(client, "gen_ai_client_operation_duration_seconds_count", error_type="error") == 1
    assert math.isclose(value(client, "gen_ai_client_operation_duration_seconds_sum", error_type=""), 3.401)
    assert value(client, "gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 1400
    assert math.isclose(value(gateway, "gen_ai_server_time_to_first_token_seconds_sum"), 2.5006)
    assert value(gateway, "gen_ai_server_request_duration_seconds_count", gen_ai_request_model="llama") == 1
    assert not [sample for sample in samples(client) if sample.name.startswith("gen_ai_server")]
    assert not [sample for sample in samples(gateway) if sample.name.startswith("gen_ai_client")]


ON_A_BOUND_NS = st.sampled_from([round(bound * NS_PER_S) for bound in names.TTFT.buckets])


@given(st.lists(st.integers(0, 700_000_000_000) | ON_A_BOUND_NS, min_size=1, max_size=40), st.integers(0, 40))
def test_a_bucket_holds_what_is_at_most_its_bound(first_tokens_ns: list[int], cut: int) -> None:
    rows = [outcome(i, scheduled_at_ns=0, first_token_at_ns=ns) for i, ns in enumerate(first_tokens_ns)]
    meters = Meters(MANIFEST, "client")
    for part in (rows[:cut], rows[cut:]):  # in however many batches they come
        meters.add_outcomes(Batch.of(records(part)))
    found = {s.labels["le"]: s.value for s in samples(meters) if s.name == "tidegauge_ttft_seconds_bucket"}
    expected = {bound: sum(ns / NS_PER_S <= bound for ns in first_tokens_ns) for bound in (*names.TTFT.buckets, math.inf)}
    assert {float(bound): count for bound, count in found.items()} == expected
    assert math.isclose(value(meters, "tidegauge_ttft_seconds_sum"), sum(first_tokens_ns) / NS_PER_S, abs_tol=1e-6)


def states(*rows: FleetState) -> np.ndarray:
    return np.frombuffer(b"".join(FLEET_STATE_STRUCT.pack(*row) for row in rows), FLEET_STATE_DTYPE)


def state(at_ns: int, usd_per_hour: float, ready: int = 1) -> FleetState:
    return FleetState(at_ns, 5, 9, 3, 2, ready, 1, 100, 86, usd_per_hour)


def test_gauges_show_the_last_state_and_cost_adds_up_between_states() -> None:
    """3 USD/h for half an hour, then 6 USD/h for half an hour, split over two reads: 4.50 USD."""
    meters = Meters(MANIFEST, "gateway")
    meters.add_states(states(state(0, 3.0)))
    meters.add_states(states(state(HOUR_NS // 2, 6.0, ready=2), state(HOUR_NS, 6.0, ready=4)))
    meters.add_states(states())
    assert math.isclose(value(meters, "tidegauge_cost_usd_total"), 4.5)
    assert value(meters, "tidegauge_cost_usd_per_hour") == 6
    assert value(meters, "tidegauge_queued_requests") == 5
    assert value(meters, "tidegauge_running_requests") == 9
    assert value(meters, "tidegauge_arrived_requests_total") == 100
    shown = {state: value(meters, "tidegauge_replicas", state=state) for state in ("wanted", "starting", "ready", "draining")}
    assert shown == {"wanted": 3, "starting": 2, "ready": 4, "draining": 1}


def test_a_fleet_without_a_price_shows_no_cost() -> None:
    meters = Meters(MANIFEST, "gateway")
    meters.add_states(states(state(0, math.nan), state(HOUR_NS, math.nan)))
    assert value(meters, "tidegauge_queued_requests") == 5
    assert not [sample for sample in samples(meters) if "cost" in sample.name]


def test_labels_stay_few_whatever_clients_send_as_a_model() -> None:
    meters = fed([quick(number, model=b"model-%d" % number) for number in range(MODELS_MOST * 3)])
    models = {sample.labels["model"] for sample in samples(meters) if sample.name == "tidegauge_requests_total"}
    assert len(models) == MODELS_MOST + 1
    assert value(meters, "tidegauge_requests_total", model="other") == MODELS_MOST * 2


def test_exemplars_name_kept_traces_and_lie_in_their_bucket() -> None:
    meters = fed([outcome(0), quick(1)])
    text = generate_openmetrics(meters.registry).decode()
    assert "trace_id" not in text
    meters.note_kept([KeptTrace(0xABC, "llama", 1.79e9, 2.5013, math.nan, 3.4, [])])
    found = {
        (sample.name, sample.labels["le"]): sample.exemplar
        for family in parse_openmetrics(generate_openmetrics(meters.registry).decode())
        for sample in family.samples
        if sample.exemplar
    }
    assert set(found) == {("tidegauge_ttft_seconds_bucket", "2.7"), ("tidegauge_e2e_seconds_bucket", "4.0")}
    exemplar = found["tidegauge_ttft_seconds_bucket", "2.7"]
    assert exemplar is not None
    assert (exemplar.labels, exemplar.value) == ({"trace_id": f"{0xABC:032x}"}, 2.5013)


def test_only_names_of_the_table_are_shown() -> None:
    meters = fed([outcome(0)], "gateway")
    meters.add_states(states(state(0, 1.0)))
    meters.set_total(names.ROWS, 12)
    known = {metric.name.removesuffix("_total") for metric in names.METRICS}
    families = list(parse_openmetrics(generate_openmetrics(meters.registry).decode()))
    assert {family.name for family in families} <= known
    assert value(meters, "tidegauge_rows_total") == 12

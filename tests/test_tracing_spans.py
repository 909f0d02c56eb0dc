"""A row's spans: a view of the row, so they nest, sum and carry the ids that the gateway told the engine."""

from __future__ import annotations

from hypothesis import given
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from replay.records import LIMITED, NS_PER_S, OK, PHASES, STATUSES, Outcome, span_id, trace_id
from tests.tracing_support import MANIFEST, STARTED_AT_UNIX_NS, consistent_rows, outcome
from tracing import names
from tracing.spans import row_spans


def by_name(spans: list[ReadableSpan], request_id: int | None = None) -> dict[str, ReadableSpan]:
    """Spans by the name that their id derives from (the client's is shown as operation and model)."""
    names_by_id = {span_id(span.context.trace_id, name, request_id): name for span in spans for name in names.SPANS}
    return {names_by_id[span.context.span_id]: span for span in spans}


def length_ns(span: ReadableSpan) -> int:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.end_time - span.start_time


def test_a_request_that_waited_for_a_cold_start_shows_it() -> None:
    spans = by_name(row_spans(outcome(7), MANIFEST))
    assert list(spans) == ["client", "gateway", "limiter", "queue", "cold_start", "route", "inference", "prefill", "decode"]
    client, gateway, queue = spans["client"], spans["gateway"], spans["queue"]
    assert client.name == "chat llama"
    assert (client.kind, gateway.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert client.start_time == STARTED_AT_UNIX_NS + NS_PER_S
    assert gateway.start_time == STARTED_AT_UNIX_NS + 1_000_700_000
    assert length_ns(queue) == 2 * NS_PER_S
    assert length_ns(spans["cold_start"]) == NS_PER_S // 2
    assert queue.attributes == {"tidegauge.queue_reason": "cold_start"}
    assert client.attributes is not None
    assert client.attributes["queue_latency"] == 2.0
    assert client.attributes["gateway_latency"] == 0.0004
    assert client.attributes["inference_latency"] == 1.4
    assert client.attributes["tidegauge.largest_latency"] == "queue_latency"
    assert client.attributes["gen_ai.usage.output_tokens"] == 10
    assert client.attributes["tidegauge.ttft"] == 2.5013
    assert client.status.status_code is StatusCode.UNSET
    assert client.resource.attributes["service.name"] == "tidegauge-client"
    assert gateway.resource.attributes["service.name"] == "tidegauge-gateway"


def test_ids_derive_from_run_and_request_so_that_engines_can_be_told_before() -> None:
    trace = trace_id("run-1", 7)
    spans = by_name(row_spans(outcome(7), MANIFEST))
    assert {span.context.trace_id for span in spans.values()} == {trace}
    assert spans["inference"].context.span_id == span_id(trace, "inference")
    assert spans["client"].parent is None


def test_a_failed_request_is_an_error_with_its_type() -> None:
    spans = by_name(row_spans(outcome(status=LIMITED, http_status=429, detail=b"60 requests/min"), MANIFEST))
    for name in ("client", "gateway"):
        assert spans[name].status.status_code is StatusCode.ERROR
    assert spans["client"].attributes is not None
    assert spans["client"].attributes["error.type"] == "limited"
    assert spans["client"].attributes["tidegauge.detail"] == "60 requests/min"


def test_a_foreign_gateway_leaves_the_clients_span_alone() -> None:
    row = outcome(gateway_at_ns=-1, **dict.fromkeys((f"{phase}_ns" for phase in PHASES), -1))
    (client,) = row_spans(row, MANIFEST)
    assert length_ns(client) == row.done_at_ns - row.scheduled_at_ns
    assert client.attributes is not None
    assert "queue_latency" not in client.attributes
    assert "tidegauge.largest_latency" not in client.attributes


def test_a_foreign_clients_trace_is_continued_and_rooted_in_the_gateway() -> None:
    row = outcome(trace_hi=0xA1, trace_lo=0xB2, parent_span=0xC3, scheduled_at_ns=-1, sent_at_ns=-1)
    spans = by_name(row_spans(row, MANIFEST, side="gateway"), row.request_id)
    gateway = spans["gateway"]
    assert "client" not in spans
    assert gateway.context.trace_id == (0xA1 << 64) | 0xB2
    assert gateway.parent is not None
    assert (gateway.parent.span_id, gateway.parent.is_remote) == (0xC3, True)
    assert gateway.attributes is not None
    assert gateway.attributes["gen_ai.request.model"] == "llama"
    assert gateway.end_time == STARTED_AT_UNIX_NS + row.done_at_ns


def test_without_traceparent_the_gateways_span_is_the_root() -> None:
    spans = by_name(row_spans(outcome(5, scheduled_at_ns=-1), MANIFEST, side="gateway"), 5)
    assert spans["gateway"].parent is None
    assert spans["inference"].context.span_id == span_id(trace_id("run-1", 5), "inference", 5)


def test_requests_of_one_foreign_trace_keep_their_spans_apart() -> None:
    """An agent makes two calls in one trace, and may name the same parent for both."""
    calls = [outcome(request, trace_hi=0xA1, trace_lo=0xB2, parent_span=0xC3) for request in (1, 2)]
    spans = [span for call in calls for span in row_spans(call, MANIFEST, side="gateway")]
    assert {span.context.trace_id for span in spans} == {(0xA1 << 64) | 0xB2}
    assert len({span.context.span_id for span in spans}) == len(spans)


def test_clocks_that_disagree_move_the_gateways_spans_and_say_so() -> None:
    ahead = 5 * NS_PER_S
    spans = by_name(row_spans(outcome(gateway_at_ns=1_000_700_000 + ahead), MANIFEST))
    client, gateway = spans["client"], spans["gateway"]
    assert gateway.end_time == client.end_time
    assert gateway.attributes is not None
    moved = gateway.attributes["tidegauge.clock_shift"]
    assert isinstance(moved, float)
    assert -5 < moved < -4.99


@given(consistent_rows())
def test_spans_nest_and_their_lengths_are_the_rows_phases(row: Outcome) -> None:
    spans = by_name(row_spans(row, MANIFEST))
    by_id = {span.context.span_id: span for span in spans.values()}
    for name, span in spans.items():
        assert length_ns(span) >= 0
        if name != "client":
            assert span.parent is not None
            parent = by_id[span.parent.span_id]
            assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
    phases = {phase: max(getattr(row, f"{phase}_ns"), 0) for phase in PHASES}
    assert length_ns(spans["client"]) == sum(phases.values())
    assert length_ns(spans["gateway"]) == sum(phases.values()) - phases["network"] - phases["unexplained"]
    found = {name: length_ns(span) for name, span in spans.items()}
    assert found.get("queue", 0) == phases["queue"] + phases["cold_start"]
    for span_name, phase in {"limiter": "limit", **{p: p for p in PHASES}}.items():
        if span_name in ("cold_start", "route", "retry", "adapter_load", "kv_transfer", "prefill", "decode", "limiter"):
            assert found.get(span_name, 0) == phases[phase], span_name
    inside = ("limiter", "queue", "route", "inference")
    assert sum(found.get(name, 0) for name in inside) == found["gateway"]


@given(consistent_rows())
def test_exactly_the_rows_that_did_not_end_ok_are_errors(row: Outcome) -> None:
    client = row_spans(row, MANIFEST)[0]
    assert (client.status.status_code is StatusCode.ERROR) == (row.status != OK)
    assert client.attributes is not None
    assert client.attributes.get("error.type") == (None if row.status == OK else STATUSES[row.status])


def test_every_attribute_is_in_the_table_of_names() -> None:
    known = {attribute.name for attribute in names.ATTRIBUTES}
    row = outcome(
        status=LIMITED, detail=b"x", session_id=b"s", cached_tokens=1, decode_replica_id=2, tokens_lost=3, gateway_at_ns=0
    )
    spans = row_spans(row, MANIFEST)
    used = {key for span in spans for key in (*(span.attributes or {}), *span.resource.attributes)}
    assert used == known

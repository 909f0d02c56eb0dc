"""Kept traces leave by OTLP/HTTP or as OTLP-JSON, never block, and every one of them is accounted for."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan

from replay.records import trace_id
from tests.tracing_support import MANIFEST, outcome
from tracing.export import BATCH_TRACES, QUEUE_TRACES, Exporter, FileSink, KeptTrace, OtlpSink, make_sink
from tracing.spans import row_spans


def kept(request_id: int) -> KeptTrace:
    return KeptTrace(trace_id("run-1", request_id), "llama", 0.0, 1.0, 1.0, 1.0, row_spans(outcome(request_id), MANIFEST))


class GatedSink:
    """A sink that holds every batch until it is let go, as an endpoint that hangs."""

    def __init__(self, arrives: bool = True) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.arrives, self.sent = arrives, 0

    def send(self, spans: list[ReadableSpan]) -> bool:
        self.entered.set()
        self.go.wait()
        self.sent += len(spans)
        return self.arrives


def test_the_file_is_otlp_json_with_ids_in_hex(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "spans.jsonl")
    for request in (1, 2):
        assert sink.send(kept(request).spans)
    lines = (tmp_path / "spans.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for request, line in zip((1, 2), lines, strict=True):
        message = json.loads(line)
        spans = [s for resource in message["resourceSpans"] for scope in resource["scopeSpans"] for s in scope["spans"]]
        assert {span["traceId"] for span in spans} == {f"{trace_id('run-1', request):032x}"}
        assert {len(span["spanId"]) for span in spans} == {16}
        roots = [span for span in spans if "parentSpanId" not in span]
        assert [(span["name"], span["kind"]) for span in roots] == [("chat llama", 3)]
        for span in spans:  # but for the ids it is protobuf's JSON of the message
            for key in ("traceId", "spanId", "parentSpanId"):
                span.pop(key, None)
        assert ParseDict(message, ExportTraceServiceRequest()).resource_spans


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    assert not FileSink(tmp_path / "missing" / "spans.jsonl").send(kept(1).spans)
    assert not FileSink(Path("/dev/full")).send(kept(1).spans)


def test_the_environment_chooses_the_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_sink(tmp_path / "s", {}), FileSink)
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        assert isinstance(make_sink(tmp_path / "s", {name: "http://127.0.0.1:9"}), OtlpSink)


def test_what_arrives_is_kept_and_told() -> None:
    told: list[int] = []
    sink = GatedSink()
    sink.go.set()
    exporter = Exporter(sink, lambda traces: told.extend(trace.trace_id for trace in traces))
    traces = [kept(request) for request in range(BATCH_TRACES * 2 + 1)]
    for trace in traces:
        exporter.offer(trace)
    exporter.close(10)
    assert told == [trace.trace_id for trace in traces]
    assert exporter.traces == {"kept": len(traces)}
    assert exporter.spans == {"kept": sink.sent}


def test_what_fails_is_dropped_and_no_exemplar_may_name_it() -> None:
    told: list[KeptTrace] = []
    sink = GatedSink(arrives=False)
    sink.go.set()
    exporter = Exporter(sink, told.extend)
    exporter.offer(trace := kept(1))
    exporter.close(10)
    assert not told
    assert exporter.traces == {"failed": 1}
    assert exporter.spans == {"dropped": len(trace.spans)}


def test_an_endpoint_that_hangs_blocks_nothing_and_loses_nothing_unnoticed() -> None:
    sink, told, trace = GatedSink(), list[KeptTrace](), kept(1)
    exporter = Exporter(sink, told.extend)
    exporter.offer(trace)
    assert sink.entered.wait(10)
    offered = 1 + QUEUE_TRACES + 7
    for _ in range(offered - 1):
        exporter.offer(trace)  # returns at once: 7 of them find no room
    assert exporter.traces == {"queue_full": 7}
    exporter.close(0.05)
    assert exporter.traces == {"queue_full": 7, "failed": offered - 7}
    assert exporter.spans == {"dropped": offered * len(trace.spans)}
    sink.go.set()  # what it does after it was given up changes nothing
    assert not told
    assert exporter.traces.total() == offered

"""Kept traces leave the process: to an OTLP/HTTP endpoint where one is set, else as OTLP-JSON lines to a file.

Never in the way of the recorder's rows: a bounded queue, a thread of its own, and what finds no room is counted as dropped.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

QUEUE_TRACES: Final = 2048  # 20 s of the default rate: longer than an endpoint's restart takes
BATCH_TRACES: Final = 64  # some 400 spans: one request of 150 kB, 8 ms of encoding
KEPT, QUEUE_FULL, FAILED = "kept", "queue_full", "failed"


class KeptTrace(NamedTuple):
    """One trace on its way out, and what an exemplar says of it; latencies are NaN where undefined."""

    trace_id: int
    model: str
    at_unix_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    spans: list[ReadableSpan]


class Sink(Protocol):
    """Where spans go; may block, and says whether they arrived."""

    def send(self, spans: list[ReadableSpan]) -> bool: ...


class OtlpSink:
    """OTLP over HTTP, set up by the standard OTEL_EXPORTER_OTLP_* variables; it retries within its own time-out (10 s)."""

    def __init__(self) -> None:
        # Its errors are counted and reported as dropped spans; a line of log for each of them helps nobody.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter()

    def send(self, spans: list[ReadableSpan]) -> bool:
        return self._exporter.export(spans) is SpanExportResult.SUCCESS


class FileSink:
    """Appends one ExportTraceServiceRequest as OTLP-JSON a line, which a collector's file receiver reads as it is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, spans: list[ReadableSpan]) -> bool:
        line = otlp_json(spans).encode() + b"\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                start = file.tell()
                if file.write(line) != len(line):  # the disk is full: half a line would spoil the next one
                    file.truncate(start)
                    return False
        except OSError:
            return False
        return True


def make_sink(path: Path, environ: Mapping[str, str] = os.environ) -> Sink:
    """OTLP/HTTP where the environment names an endpoint, else the file at ``path``."""
    named = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return OtlpSink() if named else FileSink(path)


def otlp_json(spans: list[ReadableSpan]) -> str:
    """An ExportTraceServiceRequest as OTLP-JSON: protobuf's JSON, but ids in hex and enums as numbers (OTLP 1.x, JSON encoding)."""
    message: dict[str, Any] = MessageToDict(encode_spans(spans), use_integers_for_enums=True)
    for resource in message["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                for key in ("traceId", "spanId", "parentSpanId"):
                    if key in span:
                        span[key] = base64.b64decode(span[key]).hex()
    return json.dumps(message, separators=(",", ":"))


class Exporter:
    """Takes kept traces without ever blocking and sends them from a thread; ``traces`` and ``spans`` count their fate."""

    def __init__(self, sink: Sink, on_kept: Callable[[list[KeptTrace]], None]) -> None:
        self.traces: Counter[str] = Counter()
        self.spans: Counter[str] = Counter()
        self._sink, self._on_kept = sink, on_kept
        self._queue: queue.Queue[KeptTrace | None] = queue.Queue(QUEUE_TRACES)
        self._lock = threading.Lock()
        self._unsettled: list[KeptTrace] = []  # in the sink's hands right now
        self._thread = threading.Thread(target=self._run, name="exporter", daemon=True)
        self._thread.start()

    def offer(self, trace: KeptTrace) -> None:
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            with self._lock:
                self._count(QUEUE_FULL, [trace])

    def close(self, timeout_s: float) -> None:
        """Send what is queued, for ``timeout_s`` at most; what has not arrived by then is counted as failed."""
        try:
            self._queue.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)
        except queue.Full:
            pass
        if self._thread.is_alive():
            left = self._drain(QUEUE_TRACES)
            with self._lock:
                self._count(FAILED, [*left, *self._unsettled])
                self._unsettled = []

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            more = self._drain(BATCH_TRACES - 1)
            batch = [first, *more]
            with self._lock:
                self._unsettled = batch
            arrived = self._sink.send([span for trace in batch for span in trace.spans])
            with self._lock:
                if not self._unsettled:  # close() gave it up, and counted it
                    return
                self._count(KEPT if arrived else FAILED, batch)
                self._unsettled = []
            if arrived:
                self._on_kept(batch)

    def _drain(self, most: int) -> list[KeptTrace]:
        """What is queued now, up to the end mark, which is put back."""
        taken: list[KeptTrace] = []
        while len(taken) < most:
            try:
                trace = self._queue.get_nowait()
            except queue.Empty:
                break
            if trace is None:
                self._queue.put_nowait(None)
                break
            taken.append(trace)
        return taken

    def _count(self, fate: str, traces: list[KeptTrace]) -> None:
        self.traces[fate] += len(traces)
        self.spans["kept" if fate == KEPT else "dropped"] += sum(len(trace.spans) for trace in traces)

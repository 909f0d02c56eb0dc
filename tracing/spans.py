"""One record -> the spans of one trace: a view of the record, so that trace and row cannot disagree.

    client (shown as "{operation} {model}") > gateway > limiter
                                                      > queue     > cold_start
                                                      > route
                                                      > inference > retry, adapter_load, prefill, kv_transfer, decode

Durations are the record's phases, laid end to end in the order in which they happen; ids derive from run and request, so
that the gateway can name ``inference`` as the parent of the engine's spans before any of this exists. No prompt text.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from replay.records import NS_PER_S, OK, QUEUE_REASONS, STATUSES, Outcome, span_id
from replay.runs import Manifest
from tracing import names
from tracing.batch import trace_of

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_SCOPE: Final = InstrumentationScope("tidegauge")
_GATEWAY_PHASES: Final = (
    "limit", "queue", "cold_start", "route", "retry", "adapter_load", "prefill", "kv_transfer", "decode",
)  # fmt: skip
_INFERENCE: Final = {
    names.RETRY: "retry", names.ADAPTER_LOAD: "adapter_load", names.PREFILL: "prefill",
    names.KV_TRANSFER: "kv_transfer", names.DECODE: "decode",
}  # fmt: skip
_LATENCIES: Final = {
    names.GATEWAY_LATENCY: ("limit", "route"),
    names.QUEUE_LATENCY: ("queue", "cold_start"),
    names.INFERENCE_LATENCY: tuple(_INFERENCE.values()),
    names.NETWORK_LATENCY: ("network",),
    names.UNEXPLAINED_LATENCY: ("unexplained",),
}


def row_spans(row: Outcome, manifest: Manifest, side: str = names.CLIENT) -> list[ReadableSpan]:
    """The spans of one request, root first.

    ``side`` "client": the row of our load generator, rooted in its own span. "gateway": the row of somebody else's
    client; the root is the gateway's span, child of the one that ``traceparent`` named, where it named one.
    ``manifest`` gives the run's id, policy and ``started_at_unix_ns``. Times are unix ns.
    """
    trace = _Trace(row, manifest, side)
    if side == names.CLIENT:
        start, end = trace.client_span()
        if row.gateway_at_ns < 0:  # somebody else's gateway, or never reached: the client knows no more than this
            return trace.spans
        duration = sum(trace.phase_ns(name) for name in _GATEWAY_PHASES)
        # The clocks of two machines disagree: durations are kept, and the gateway's spans are moved to lie in the client's.
        at = max(min(row.gateway_at_ns, end - duration), start)
        trace.gateway_span(at, at + duration, names.CLIENT)
    else:
        at = row.gateway_at_ns
        trace.gateway_span(at, max(row.done_at_ns, at), None)
    trace.inside_gateway(at)
    return trace.spans


class _Trace:
    """Collects the spans of one row; instants are on the run's clock until they become a span."""

    def __init__(self, row: Outcome, manifest: Manifest, side: str) -> None:
        self.row, self.side = row, side
        self.spans: list[ReadableSpan] = []
        self._id = trace_of(row, manifest.get("id", ""))
        self._origin_ns = int(manifest["started_at_unix_ns"])
        self._operation = manifest.get("operation", "chat")
        labels = (manifest.get("id", ""), manifest.get("policy", {}).get("name", ""))
        self._client, self._gateway = _resource(names.SERVICE_CLIENT, *labels), _resource(names.SERVICE_GATEWAY, *labels)

    def phase_ns(self, name: str) -> int:
        duration: int = getattr(self.row, f"{name}_ns")
        return max(duration, 0)

    def client_span(self) -> tuple[int, int]:
        """From the instant the request was due (a late sender's delay is the user's too) to its last byte."""
        row = self.row
        start = row.scheduled_at_ns if row.scheduled_at_ns >= 0 else row.sent_at_ns
        end = max(row.done_at_ns, start)
        attributes = self._root_attributes()
        if row.scheduled_at_ns >= 0 and row.sent_at_ns >= 0:
            attributes[names.SEND_LATENESS.name] = (row.sent_at_ns - row.scheduled_at_ns) / NS_PER_S
        if row.first_chunk_at_ns >= 0 and row.sent_at_ns >= 0:
            attributes[names.TIME_TO_FIRST_CHUNK.name] = (row.first_chunk_at_ns - row.sent_at_ns) / NS_PER_S
        self._add(names.CLIENT, start, end, None, attributes)
        return start, end

    def gateway_span(self, start: int, end: int, parent: str | None) -> None:
        row = self.row
        attributes: dict[str, Any] = {
            names.ATTEMPTS.name: row.attempts,
            **_measured({names.REPLICA.name: row.replica_id, names.DECODE_REPLICA.name: row.decode_replica_id}),
        }
        if parent is None:
            attributes |= self._root_attributes()
        if start != row.gateway_at_ns:
            attributes[names.CLOCK_SHIFT.name] = (start - row.gateway_at_ns) / NS_PER_S
        self._add(names.GATEWAY, start, end, parent, attributes)

    def inside_gateway(self, at: int) -> None:
        """What happened in the gateway from ``at`` on, phase after phase; those that took no time are left out."""
        row = self.row
        if row.limit_ns > 0:
            at = self._add(names.LIMITER, at, at + row.limit_ns, names.GATEWAY)
        if row.queue_ns >= 0 or row.cold_start_ns > 0:  # a request that did not have to wait shows a queue of 0 s
            cold = self.phase_ns("cold_start")
            attributes = {names.QUEUE_REASON.name: QUEUE_REASONS[row.queue_reason]}
            end = self._add(names.QUEUE, at, at + cold + self.phase_ns("queue"), names.GATEWAY, attributes)
            if cold:
                self._add(names.COLD_START, at, at + cold, names.QUEUE)
            at = end
        if row.route_ns > 0:
            at = self._add(names.ROUTE, at, at + row.route_ns, names.GATEWAY)
        if duration := sum(self.phase_ns(phase) for phase in _INFERENCE.values()):
            self._add(names.INFERENCE, at, at + duration, names.GATEWAY)
            for name, phase in _INFERENCE.items():
                if self.phase_ns(phase):
                    at = self._add(name, at, at + self.phase_ns(phase), names.INFERENCE)

    def _root_attributes(self) -> dict[str, Any]:
        row = self.row
        due = row.scheduled_at_ns if row.scheduled_at_ns >= 0 else row.gateway_at_ns
        ttft = {names.TTFT_ATTRIBUTE.name: (row.first_token_at_ns - due) / NS_PER_S} if min(row.first_token_at_ns, due) >= 0 else {}
        latencies = {
            attribute.name: sum(map(self.phase_ns, phases)) / NS_PER_S
            for attribute, phases in _LATENCIES.items()
            if any(getattr(row, f"{phase}_ns") >= 0 for phase in phases)
        }
        tokens = {
            names.INPUT_TOKENS.name: row.prompt_tokens,
            names.OUTPUT_TOKENS.name: row.output_tokens,
            names.CACHED_TOKENS.name: row.cached_tokens,
            names.HTTP_STATUS.name: row.http_status,
        }
        texts = {
            names.REQUEST_MODEL: row.model,
            names.CONVERSATION: row.session_id,
            names.TENANT: row.tenant,
            names.DETAIL: row.detail,
        }
        return {
            names.OPERATION.name: self._operation,
            names.PROVIDER.name: "openai",
            names.REQUEST_ID.name: row.request_id,
            **{attribute.name: text.decode("utf-8", "replace") for attribute, text in texts.items() if text},
            **_measured(tokens),
            **ttft,
            **latencies,
            **({names.LARGEST.name: max(latencies, key=latencies.__getitem__)} if latencies else {}),
            **({names.ERROR_TYPE.name: STATUSES[row.status]} if row.status != OK else {}),
            **({names.TOKENS_LOST.name: row.tokens_lost} if row.tokens_lost else {}),
        }

    def _add(self, name: str, start: int, end: int, parent: str | None, attributes: dict[str, Any] | None = None) -> int:
        """Append a span; returns its end. ``parent`` names a span of this trace, None the root."""
        row, failed = self.row, self.row.status != OK and name in (names.CLIENT, names.GATEWAY)
        is_client = name == names.CLIENT
        shown = f"{self._operation} {row.model.decode('utf-8', 'replace')}".strip() if is_client else name
        first_token = is_client and row.first_token_at_ns >= 0
        self.spans.append(
            ReadableSpan(
                name=shown,
                context=self._context(name),
                parent=self._context(parent) if parent else self._remote_parent(),
                resource=self._client if is_client else self._gateway,
                attributes=attributes,
                events=(self._event(names.FIRST_TOKEN_EVENT, row.first_token_at_ns),) if first_token else (),
                kind={names.CLIENT: SpanKind.CLIENT, names.GATEWAY: SpanKind.SERVER}.get(name, SpanKind.INTERNAL),
                status=Status(StatusCode.ERROR, STATUSES[row.status]) if failed else Status(StatusCode.UNSET),
                start_time=self._origin_ns + start,
                end_time=self._origin_ns + end,
                instrumentation_scope=_SCOPE,
            )
        )
        return end

    def _context(self, name: str) -> SpanContext:
        request_id = None if self.side == names.CLIENT else self.row.request_id
        return SpanContext(self._id, span_id(self._id, name, request_id), is_remote=False, trace_flags=_SAMPLED)

    def _remote_parent(self) -> SpanContext | None:
        parent = self.row.parent_span
        return SpanContext(self._id, parent, is_remote=True, trace_flags=_SAMPLED) if parent else None

    def _event(self, name: str, at: int) -> Event:
        return Event(name, timestamp=self._origin_ns + at)


@lru_cache(maxsize=64)
def _resource(service: str, run_id: str, policy: str) -> Resource:
    return Resource({names.SERVICE_NAME.name: service, names.RUN_ID.name: run_id, names.POLICY.name: policy})


def _measured(values: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value >= 0}

"""Every span, attribute and metric name, with its unit and what it says: instruments and dashboards read this table.

Plain data: this file imports nothing of the house, so that a dashboard can be built without a single instrument.
GenAI names follow the OpenTelemetry conventions (status Development; their Python constants are deprecated, so the
strings live here and nowhere else).
"""

from __future__ import annotations

from typing import Final, NamedTuple

# --- spans -----------------------------------------------------------------------------------------------------------

CLIENT: Final = "client"
GATEWAY: Final = "gateway"
LIMITER: Final = "limiter"
QUEUE: Final = "queue"
COLD_START: Final = "cold_start"
ROUTE: Final = "route"
INFERENCE: Final = "inference"
RETRY: Final = "retry"
ADAPTER_LOAD: Final = "adapter_load"
KV_TRANSFER: Final = "kv_transfer"
PREFILL: Final = "prefill"
DECODE: Final = "decode"

# Also the names that span ids are derived from. The client's span is shown as "{operation} {model}", as GenAI asks.
SPANS: Final = {
    CLIENT: "One request as the client saw it, from the instant it was due to its last byte",
    GATEWAY: "The request inside the gateway, from its last byte read to the last byte written",
    LIMITER: "Waiting for a rate limiter's answer",
    QUEUE: "Waiting in the gateway's queue",
    COLD_START: "The part of the wait during which no replica was ready",
    ROUTE: "The gateway's own work until the request left it",
    INFERENCE: "At the replica, failed attempts included; parent of the engine's own spans",
    RETRY: "From a failed dispatch to the next one",
    ADAPTER_LOAD: "Loading an adapter at the replica",
    KV_TRANSFER: "Moving the KV cache from the prefill to the decode replica",
    PREFILL: "Dispatch to first token",
    DECODE: "First token to last byte",
}
SERVICE_CLIENT: Final = "tidegauge-client"
SERVICE_GATEWAY: Final = "tidegauge-gateway"
FIRST_TOKEN_EVENT: Final = "first_token"  # noqa: S105


class Attribute(NamedTuple):
    name: str
    unit: str
    description: str


OPERATION: Final = Attribute("gen_ai.operation.name", "", "chat or text_completion")
PROVIDER: Final = Attribute("gen_ai.provider.name", "", "The protocol spoken: openai")
REQUEST_MODEL: Final = Attribute("gen_ai.request.model", "", "Model asked for")
TIME_TO_FIRST_CHUNK: Final = Attribute("gen_ai.response.time_to_first_chunk", "s", "Actual send to first chunk")
INPUT_TOKENS: Final = Attribute("gen_ai.usage.input_tokens", "{token}", "Prompt tokens that the engine reported")
OUTPUT_TOKENS: Final = Attribute("gen_ai.usage.output_tokens", "{token}", "Output tokens that the engine reported")
CACHED_TOKENS: Final = Attribute("gen_ai.usage.cache_read.input_tokens", "{token}", "Prompt tokens from the prefix cache")
CONVERSATION: Final = Attribute("gen_ai.conversation.id", "", "Session of the request")
ERROR_TYPE: Final = Attribute("error.type", "", "How it ended, where not ok: a word of records.STATUSES")
HTTP_STATUS: Final = Attribute("http.response.status_code", "", "HTTP status of the answer")

GATEWAY_LATENCY: Final = Attribute("gateway_latency", "s", "Rate limiter and the gateway's own work")
QUEUE_LATENCY: Final = Attribute("queue_latency", "s", "Waiting in the gateway's queue, cold starts included")
INFERENCE_LATENCY: Final = Attribute("inference_latency", "s", "At the replica, failed attempts included")
NETWORK_LATENCY: Final = Attribute("network_latency", "s", "The client's time outside the gateway")
UNEXPLAINED_LATENCY: Final = Attribute("unexplained_latency", "s", "The remainder; a late sender shows up here")
LARGEST: Final = Attribute("tidegauge.largest_latency", "", "Which of the latencies above is the largest")
TTFT_ATTRIBUTE: Final = Attribute("tidegauge.ttft", "s", "Due instant to first non-empty token")
SEND_LATENESS: Final = Attribute("tidegauge.send_lateness", "s", "Due instant to actual send")
RUN_ID: Final = Attribute("tidegauge.run", "", "Run id")
POLICY: Final = Attribute("tidegauge.policy", "", "Policy under test")
REQUEST_ID: Final = Attribute("tidegauge.request", "", "Number of the request in the run")
TENANT: Final = Attribute("tidegauge.tenant", "", "Tenant of the request")
REPLICA: Final = Attribute("tidegauge.replica", "", "Replica that answered")
DECODE_REPLICA: Final = Attribute("tidegauge.decode_replica", "", "Replica that decoded, where it is another")
ATTEMPTS: Final = Attribute("tidegauge.attempts", "{attempt}", "Dispatches, the first one included")
TOKENS_LOST: Final = Attribute("tidegauge.tokens_lost", "{token}", "Output tokens generated and thrown away")
QUEUE_REASON: Final = Attribute("tidegauge.queue_reason", "", "Why it waited: no_slot cold_start held")
DETAIL: Final = Attribute("tidegauge.detail", "", "What went wrong, in words")
CLOCK_SHIFT: Final = Attribute("tidegauge.clock_shift", "s", "How far the gateway's spans were moved to lie in the client's")
SERVICE_NAME: Final = Attribute("service.name", "", "tidegauge-client or tidegauge-gateway")

ATTRIBUTES: Final = (
    OPERATION, PROVIDER, REQUEST_MODEL, TIME_TO_FIRST_CHUNK, INPUT_TOKENS, OUTPUT_TOKENS,
    CACHED_TOKENS, CONVERSATION, ERROR_TYPE, HTTP_STATUS, GATEWAY_LATENCY, QUEUE_LATENCY, INFERENCE_LATENCY,
    NETWORK_LATENCY, UNEXPLAINED_LATENCY, LARGEST, TTFT_ATTRIBUTE, SEND_LATENESS, RUN_ID, POLICY, REQUEST_ID, TENANT,
    REPLICA, DECODE_REPLICA, ATTEMPTS, TOKENS_LOST, QUEUE_REASON, DETAIL, CLOCK_SHIFT, SERVICE_NAME,
)  # fmt: skip

# --- metrics ---------------------------------------------------------------------------------------------------------

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

# Every series carries these beside its own labels: client and gateway show the same metric side by side.
COMMON_LABELS: Final = ("side", "policy", "run")
SIDES: Final = ("client", "gateway")


class Metric(NamedTuple):
    """A Prometheus metric; ``name`` as it is queried, so counters end in ``_total``."""

    name: str
    kind: str
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Twelve bounds a decade, at most 25 % apart, all of them numbers that a person would set as a target.
_DECADE: Final = ("1", "1.25", "1.5", "1.8", "2.2", "2.7", "3.3", "4", "5", "6", "7.5", "9")


def _fine(least_exponent: int, last: float) -> tuple[float, ...]:
    """Bounds from 10**least_exponent up to and including ``last``."""
    bounds = (float(f"{step}e{exponent}") for exponent in range(least_exponent, 3) for step in _DECADE)
    return (*(bound for bound in bounds if bound < last), last)


FINE_LATENCY_BUCKETS: Final = _fine(-3, 600.0)  # 1 ms (an idle H100) to 10 min (a queue behind a burst)
FINE_TPOT_BUCKETS: Final = _fine(-3, 2.5)
GENAI_DURATION_BUCKETS: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
GENAI_TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
GENAI_TPOT_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
GENAI_TOKEN_BUCKETS: Final = tuple(float(4**power) for power in range(14))  # 1 .. 67108864

REQUESTS: Final = Metric("tidegauge_requests_total", COUNTER, "requests", "Requests ended, by status", ("model", "status"))
TOKENS: Final = Metric(
    "tidegauge_tokens_total", COUNTER, "tokens", "Tokens by type: input, output, cached, lost", ("model", "type")
)
SLO_TOTAL: Final = Metric("tidegauge_slo_requests_total", COUNTER, "requests", "Requests ended while a target is set", ("model",))
SLO_GOOD: Final = Metric(
    "tidegauge_slo_good_requests_total",
    COUNTER,
    "requests",
    "Requests that ended ok within every term of the target",
    ("model",),
)
TTFT: Final = Metric(
    "tidegauge_ttft_seconds",
    HISTOGRAM,
    "s",
    "Time to first token, from the instant the request was due",
    ("model",),
    FINE_LATENCY_BUCKETS,
)
TPOT: Final = Metric(
    "tidegauge_tpot_seconds",
    HISTOGRAM,
    "s",
    "Time per output token after the first chunk",
    ("model",),
    FINE_TPOT_BUCKETS,
)
E2E: Final = Metric(
    "tidegauge_e2e_seconds",
    HISTOGRAM,
    "s",
    "End-to-end latency, from the instant the request was due",
    ("model",),
    FINE_LATENCY_BUCKETS,
)
QUEUE_WAIT: Final = Metric(
    "tidegauge_queue_wait_seconds",
    HISTOGRAM,
    "s",
    "Wait in the gateway's queue, cold starts included",
    ("model",),
    FINE_LATENCY_BUCKETS,
)
PHASE_SECONDS: Final = Metric(
    "tidegauge_phase_seconds_total", COUNTER, "s", "Where the time of requests went, by phase", ("phase",)
)
QUEUED: Final = Metric("tidegauge_queued_requests", GAUGE, "requests", "Requests waiting in the gateway's queue")
RUNNING: Final = Metric("tidegauge_running_requests", GAUGE, "requests", "Requests dispatched to a replica and not ended")
ARRIVED: Final = Metric("tidegauge_arrived_requests_total", COUNTER, "requests", "Requests that have reached the gateway")
REPLICAS: Final = Metric("tidegauge_replicas", GAUGE, "replicas", "Replicas by state: wanted starting ready draining", ("state",))
USD_PER_HOUR: Final = Metric("tidegauge_cost_usd_per_hour", GAUGE, "USD/h", "Price of all replicas requested and not stopped")
COST: Final = Metric("tidegauge_cost_usd_total", COUNTER, "USD", "What the fleet has cost since the run began")
TRACES: Final = Metric(
    "tidegauge_traces_total",
    COUNTER,
    "traces",
    "Traces worth keeping, by fate: kept over_rate queue_full failed",
    ("result",),
)
SPANS_EXPORTED: Final = Metric("tidegauge_spans_total", COUNTER, "spans", "Spans made, by fate: kept dropped", ("result",))
RECORDS: Final = Metric("tidegauge_records_total", COUNTER, "records", "Records read from the spools: outcomes states", ("kind",))
ROWS: Final = Metric("tidegauge_rows_total", COUNTER, "rows", "Rows written as Parquet")

GENAI_LABELS: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
CLIENT_DURATION: Final = Metric(
    "gen_ai_client_operation_duration_seconds",
    HISTOGRAM,
    "s",
    "GenAI operation duration",
    (*GENAI_LABELS, "error_type"),
    GENAI_DURATION_BUCKETS,
)
CLIENT_FIRST_CHUNK: Final = Metric(
    "gen_ai_client_operation_time_to_first_chunk_seconds",
    HISTOGRAM,
    "s",
    "Actual send to first chunk",
    GENAI_LABELS,
    GENAI_DURATION_BUCKETS,
)
CLIENT_TOKENS: Final = Metric(
    "gen_ai_client_token_usage",
    HISTOGRAM,
    "tokens",
    "Tokens used, by type",
    (*GENAI_LABELS, "gen_ai_token_type"),
    GENAI_TOKEN_BUCKETS,
)
SERVER_DURATION: Final = Metric(
    "gen_ai_server_request_duration_seconds",
    HISTOGRAM,
    "s",
    "Generative AI server request duration",
    (*GENAI_LABELS, "error_type"),
    GENAI_DURATION_BUCKETS,
)
SERVER_TTFT: Final = Metric(
    "gen_ai_server_time_to_first_token_seconds",
    HISTOGRAM,
    "s",
    "Time to generate first token",
    GENAI_LABELS,
    GENAI_TTFT_BUCKETS,
)
SERVER_TPOT: Final = Metric(
    "gen_ai_server_time_per_output_token_seconds",
    HISTOGRAM,
    "s",
    "Time per output token after the first one",
    GENAI_LABELS,
    GENAI_TPOT_BUCKETS,
)

METRICS: Final = (
    REQUESTS, TOKENS, SLO_TOTAL, SLO_GOOD, TTFT, TPOT, E2E, QUEUE_WAIT, PHASE_SECONDS, QUEUED, RUNNING, ARRIVED,
    REPLICAS, USD_PER_HOUR, COST, TRACES, SPANS_EXPORTED, RECORDS, ROWS, CLIENT_DURATION, CLIENT_FIRST_CHUNK,
    CLIENT_TOKENS, SERVER_DURATION, SERVER_TTFT, SERVER_TPOT,
)  # fmt: skip

"""Fleet: what the fleet is doing now. Traffic, latency, queue, replicas, cost."""

from __future__ import annotations

from dashboards.panels import (
    SHARE,
    Dashboard,
    Row,
    board,
    last,
    lines,
    number,
    quantiles,
    rate,
    rate_once,
    share,
    unit_of,
    variable,
)
from tracing import names

_QUANTILES = (0.5, 0.95, 0.99)
_LAST_BUCKET = "A line flat at the last bucket's bound means: that or more."


def build() -> Dashboard:
    """The dashboard, as the SDK's model."""
    labels = {"run": "Run", "policy": "Policy", "model": "Model"}
    variables = [variable(label, shown, names.REQUESTS) for label, shown in labels.items()]
    rows = [(4, _now()), (9, _traffic()), (9, _latency()), (9, _queue()), (9, _replicas()), (8, _work())]
    return board("tidegauge-fleet", "Tidegauge / Fleet", str(__doc__), variables, rows)


def _now() -> Row:
    good = share(names.SLO_GOOD, names.SLO_TOTAL, "{{side}}")
    return [
        number("TTFT p95", "Normal is below the target of the run.", names.TTFT, quantiles(names.TTFT, 0.95)[0]),
        number("Target met", "Share of all that ended. Normal is 99 % and more.", names.SLO_GOOD, good, unit=SHARE),
        number("Queued", "Normal is 0 outside bursts.", names.QUEUED, last(names.QUEUED)),
        number("Replicas", "Ready ones serve; fewer than wanted while some start.", names.REPLICAS, last(names.REPLICAS, "state")),
        number("Cost now", "Per hour, started to stopped.", names.USD_PER_HOUR, last(names.USD_PER_HOUR)),
        number("Cost so far", "Grows by the cost per hour.", names.COST, last(names.COST)),
    ]


def _traffic() -> Row:
    by_status = [rate(names.REQUESTS, "side, status", "{{side}} {{status}}")]
    normal = "Normal is ok alone; limited and shed show a fleet at its bounds."
    little = (
        "A phase's height is how many requests are in it (Little's law). "
        "Normal is decode above all others; queue and cold_start above it mean too few replicas."
    )
    in_phase, unit = [rate_once(names.PHASE_SECONDS, "phase")], unit_of(names.PHASE_SECONDS, per_second=True)
    return [
        lines("Requests by status", normal, names.REQUESTS, by_status, unit=unit_of(names.REQUESTS, per_second=True)),
        lines("Where the time goes", little, names.PHASE_SECONDS, in_phase, unit=unit, stacked=True),
    ]


def _latency() -> Row:
    sides = f"The client's counts from the due instant, the gateway's from arrival. {_LAST_BUCKET}"
    steady = f"Steady while batches are not full. {_LAST_BUCKET}"
    return [
        lines("Time to first token", sides, names.TTFT, quantiles(names.TTFT, *_QUANTILES)),
        lines("Time per output token", steady, names.TPOT, quantiles(names.TPOT, *_QUANTILES)),
    ]


def _queue() -> Row:
    depth = [last(names.QUEUED, legend="queued"), last(names.RUNNING, legend="running")]
    idle = f"Normal is 0 outside bursts. {_LAST_BUCKET}"
    return [
        lines("Queued and running", "A queue that grows while running is flat: every slot is taken.", names.QUEUED, depth),
        lines("Wait in the queue", idle, names.QUEUE_WAIT, quantiles(names.QUEUE_WAIT, *_QUANTILES)),
    ]


def _replicas() -> Row:
    falls = "Follows wanted at once, and falls when a drained replica stops."
    return [
        lines("Replicas by state", "Ready follows wanted after one cold start.", names.REPLICAS, [last(names.REPLICAS, "state")]),
        lines("Cost per hour", falls, names.USD_PER_HOUR, [last(names.USD_PER_HOUR, "policy")]),
    ]


def _work() -> Row:
    dropped = "Normal is kept alone; anything else is telemetry that was dropped."
    return [
        lines(
            "Tokens per second",
            "Output is what users see; lost is work thrown away.",
            names.TOKENS,
            [rate_once(names.TOKENS, "type")],
        ),
        lines("Traces worth keeping", dropped, names.TRACES, [rate(names.TRACES, "result")]),
    ]

"""vLLM's metrics (names, labels and buckets of its 0.32) for an engine that is not vLLM, rendered by prometheus_client.

Names are vLLM's own contract, so they live here and not in tracing/names.py. Left out: ``iteration_tokens_total``, since
the engine model does not tell how its tokens fall on steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from replay.engine import Load

_TTFT_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
)  # fmt: skip
_ITL_S: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S: Final = (  # starts at 0.3 s, as vLLM's does: shorter queueing is invisible in it
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_LATENESS_S: Final = tuple(step * 10.0**power for power in range(-5, 0) for step in (1, 1.5, 2, 3, 5, 7))  # 10 us to 0.7 s


def _one_two_five(last: int) -> tuple[float, ...]:
    """1, 2, 5, 10, .. up to ``last``: vLLM's buckets for token counts."""
    bounds = (float(mantissa * 10**exponent) for exponent in range(len(str(last))) for mantissa in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= last)


class Histogram:
    """Counts by bucket. ``observe`` takes many equal values at once: all streams of a step share their gap."""

    def __init__(self, name: str, help_text: str, bounds: tuple[float, ...]) -> None:
        self.name, self.help_text, self.bounds = name, help_text, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def family(self, names: tuple[str, ...], labels: tuple[str, ...]) -> HistogramMetricFamily:
        """As Prometheus has it: cumulative counts, the last bucket +Inf."""
        reached, buckets = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            reached += count
            buckets.append((bound, reached))
        family = HistogramMetricFamily(self.name, self.help_text, labels=names)
        family.add_metric(labels, buckets, self.total)
        return family


class Phases(NamedTuple):
    """Where a request's time went inside the engine, in seconds."""

    queue_s: float
    prefill_s: float  # scheduled to first token
    decode_s: float  # first to last token


def per_request_metrics(phases: Phases, output_tokens: int) -> bytes:
    """vLLM's ``metrics`` object of an answer (JSON). Its time to first token leaves the queue out."""
    inference_s = phases.prefill_s + phases.decode_s
    return msgspec.json.encode(
        {
            "queue_time_ms": round(phases.queue_s * 1e3, 3),
            "time_to_first_token_ms": round(phases.prefill_s * 1e3, 3),
            "generation_time_ms": round(phases.decode_s * 1e3, 3),
            "mean_itl_ms": round(phases.decode_s * 1e3 / (output_tokens - 1), 3) if output_tokens > 1 else None,
            "tokens_per_second": round(output_tokens / inference_s, 2),
        }
    )


class VllmMetrics:
    """What ``GET /metrics`` says. Seconds are the modelled engine's, not this process's: its lateness is a metric beside them."""

    def __init__(self, model: str, max_model_len: int) -> None:
        self._names, self._labels = ("model_name", "engine"), (model, "0")
        tokens = _one_two_five(max_model_len)
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _TTFT_S)
        self.itl = Histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request", _ITL_S)
        self.tpot = Histogram("vllm:request_time_per_output_token_seconds", "Mean gap of a request", _ITL_S)
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", _REQUEST_S)
        self.queue = Histogram("vllm:request_queue_time_seconds", "In the engine's queue", _REQUEST_S)
        self.prefill = Histogram("vllm:request_prefill_time_seconds", "Scheduled to first token", _REQUEST_S)
        self.decode = Histogram("vllm:request_decode_time_seconds", "First to last token", _REQUEST_S)
        self.inference = Histogram("vllm:request_inference_time_seconds", "Scheduled to last token", _REQUEST_S)
        self.prompt = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", tokens)
        self.generation = Histogram("vllm:request_generation_tokens", "Tokens generated for a request", tokens)
        self.lateness = Histogram(
            "tidegauge_stand_in_step_lateness_seconds", "How late this process woke for a step: the host is too busy", _LATENESS_S
        )
        self.prompt_tokens = self.generation_tokens = 0
        self.success = {"stop": 0, "length": 0, "abort": 0}
        self.load = Load(0, 0, 0.0)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # a collector by its one method, collect()

    def finished(self, reason: str, prompt_tokens: int, output_tokens: int, phases: Phases, e2e_s: float) -> None:
        """A request has ended; ``e2e_s`` runs from its arrival, so it holds the API front end beside the phases."""
        self.success[reason] += 1
        self.ttft.observe(e2e_s - phases.decode_s)
        self.e2e.observe(e2e_s)
        self.queue.observe(phases.queue_s)
        self.prefill.observe(phases.prefill_s)
        self.decode.observe(phases.decode_s)
        self.inference.observe(phases.prefill_s + phases.decode_s)
        self.prompt.observe(prompt_tokens)
        self.generation.observe(output_tokens)
        if output_tokens > 1:
            self.tpot.observe(phases.decode_s / (output_tokens - 1))

    def render(self, load: Load) -> bytes:
        """The text format, with the engine's load of this moment."""
        self.load = load
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_running": ("Requests in the running batch", self.load.running),
            "vllm:num_requests_waiting": ("Requests in the engine's queue", self.load.waiting),
            "vllm:kv_cache_usage_perc": ("Share of KV blocks in use, 1 is all", self.load.kv_usage),
        }
        for name, (help_text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, help_text, labels=self._names)
            gauge.add_metric(self._labels, value)
            yield gauge
        counters = {  # the engine model neither caches prefixes nor preempts: these three are true zeros
            "vllm:prefix_cache_queries": 0, "vllm:prefix_cache_hits": 0, "vllm:num_preemptions": 0, "vllm:prompt_tokens_cached": 0,
            "vllm:prompt_tokens": self.prompt_tokens, "vllm:generation_tokens": self.generation_tokens,
        }  # fmt: skip
        for name, value in counters.items():
            counter = CounterMetricFamily(name, name.removeprefix("vllm:").replace("_", " "), labels=self._names)
            counter.add_metric(self._labels, value)
            yield counter
        success = CounterMetricFamily("vllm:request_success", "Requests ended, by reason", labels=(*self._names, "finished_reason"))
        for reason, count in self.success.items():
            success.add_metric((*self._labels, reason), count)
        yield success
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                yield histogram.family(self._names, self._labels)

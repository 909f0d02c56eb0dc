"""Prometheus metrics out of records, in bulk.

A collector of our own on numpy counts: prometheus_client's Histogram walks its buckets under a lock for every observation
(70 buckets: some 10 us), which six histograms at 10,000 records a second would turn into half a core.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from replay.records import NS_PER_S, OK, PHASES, STATUSES
from replay.runs import Manifest
from tracing import names
from tracing.batch import Array, Batch, elapsed_s
from tracing.export import KeptTrace

MODELS_MOST: Final = 20  # distinct values of the label model; a client may send any text as a model, and the rest is "other"
_NS_PER_HOUR: Final = 3600 * NS_PER_S


class _Values:
    """A counter or a gauge: one number for each set of label values."""

    def __init__(self, metric: names.Metric) -> None:
        self.metric = metric
        self.values: dict[tuple[str, ...], float] = {}

    def add(self, amount: float, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0) + float(amount)

    def set(self, value: float, *labels: str) -> None:
        self.values[labels] = float(value)

    def family(self, common: dict[str, str]) -> Family:
        kind = CounterMetricFamily if self.metric.kind == names.COUNTER else GaugeMetricFamily
        family = kind(self.metric.name, self.metric.description, labels=[*self.metric.labels, *common])
        for labels, value in self.values.items():
            family.add_metric([*labels, *common.values()], value)
        return family


class _Histogram:
    """Counts by bucket for each set of label values, with one exemplar a bucket: the latest kept trace that fell into it."""

    def __init__(self, metric: names.Metric) -> None:
        self.metric = metric
        self._bounds = np.array(metric.buckets)
        self._counts: dict[tuple[str, ...], Array] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        self._exemplars: dict[tuple[tuple[str, ...], int], Exemplar] = {}

    def observe(self, values: Array, *labels: str) -> None:
        """Add a column of values; NaN is no observation."""
        values = values[~np.isnan(values)]
        if not len(values):
            return
        # A bucket holds what is at most its bound, hence "left".
        added = np.bincount(np.searchsorted(self._bounds, values, side="left"), minlength=len(self._bounds) + 1)
        self._counts[labels] = self._counts.get(labels, 0) + added
        self._sums[labels] = self._sums.get(labels, 0.0) + float(values.sum())

    def note_kept(self, value: float, trace_id: int, at_unix_s: float, *labels: str) -> None:
        if not np.isnan(value):
            bucket = int(np.searchsorted(self._bounds, value, side="left"))
            self._exemplars[labels, bucket] = Exemplar({"trace_id": f"{trace_id:032x}"}, value, at_unix_s)

    def family(self, common: dict[str, str]) -> Family:
        family = HistogramMetricFamily(self.metric.name, self.metric.description, labels=[*self.metric.labels, *common])
        bounds = [floatToGoString(bound) for bound in (*self.metric.buckets, float("inf"))]  # type: ignore[no-untyped-call]
        for labels, counts in self._counts.items():
            buckets: list[Any] = [
                (bound, float(count), self._exemplars.get((labels, index)))
                for index, (bound, count) in enumerate(zip(bounds, np.cumsum(counts), strict=True))
            ]
            family.add_metric([*labels, *common.values()], buckets, self._sums[labels])
        return family


class Meters(Collector):
    """Everything a scrape of one recorder shows. Fed by the recorder's loop, rendered by the scrape's thread."""

    def __init__(self, manifest: Manifest, side: str) -> None:
        self._common = dict(
            zip(names.COMMON_LABELS, (side, manifest.get("policy", {}).get("name", ""), manifest.get("id", "")), strict=True)
        )
        self._side = side
        self._operation = manifest.get("operation", "chat")
        self._slo: dict[str, float] = manifest.get("slo") or {}
        self._models: set[str] = set()
        self._priced: tuple[int, float] | None = None  # at_ns and usd_per_hour of the last state
        self._values = {metric: _Values(metric) for metric in names.METRICS if metric.kind != names.HISTOGRAM}
        self._histograms = {metric: _Histogram(metric) for metric in names.METRICS if metric.kind == names.HISTOGRAM}
        self._lock = threading.Lock()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def add_outcomes(self, batch: Batch) -> None:
        """Count a batch of requests that have ended."""
        models, which = np.unique(batch.records["model"], return_inverse=True)
        with self._lock:
            self._values[names.RECORDS].add(len(batch.records), "outcomes")
            for index, model in enumerate(models.tolist()):
                self._add_model(batch.where(which == index), self._model(model))
            for phase in PHASES:
                spent = batch.records[f"{phase}_ns"]
                self._values[names.PHASE_SECONDS].add(float(spent[spent > 0].sum()) / NS_PER_S, phase)

    def add_states(self, states: Array) -> None:
        """Bring the gauges to the last of these states, and add up the cost between them."""
        if not len(states):
            return
        with self._lock:
            self._values[names.RECORDS].add(len(states), "states")
            last = states[-1]
            if not np.isnan(last["usd_per_hour"]):  # a fleet without a price has no cost, rather than one of 0
                self._add_cost(states)
            self._values[names.QUEUED].set(last["queued"])
            self._values[names.RUNNING].set(last["running"])
            self._values[names.ARRIVED].set(last["arrived"])
            for state in ("wanted", "starting", "ready", "draining"):
                self._values[names.REPLICAS].set(last[state], state)

    def _add_cost(self, states: Array) -> None:
        before = self._priced or (int(states["at_ns"][0]), 0.0)
        at_ns = np.concatenate([[before[0]], states["at_ns"]])
        usd_per_hour = np.concatenate([[before[1]], states["usd_per_hour"]])
        self._values[names.COST].add(float(np.dot(np.diff(at_ns), usd_per_hour[:-1])) / _NS_PER_HOUR)
        self._priced = (int(at_ns[-1]), float(usd_per_hour[-1]))
        self._values[names.USD_PER_HOUR].set(usd_per_hour[-1])

    def note_kept(self, traces: Iterable[KeptTrace]) -> None:
        """Traces that have arrived where traces are kept: exemplars may name them."""
        with self._lock:
            for trace in traces:
                model = self._model(trace.model)
                for metric, value in ((names.TTFT, trace.ttft_s), (names.TPOT, trace.tpot_s), (names.E2E, trace.e2e_s)):
                    self._histograms[metric].note_kept(value, trace.trace_id, trace.at_unix_s, model)

    def set_total(self, metric: names.Metric, total: float, *labels: str) -> None:
        """Set a counter that is kept elsewhere (rows written, traces and spans by fate)."""
        with self._lock:
            self._values[metric].set(total, *labels)

    def collect(self) -> Iterator[Family]:
        with self._lock:
            instruments: list[_Values | _Histogram] = [*self._values.values(), *self._histograms.values()]
            families = [instrument.family(self._common) for instrument in instruments]
        yield from (family for family in families if family.samples)

    def _add_model(self, batch: Batch, model: str) -> None:
        records, values, histograms = batch.records, self._values, self._histograms
        for status, count in zip(STATUSES, np.bincount(records["status"], minlength=len(STATUSES)), strict=True):
            values[names.REQUESTS].add(int(count), model, status)
        for kind, column in (("input", "prompt"), ("output", "output"), ("cached", "cached")):
            tokens = records[f"{column}_tokens"]
            values[names.TOKENS].add(float(tokens[tokens > 0].sum()), model, kind)
        values[names.TOKENS].add(float(records["tokens_lost"].sum()), model, "lost")
        if self._slo:
            values[names.SLO_TOTAL].add(len(records), model)
            values[names.SLO_GOOD].add(int(np.count_nonzero(self._good(batch))), model)
        histograms[names.TTFT].observe(batch.ttft_s, model)
        histograms[names.TPOT].observe(batch.tpot_s, model)
        histograms[names.E2E].observe(batch.e2e_s, model)
        waited = np.where(records["queue_ns"] >= 0, records["queue_ns"] + np.maximum(records["cold_start_ns"], 0), np.nan)
        histograms[names.QUEUE_WAIT].observe(waited / NS_PER_S, model)
        self._add_genai(batch, (self._operation, "openai", model))

    def _add_genai(self, batch: Batch, labels: tuple[str, ...]) -> None:
        """The conventions' own names, whose clock starts at the actual send, or at the server."""
        records, histograms = batch.records, self._histograms
        if self._side == names.CLIENT:
            began, duration = records["sent_at_ns"], names.CLIENT_DURATION
            histograms[names.CLIENT_FIRST_CHUNK].observe(elapsed_s(began, records["first_chunk_at_ns"]), *labels)
            for kind, column in (("input", "prompt_tokens"), ("output", "output_tokens")):
                tokens = np.where(records[column] >= 0, records[column].astype(float), np.nan)
                histograms[names.CLIENT_TOKENS].observe(tokens, *labels, kind)
        else:
            began, duration = records["gateway_at_ns"], names.SERVER_DURATION
            histograms[names.SERVER_TTFT].observe(elapsed_s(began, records["first_token_at_ns"]), *labels)
            histograms[names.SERVER_TPOT].observe(batch.tpot_s, *labels)
        took = elapsed_s(began, records["done_at_ns"])
        for code, status in enumerate(STATUSES):
            histograms[duration].observe(took[records["status"] == code], *labels, "" if code == OK else status)

    def _good(self, batch: Batch) -> Any:
        """Ended ok and met every term that is set: an answer too short for a TPOT met it, one with uncounted tokens not."""
        records = batch.records
        too_short = (records["output_tokens"] >= 0) & (records["output_tokens"] <= np.maximum(records["first_chunk_tokens"], 1))
        tpot_s = np.where(too_short, 0.0, batch.tpot_s)
        terms: dict[str, Array] = {"ttft_s": batch.ttft_s, "tpot_s": tpot_s, "e2e_s": batch.e2e_s}
        good = records["status"] == OK
        for term, most in self._slo.items():
            good = good & (terms[term] <= most)
        return good

    def _model(self, model: bytes | str) -> str:
        """The label for a model: its name, or "other" once there are too many."""
        name = model.decode("utf-8", "replace") if isinstance(model, bytes) else model
        if len(self._models) < MODELS_MOST:
            self._models.add(name)
        return name if name in self._models else "other"

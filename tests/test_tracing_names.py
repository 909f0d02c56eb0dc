"""The tables of names: complete, unique, and with the bucket bounds that bursts need."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tracing import names


def test_names_are_unique_described_and_prometheus_accepts_them() -> None:
    for table in (names.METRICS, names.ATTRIBUTES):
        spelled = [entry.name for entry in table]
        assert len(set(spelled)) == len(spelled)
        assert all(entry.description for entry in table)
    for metric in names.METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.unit, f"{metric.name} has no unit"
        assert metric.name.endswith("_total") == (metric.kind == names.COUNTER)
        assert bool(metric.buckets) == (metric.kind == names.HISTOGRAM)
        assert not set(metric.labels) & set(names.COMMON_LABELS)


def test_every_constant_of_the_file_is_in_a_table() -> None:
    constants = vars(names).values()
    assert {c for c in constants if isinstance(c, names.Metric)} == set(names.METRICS)
    assert {c for c in constants if isinstance(c, names.Attribute)} == set(names.ATTRIBUTES)


@pytest.mark.parametrize(("metric", "first", "last"), [(names.TTFT, 0.001, 600), (names.TPOT, 0.001, 2.5), (names.E2E, 0.001, 600)])
def test_own_histograms_are_fine_from_an_idle_gpu_to_a_queue_of_minutes(metric: names.Metric, first: float, last: float) -> None:
    bounds = metric.buckets
    assert (bounds[0], bounds[-1]) == (first, last)
    assert all(lower < upper <= lower * 1.25 + 1e-12 for lower, upper in pairwise(bounds))


def test_the_table_imports_nothing_of_the_house() -> None:
    tree = ast.parse(Path(names.__file__).read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imported == ["__future__", "typing"]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]

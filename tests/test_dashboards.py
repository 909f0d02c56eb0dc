"""Dashboards: current, readable by the SDK's own types, laid out without overlap, and asking only for what is emitted."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from typer.testing import CliRunner

from dashboards.build import BOARDS, FOLDER, outdated, render, write
from dashboards.panels import Dashboard
from stack.cli import app
from stack.cli import dashboards as _registers_its_command  # noqa: F401
from tracing import names

register_default_plugins()
BOARD = pytest.mark.parametrize("name", list(BOARDS))


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(render(name))["panels"]
    return found


def expressions(name: str) -> list[str]:
    return [target["expr"] for panel in panels(name) for target in panel["targets"]]


def test_the_committed_files_are_current() -> None:
    assert not outdated(), "run: tidegauge dashboards build"
    assert {file.stem for file in FOLDER.glob("*.json")} == set(BOARDS)


@BOARD
def test_the_sdk_reads_its_own_dashboard_back_without_a_difference(name: str) -> None:
    decoded = Dashboard.from_json(json.loads(render(name)))
    assert json.loads(JSONEncoder().encode(decoded)) == json.loads(render(name))
    assert decoded.uid
    assert decoded.schema_version == 42


@BOARD
def test_every_panel_is_numbered_titled_described_and_measured_in_a_unit(name: str) -> None:
    ids = [panel["id"] for panel in panels(name)]
    assert ids == sorted(set(ids))
    assert ids[0] > 0
    for panel in panels(name):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["showLegend"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)


@BOARD
def test_panels_lie_on_the_grid_and_do_not_overlap(name: str) -> None:
    places = [panel["gridPos"] for panel in panels(name)]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        assert place["h"] > 0
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


@BOARD
def test_every_variable_is_used_and_every_use_is_a_variable(name: str) -> None:
    variables = {variable["name"] for variable in json.loads(render(name))["templating"]["list"]}
    used = {word for expression in expressions(name) for word in re.findall(r"\$(\w+)", expression)} - {"__rate_interval"}
    assert used == variables


@BOARD
def test_queries_ask_only_for_metrics_and_labels_that_are_emitted(name: str) -> None:
    metrics = {metric.name: metric for metric in names.METRICS}
    for expression in expressions(name):
        asked = re.findall(r"([a-z_]+)\{([^}]*)\}", expression)
        assert asked, expression
        for series, filters in asked:
            metric = metrics[series.removesuffix("_bucket") if series.endswith("_bucket") else series]
            labels = {*names.COMMON_LABELS, *metric.labels, "le"}
            assert set(re.findall(r"(\w+)=~", filters)) <= labels, expression
            grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
            assert grouped <= labels, expression


@BOARD
def test_counters_are_rated_and_quantiles_are_of_summed_buckets(name: str) -> None:
    metrics = {metric.name: metric for metric in names.METRICS}
    summed = r"histogram_quantile\(0\.\d+, sum by \(le, side\) \(rate\(.*\[\$__rate_interval\]\)\)\)"
    for panel in panels(name):
        for expression in (target["expr"] for target in panel["targets"]):
            if "_bucket" in expression:
                assert re.fullmatch(summed, expression)
            elif any(metrics[series].kind == names.GAUGE for series in re.findall(r"([a-z_]+)\{", expression)):
                assert "rate(" not in expression
            elif panel["type"] == "timeseries":
                assert "rate(" in expression


def test_build_writes_what_grafana_loads_and_check_finds_what_is_old(tmp_path: Path) -> None:
    runner, folder = CliRunner(), tmp_path / "dashboards"
    missing = runner.invoke(app, ["dashboards", "build", "--check", "--out", str(folder)])
    assert missing.exit_code == 1
    assert "fleet.json is not current" in missing.output
    assert runner.invoke(app, ["dashboards", "build", "--out", str(folder)]).exit_code == 0
    assert runner.invoke(app, ["dashboards", "build", "--check", "--out", str(folder)]).exit_code == 0
    assert [file.read_text() for file in write(tmp_path / "again")] == [file.read_text() for file in sorted(folder.iterdir())]
    (folder / "fleet.json").write_text("{}")
    assert runner.invoke(app, ["dashboards", "build", "--check", "--out", str(folder)]).exit_code == 1

"""The report as terminal text, Markdown, CSV, JSON and page: the same figures, and nothing that leaves the file."""

from __future__ import annotations

import csv
import doctest
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from replay import slo
from replay.report import files, formats, markdown, metrics, plots
from replay.report.assemble import Report, assemble
from replay.report.formats import difference, percent, seconds, share, value
from replay.report.tables import overview, sections
from replay.slo import Slo
from stack.cli.report import report as report_command
from tests.make_experiment import write_demo
from tests.test_report_compare import write_arm

SPEEDS = {"round_robin": 0.8, "least_outstanding": 2.0}
CLI = typer.Typer()
CLI.command()(report_command)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("runs") / "demo", SPEEDS, repeats=3, span_s=300)


@pytest.fixture(scope="module")
def written(demo: Path) -> tuple[Report, dict[str, Path]]:
    report = assemble([demo])
    return report, files.write(report, demo / "report", "tidegauge report runs/demo")


def test_json_holds_every_figure_at_full_precision(written: tuple[Report, dict[str, Path]]) -> None:
    report, paths = written
    found = json.loads(paths["json"].read_text())
    assert [policy["name"] for policy in found["policies"]] == list(SPEEDS)
    assert found["policies"][0]["metrics"]["ttft_p95_s"] == report.policies[0].figures["ttft_p95_s"]
    assert found["verdict"]["winner"] == "least_outstanding"
    assert found["ground"].startswith("Simulated in virtual time: ")
    assert found["units"]["gpu_hours"] == "GPU-h"
    assert {run["conserved"] for policy in found["policies"] for run in policy["runs"]} == {True}


def test_csv_is_tidy_and_agrees_with_json(written: tuple[Report, dict[str, Path]]) -> None:
    report, paths = written
    rows = list(csv.DictReader(io.StringIO(paths["csv"].read_text())))
    whole = {(row["policy"], row["metric"]): row for row in rows if not row["repeat"]}
    compared = whole["least_outstanding", "attainment"]
    by_metric = report.versus("least_outstanding")["attainment"]
    assert float(compared["ci_low_percent"]) == by_metric.ci_low
    assert (compared["pairs"], compared["baseline"]) == ("3", "round_robin")
    assert whole["round_robin", "ttft_p95_s"]["baseline"] == ""
    assert whole["round_robin", "phase_retry_s"]["value"] == "0.0"
    assert whole["round_robin", "phase_kv_transfer_s"]["value"] == "", "not measured is empty"
    assert {row["repeat"] for row in rows} == {"", "0", "1", "2"}


def test_beyond_the_time_out_is_said_in_every_form(tmp_path: Path) -> None:
    report = assemble([write_arm(tmp_path, policy="a", good=90), write_arm(tmp_path, policy="b", good=40)], slo=Slo(ttft_s=1.0))
    paths = files.write(report, tmp_path / "out")
    assert json.loads(paths["json"].read_text())["policies"][1]["metrics"]["ttft_all_p50_s"] == "inf"
    [cells] = [cells for label, cells in overview(report) if label.startswith("TTFT, all that arrived")]
    assert cells == ["500 ms / > time-out / > time-out", "> time-out / > time-out / > time-out"]
    assert "&gt; time-out" in paths["md"].read_text()
    assert "&gt; time-out" in paths["html"].read_text()
    assert "one pair: not enough data" in paths["md"].read_text()


def test_markdown_stands_alone_ground_and_verdict_first(written: tuple[Report, dict[str, Path]]) -> None:
    text = written[1]["md"].read_text()
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "**Simulated in virtual time: llama-3.1-8b on a100\\_sxm, cold start 7 s**"
    assert lines[2].startswith("**Verdict.** least\\_outstanding meets the objective")
    assert len(text) < 60_000
    assert text.count("<details>") == text.count("</details>") == 1
    widths = {line.count("|") - line.count("\\|") for line in lines if line.startswith("| ") and "SLO attainment" in line}
    assert widths == {4, 3}  # the figures: label and two policies; the differences: label and one


def test_better_and_worse_are_said_only_where_the_interval_excludes_no_difference(demo: Path) -> None:
    def tones(baseline: str) -> dict[str, str]:
        report = assemble([demo], baseline=baseline)
        return {row.label: row.cells[1].tone for section in sections(report) for row in section.rows}

    forward, backward = tones("round_robin"), tones("least_outstanding")
    for label in ("SLO attainment", "TTFT p95", "GPU-hours"):  # one is better high, two are better low
        assert (forward[label], backward[label]) == ("better", "worse"), label
    assert forward["arrived"] == forward["TPOT p50"] == "", "the first has no good direction, the second differs by chance"


def test_two_plots_on_one_page_do_not_share_ids() -> None:
    drawn = '<svg width="1" viewBox="0 0 1 1"><clipPath id="c"/><path clip-path="url(#c)"/></svg>'
    inlined = plots._inline(drawn, "ttft", 'a "b" <c>')
    assert inlined.endswith('<clipPath id="ttft-c"/><path clip-path="url(#ttft-c)"/></svg>')
    assert 'viewBox="0 0 1 1" role="img" aria-label="a &quot;b&quot; &lt;c>"' in inlined


class Page(HTMLParser):
    """Tags, ids and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, setting in attrs:
            if name == "id":
                self.ids.append(setting or "")
            elif name in ("src", "href", "xlink:href", "srcset") and not (setting or "").startswith("data:,"):
                self.fetched.append(setting or "")


def test_the_page_is_one_file_without_script_or_address(written: tuple[Report, dict[str, Path]]) -> None:
    text = written[1]["html"].read_text()
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\"' )<]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert len(page.ids) == len(set(page.ids)), "plots must not share the ids of their clip paths"
    assert len(text) < 5_000_000
    assert [f"figure-{name}" in page.ids for name in ("traffic", "replicas", "ttft", "tpot", "phases")] == [True] * 5


def test_the_page_escapes_what_files_bring(tmp_path: Path) -> None:
    evil = "<img src=//x>&\"'"
    paths = [
        write_arm(tmp_path / str(n), good=99, policy=name, ground={"kind": "fleet", "detail": evil}, trace={"name": evil})
        for n, name in enumerate((evil, "b"))
    ]
    written = files.write(assemble(paths, slo=Slo(ttft_s=1.0)), tmp_path / "out")
    assert "img" not in Page(written["html"].read_text()).tags
    assert "<img" not in written["md"].read_text()


def test_a_page_costs_the_same_at_any_number_of_rows(tmp_path: Path) -> None:
    sizes = []
    for span_s in (300, 3000):
        demo = write_demo(tmp_path / str(span_s), SPEEDS, repeats=1, span_s=span_s)
        sizes.append(len(files.write(assemble([demo]), demo / "report")["html"].read_text()))
    assert sizes[1] < 1.3 * sizes[0]


@given(st.integers(1, 5000), st.integers(0, 500))
def test_a_distribution_has_few_points_and_ends_where_the_failures_begin(count: int, failures: int) -> None:
    ascending = np.sort(np.random.default_rng(count).lognormal(size=count))
    values_s, shares = plots.ecdf(ascending, failures)
    assert len(values_s) == len(shares) <= plots.ECDF_POINTS
    assert values_s[-1] == ascending[-1]
    assert shares[-1] == pytest.approx(count / (count + failures))
    assert (np.diff(shares) > 0).all()
    drawn = np.searchsorted(ascending, values_s, side="right") / (count + failures)
    assert drawn == pytest.approx(shares), "every point lies on the curve"


def test_the_command_prints_ground_and_verdict_first_and_writes_the_files(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(
        CLI, [str(demo), "--out", str(out), "--csv", str(tmp_path / "x.csv"), "--markdown", str(tmp_path / "x.md")]
    )
    assert done.exit_code == 0, done.output
    first, second = done.output.splitlines()[:2]
    assert first.startswith("Simulated in virtual time")
    assert second.startswith("least_outstanding meets the objective")
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "report.csv", "report.json"}
    assert (tmp_path / "x.csv").read_text() == (out / "report.csv").read_text()
    assert (tmp_path / "x.md").read_text() == (out / "report.md").read_text()


def test_the_command_prints_json_alone_and_another_objective_changes_the_verdict(demo: Path, tmp_path: Path) -> None:
    arguments = [str(demo), "--json", "--out", str(tmp_path), "--slo", "ttft<=1ms", "--baseline", "least_outstanding"]
    done = CliRunner().invoke(CLI, arguments)
    found = json.loads(done.stdout)
    assert (found["slo"], found["baseline"], found["verdict"]["kind"]) == ({"ttft_s": 0.001}, "least_outstanding", "none")
    assert [policy["name"] for policy in found["policies"]] == ["least_outstanding", "round_robin"]


def test_an_invalid_run_exits_with_1_and_is_marked_everywhere(tmp_path: Path) -> None:
    bad = write_arm(tmp_path, good=99, validity={"valid": False, "reasons": ["send lateness p99 is 9 ms, above 5 ms"]})
    done = CliRunner().invoke(CLI, [str(bad), "--slo", "ttft<=1s"])
    assert done.exit_code == 1
    assert "INVALID a, repeat 0: send lateness p99 is 9 ms" in done.output
    for suffix in ("md", "html", "json"):
        assert "send lateness p99 is 9 ms" in (bad / "report" / f"report.{suffix}").read_text()


def test_numbers_read_well() -> None:
    assert [value(n, "USD/1M") for n in (None, 0.01234, 3.2, 1234.5)] == ["–", "$0.0123", "$3.20", "$1,234.50"]
    assert [seconds(s) for s in (0.0, 0.00123, 0.9994, 0.9996, 61.23, 1234.0)] == [
        "0 ms",
        "1.23 ms",
        "999 ms",
        "1.00 s",
        "61.2 s",
        "1,234 s",
    ]
    assert [share(s) for s in (0.0, 1.0, 0.99999, 0.00001, 0.5)] == ["0 %", "100 %", "99.9 %", "0.1 %", "50.0 %"]
    assert [percent(p) for p in (-12.34, 0.0, 250.4)] == ["−12.3 %", "+0.0 %", "+250 %"]
    assert [difference(0.0123, "share"), difference(-1.5, "s"), difference(None, "s")] == ["+1.23 pp", "−1.50 s", "–"]
    assert str(Slo(ttft_s=1.0, tpot_s=0.05)) == "TTFT ≤ 1 s, TPOT ≤ 50 ms"


@pytest.mark.parametrize("module", [formats, markdown, metrics, slo])
def test_examples_in_the_documentation_are_true(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed

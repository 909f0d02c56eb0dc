"""``tidegauge trace``: tables for people, full precision as JSON, one clear error for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

import stack.cli.trace  # noqa: F401  registers the command
from replay import traces
from stack.cli import app


def trace(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["trace", *arguments])


def test_describe_as_json_has_the_figures_at_full_precision() -> None:
    result = trace("describe", "azure-code-2023", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert figures["rps"] == 2.5666860663390656
    assert figures["format"] == "azure"
    assert figures["sha256"] == traces.sha256("azure-code-2023")


def test_describe_shows_a_table_and_warnings(tmp_path: Path) -> None:
    lines = [{"timestamp": at // 4 * 1000, "input_length": 100, "output_length": 5, "hash_ids": [3]} for at in range(80)]
    path = tmp_path / "seconds.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = trace("describe", str(path))
    assert result.exit_code == 0, result.output
    for shown in ("index of dispersion, per 10s", "98.8% of 80", "timestamps are quantised", "--jitter 1s"):
        assert shown in result.output


def test_shaping_options_reach_the_plan(tmp_path: Path) -> None:
    options = "--from=1m --to=30m --busiest=5m --rate-scale=0.5 --time-scale=2 --jitter=250ms --seed=3"
    shaped = options.split()
    out = tmp_path / "plan.parquet"
    result = trace("convert", "azure-code-2023", str(out), *shaped, "--json")
    assert result.exit_code == 0, result.output
    expected = traces.shape(
        traces.read("azure-code-2023"),
        traces.Shaping(from_s=60, to_s=1800, busiest_s=300, rate_scale=0.5, time_scale=2, jitter_s=0.25, seed=3),
    )
    assert traces.read(out) == expected
    assert json.loads(result.output)["rows"] == len(expected)
    described = json.loads(trace("describe", "azure-code-2023", *shaped, "--json").output)
    assert described["rows"] == len(expected)
    assert described["shaping"]["busiest_s"] == 300


def test_help_has_an_example() -> None:
    for command in ("describe", "convert"):
        assert f"tidegauge trace {command} azure-code-2023" in " ".join(trace(command, "--help").output.split())


def test_bad_input_is_one_error_and_exit_code_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 0, "input_length": [/x]}\n')
    tidegauge = [sys.executable, "-c", "import stack.cli.trace; from stack.cli import main; main()", "trace", "describe"]
    for arguments, says in (([str(bad)], f"{bad}:2"), ([str(bad), "--jitter", "-1s"], "--jitter")):
        ended = subprocess.run([*tidegauge, *arguments], capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert says in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1, "no traceback"

"""The command line's promises: an example in every --help, JSON where figures are, exit code 2 and one paragraph for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from stack.cli import app

ROOT = Path(__file__).resolve().parent.parent


def commands(node: typer.core.TyperGroup, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in node.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


ALL = list(commands(typer.main.get_command(app)))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_helps_with_an_example(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Example" in shown.output


def test_policies_lists_every_kind_and_preset() -> None:
    from replay.policies import spec

    listed = json.loads(CliRunner().invoke(app, ["policies", "--json"]).output)
    assert {(entry["role"], entry["kind"]) for entry in listed["kinds"]} == {
        (role, kind) for role in spec.ROLES for kind in spec.ROLES[role]
    }
    assert [entry["name"] for entry in listed["presets"]] == list(spec.preset_names())
    assert all(entry["summary"] for entry in listed["kinds"])


def test_the_schema_it_writes_accepts_the_documented_policy(tmp_path: Path) -> None:
    import yaml

    out = tmp_path / "schema.json"
    assert CliRunner().invoke(app, ["policies", "schema", "--out", str(out)]).exit_code == 0
    documented = (ROOT / "docs" / "experiments.md").read_text().split("```yaml")[-1].split("```")[0]
    jsonschema.validate(yaml.safe_load(documented), json.loads(out.read_text()))


@pytest.mark.parametrize("arguments", [["report", "nowhere"], ["trace", "describe", "nowhere.csv"], ["run", "nowhere.yaml"]])
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from stack.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error" in done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["live", "hour"])
def test_the_demo_is_planned_within_its_promise(name: str) -> None:
    """The install included it must end in five minutes: at most three of them live."""
    shown = CliRunner().invoke(app, ["run", str(ROOT / "stack" / "demo" / f"{name}.yaml"), "--plan", "--json"])
    planned = json.loads(shown.output)
    assert planned["requests_per_arm"] > 100
    if name == "live":
        assert len(planned["arms"]) * planned["planned_s"] <= 180
    else:
        assert len(planned["arms"]) == 80

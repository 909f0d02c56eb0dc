"""``tidegauge policies``: what can be named in a policy file, and the schema that lets editors complete it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from stack.cli import app, console

group = typer.Typer(help="Balancers, queues, limiters, autoscalers and presets.", invoke_without_command=True)
app.add_typer(group, name="policies")


@group.callback()
def policies(context: typer.Context, json_out: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List every kind with its parameters and defaults, and every preset.

    Example: [cyan]tidegauge policies[/]
    """
    if context.invoked_subcommand:
        return
    from replay.policies import spec

    kinds: list[dict[str, Any]] = [
        {"role": role, "kind": kind, "summary": (cls.__doc__ or "").split("\n")[0], "parameters": spec.defaults(cls)}
        for role, table in spec.ROLES.items()
        for kind, cls in table.items()
    ]
    presets = [{"name": name, "description": spec.load(name).description} for name in spec.preset_names()]
    if json_out:
        console.print_json(data={"kinds": kinds, "presets": presets})
        return
    table = Table("role", "kind", "parameters and defaults", "what it does")
    for entry in kinds:
        defaults = ", ".join(f"{name}={value}" for name, value in entry["parameters"].items())
        table.add_row(entry["role"], entry["kind"], defaults, entry["summary"])
    console.print(table)
    names = Table("preset", "what it is")
    for preset in presets:
        names.add_row(preset["name"], preset["description"])
    console.print(names)


@group.command()
def schema(out: Annotated[Path | None, typer.Option("--out", help="Write it here instead of printing it.")] = None) -> None:
    """The JSON Schema of a policy file, so that editors complete and check it.

    Example: [cyan]tidegauge policies schema --out policy.schema.json[/], then begin a policy with
    [cyan]# yaml-language-server: $schema=policy.schema.json[/]
    """
    from replay.policies import spec

    text = json.dumps(spec.json_schema(), indent=1) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)
        console.print(f"wrote {out}")

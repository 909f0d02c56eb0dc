"""``tidegauge dashboards``: the Grafana dashboards as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stack.cli import app, console

group = typer.Typer(help="Grafana dashboards over what Tidegauge measures.", no_args_is_help=True)
app.add_typer(group, name="dashboards")


@group.callback()
def dashboards() -> None:
    """Grafana dashboards over what Tidegauge measures."""


@group.command()
def build(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to; by default the one in the package.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where a file is not current.")] = False,
) -> None:
    """Write every dashboard as a JSON file that Grafana loads; its data source has the uid [cyan]prometheus[/].

    Example: [cyan]tidegauge dashboards build --out /var/lib/grafana/dashboards[/]
    """
    from dashboards.build import FOLDER, outdated, write

    folder = out or FOLDER
    if not check:
        for file in write(folder):
            console.print(f"wrote {file}", soft_wrap=True, highlight=False)
        return
    stale = outdated(folder)
    for file in stale:
        console.print(f"{file} is not current. Try: tidegauge dashboards build --out {folder}", soft_wrap=True, highlight=False)
    if stale:
        raise typer.Exit(1)
    console.print(f"{folder} is current", soft_wrap=True, highlight=False)

"""``tidegauge report``: runs in, the verdict out, on the terminal and as files."""

from __future__ import annotations

import shlex
import shutil
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from stack.cli import app, console

if TYPE_CHECKING:
    from replay.report.assemble import Report

_VERDICT_STYLES = {"cheapest": "bold green", "none": "bold red", "not comparable": "bold red"}


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Experiment folders or single run folders.", metavar="RUN...")],
    slo: Annotated[str | None, typer.Option(help="Objective instead of the declared one, like 'ttft<=1s,tpot<=50ms'.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Policy that the others are compared with (default: the first).")] = None,
    target: Annotated[float, typer.Option(help="Share of requests that have to be good.")] = 0.95,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, .md, .csv and .json (default: RUN/report).")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the CSV here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the Markdown here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at full precision instead of tables.")] = False,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Say which policy met the objective for the least money, and show the figures behind it.

    Exit code 1 where a run is invalid (marked in red, with its reason).

    Example: [cyan]tidegauge report runs/20261116-181703 --slo 'ttft<=1s,tpot<=50ms'[/]
    """
    found, written = make(runs, slo=slo, baseline=baseline, target=target, out=out)
    for path, suffix in ((csv, "csv"), (markdown, "md")):
        if path is not None:
            shutil.copyfile(written[suffix], path)
    if as_json:
        typer.echo(written["json"].read_text(encoding="utf-8"), nl=False)
    else:
        show(found, written["html"])
    if open_page:
        webbrowser.open(written["html"].resolve().as_uri())
    raise typer.Exit(exit_code(found))


def print_report(runs: Sequence[Path]) -> int:
    """Write the report of ``runs`` and show it on the terminal; returns the command's exit code."""
    found, written = make(runs)
    show(found, written["html"])
    return exit_code(found)


def make(
    runs: Sequence[Path], *, slo: str | None = None, baseline: str | None = None, target: float = 0.95, out: Path | None = None
) -> tuple[Report, dict[str, Path]]:
    """The report and the files that it was written to, by suffix."""
    from replay.report import files
    from replay.report.assemble import assemble
    from replay.slo import Slo

    found = assemble(runs, slo=Slo.parse(slo) if slo else None, baseline=baseline, target=target)
    folder = out or (runs[0] / "report" if len(runs) == 1 else Path("report"))
    options = {"--slo": slo, "--baseline": baseline, "--target": None if target == 0.95 else f"{target:g}"}
    given = [word for option, setting in options.items() if setting is not None for word in (option, setting)]
    return found, files.write(found, folder, command=shlex.join(["tidegauge", "report", *map(str, runs), *given]))


def exit_code(found: Report) -> int:
    """1 where a run is invalid: a check failed."""
    return 1 if found.faults else 0


def show(found: Report, page: Path) -> None:
    """The report on the terminal: ground and verdict first, then the figures, then the differences."""
    from replay.report import tables
    from replay.report.compare import too_few

    names = [policy.name for policy in found.policies]
    console.print(f"[bold]{escape(found.ground)}[/]", highlight=False)
    style = _VERDICT_STYLES.get(found.verdict.kind, "bold yellow")
    console.print(f"[{style}]{escape(found.verdict.sentence)}[/]\n", highlight=False)
    console.print(escape(tables.trace_words(found)), highlight=False)
    console.print(f"objective {escape(str(found.slo))}; price {escape(tables.price_words(found))}", highlight=False)
    for fault in found.faults:
        console.print(f"[bold red]INVALID[/] {escape(fault)}", highlight=False)
    for warning in found.warnings:
        console.print(f"[yellow]mind[/] {escape(warning)}", highlight=False)
    overview = Table("a run", *(escape(name) for name in names))
    for label, cells in tables.overview(found):
        overview.add_row(label, *map(escape, cells))
    console.print(overview)
    if rows := tables.differences(found, absolute=False):
        has_interval = any(comparison.ci_low is not None for comparison in found.comparisons)
        few = too_few(found.comparisons[0].n)
        asked = f"95 %, t over pairs; the question: {found.question}" if has_interval else f"no interval: {few}"
        console.print(
            f"\nagainst {escape(found.baseline)} ({escape(asked)}); descriptive, the verdict alone decides", highlight=False
        )
        differences = Table("difference", *(escape(name) for name in names[1:]))
        for label, cells in rows:
            differences.add_row(label, *map(escape, cells))
        console.print(differences)
    console.print(f"\npage  {escape(str(page))}", soft_wrap=True, highlight=False)
    if found.faults:
        console.print("exit 1: a run is invalid", highlight=False)

"""``tidegauge run``: an experiment, live or in virtual time; and ``tidegauge demo``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stack.cli import app, console

if TYPE_CHECKING:
    from stack.experiment import Experiment

Out = Annotated[Path, typer.Option("--out", help="Folder that run directories go to.")]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="The experiment, a YAML file.", show_default=False)],
    simulate: Annotated[bool, typer.Option("--simulate", help="In virtual time, on all cores; the same files come out.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print arms, order, duration and warnings; start nothing.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="With --plan: as JSON.")] = False,
    out: Out = Path("runs"),
    report: Annotated[bool, typer.Option(help="Report when the last arm has ended.")] = True,
) -> None:
    """Compare policies on one trace: bring gateway and replicas up for each, replay, collect, bring down, report.

    Example: [cyan]tidegauge run friday.yaml --plan[/], then [cyan]tidegauge run friday.yaml[/]
    """
    from stack import experiment as experiments

    experiment = experiments.load(file)
    if plan:
        _print_plan(experiment, simulate=simulate, json_out=json_out)
        return
    folder = carry_out(experiment, out, simulate=simulate)
    if report:
        from stack.cli.report import print_report

        raise typer.Exit(print_report([folder]))
    console.print(f"next: [cyan]tidegauge report {folder}[/]")


@app.command()
def demo(
    out: Out = Path("runs"),
    live: Annotated[bool, typer.Option(help="Also replay the busiest minute live, on stand-in GPUs.")] = True,
) -> None:
    """The shipped hour of real traffic, under five minutes: a burst live on two policies, then all of it simulated on four.

    Example: [cyan]tidegauge demo[/]
    """
    from stack import experiment as experiments
    from stack.cli.report import make, show

    files = Path(__file__).parent.parent / "demo"
    if live:
        console.rule("1 of 2: the busiest minute, live, through gateway and replicas (stand-in GPUs)")
        found, written = make([carry_out(experiments.load(files / "live.yaml"), out, simulate=False)])
        console.print(f"[bold]{escape(found.ground)}[/]\n{escape(found.verdict.sentence)}\npage  {written['html']}", soft_wrap=True)
    console.rule("2 of 2: the whole hour, simulated, 20 repeats each")
    folder = carry_out(experiments.load(files / "hour.yaml"), out, simulate=True)
    found, written = make([folder])
    show(found, written["html"])
    if live:
        console.print("One live pair alone is not enough data: it proved the path; the verdict stands on the 20 simulated repeats.")
    console.print("\nnext, with your own")
    console.print("  trace     [cyan]tidegauge trace describe my-traffic.csv[/]")
    console.print("  fleet     [cyan]locust -f loadgen/ --host http://my-gateway:8000 --trace my-traffic.csv --busiest 90s[/]")
    console.print(
        f"  policies  [cyan]tidegauge run {files / 'hour.yaml'} --simulate[/]  (copy it; name or write your policies there)"
    )


def carry_out(experiment: Experiment, out: Path, *, simulate: bool) -> Path:
    """All arms of an experiment with a progress bar; returns its folder. Ctrl-C and SIGTERM bring everything down first."""
    from stack import experiment as experiments
    from stack import live

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    experiments.plan(experiment, 0)  # a trace that cannot be read fails here, before anything is written
    folder = experiments.create(experiment, out)
    todo = list(experiments.arms(experiment))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        if simulate:
            task = bar.add_task(f"simulating {len(todo)} runs", total=len(todo))
            experiments.simulate(experiment, folder, lambda arm: bar.advance(task))
            return folder
        for number, arm in enumerate(todo, 1):
            name = f"{number}/{len(todo)} {arm.policy.name}"
            task = bar.add_task(name, total=1.0)

            def show(what: str, share: float, task: object = task, name: str = name) -> None:
                bar.update(task, description=f"{name}: {what}", completed=share)  # type: ignore[arg-type]

            live.run_arm(experiment, arm, experiments.plan(experiment, arm.repeat), folder / arm.folder, show)
            bar.update(task, description=f"{name}: done", completed=1.0)
    return folder


def _print_plan(experiment: Experiment, *, simulate: bool, json_out: bool) -> None:
    from replay.records import NS_PER_S
    from stack import experiment as experiments

    table = experiments.plan(experiment, 0)
    planned_s = table["arrival_at_ns"][-1].as_py() / NS_PER_S
    start_s = experiment.cold_start_s
    arms = list(experiments.arms(experiment))
    document = {
        "arms": [{"policy": arm.policy.name, "repeat": arm.repeat} for arm in arms],
        "requests_per_arm": len(table),
        "planned_s": planned_s,
        "duration_s_max": None if simulate else len(arms) * (start_s + planned_s + experiment.scalars.drain_s),
        "ground": experiments.ground(experiment, simulated=simulate),
        "warnings": experiments.warnings(experiment),
    }
    if json_out:
        console.print_json(data=document)
        return
    rows = Table(
        "order", "policy", "repeat", title=f"{experiment.scalars.name}: {len(table)} requests in {planned_s:.0f} s, each arm"
    )
    for number, arm in enumerate(arms, 1):
        rows.add_row(str(number), arm.policy.name, str(arm.repeat))
    console.print(rows)
    console.print(f"ground: {document['ground']['kind']}, {document['ground']['detail']}")
    if not simulate:
        shortest_min, longest_min = len(arms) * (start_s + planned_s) / 60, document["duration_s_max"] / 60
        console.print(f"duration: {shortest_min:.1f} min, at most {longest_min:.1f} with every drain")
    for warning in document["warnings"]:
        console.print(f"[yellow]warning[/] {warning}")

"""``tidegauge trace``: what recorded traffic is like, and shaped traces written to files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stack.cli import app, console

if TYPE_CHECKING:
    from replay.traces import Shaping

trace_app = typer.Typer(no_args_is_help=True, help="Recorded traffic: describe it, shape it, convert it.")
app.add_typer(trace_app, name="trace")

_FILE_HELP = "Azure CSV, Mooncake or our JSON lines, our Parquet, plain or .gz; or the shipped hour azure-code-2023."
_File = Annotated[str, typer.Argument(metavar="FILE", help=_FILE_HELP)]
_From = Annotated[str | None, typer.Option("--from", metavar="DURATION", help="Leave out what came before, from the start.")]
_To = Annotated[str | None, typer.Option("--to", metavar="DURATION", help="Leave out what came at or after this.")]
_Busiest = Annotated[str | None, typer.Option(metavar="DURATION", help="Of that, the window of this length with most requests.")]
_Rate = Annotated[float, typer.Option(help="2 = twice as many requests (jittered copies), 0.5 = half (a sample).")]
_Time = Annotated[float, typer.Option(help="2 = twice as slow.")]
_Jitter = Annotated[str, typer.Option(metavar="DURATION", help="Every request up to this much later, drawn from the seed.")]
_Seed = Annotated[int, typer.Option(help="Seed of samples, copies and jitter.")]
_Json = Annotated[bool, typer.Option("--json", help="Figures as JSON, at full precision.")]


@trace_app.command(epilog="Example: tidegauge trace describe azure-code-2023 --busiest 5m")
def describe(
    file: _File, from_: _From = None, to: _To = None, busiest: _Busiest = None, rate_scale: _Rate = 1.0, time_scale: _Time = 1.0,
    jitter: _Jitter = "0s", seed: _Seed = 0, as_json: _Json = False,
) -> None:  # fmt: skip
    """How bursty a trace is, how long its prompts and answers are, how much of its prompts is shared."""
    from replay import traces

    shaping = _shaping(from_, to, busiest, rate_scale, time_scale, jitter, seed)
    table = _shaped(file, shaping)
    facts = {"file": file, "format": traces.detect(file), "sha256": traces.sha256(file), "shaping": dataclasses.asdict(shaping)}
    figures = {**facts, **traces.describe(table)}
    if as_json:
        console.print_json(json.dumps(figures, allow_nan=False))
    else:
        _show(figures)


@trace_app.command(epilog="Example: tidegauge trace convert azure-code-2023 busiest.parquet --busiest 90s")
def convert(
    file: _File,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write: a name that ends in .parquet or .jsonl.")],
    from_: _From = None, to: _To = None, busiest: _Busiest = None, rate_scale: _Rate = 1.0, time_scale: _Time = 1.0,
    jitter: _Jitter = "0s", seed: _Seed = 0, as_json: _Json = False,
) -> None:  # fmt: skip
    """Write a trace, shaped or whole, as our Parquet or JSON lines."""
    from replay import traces

    table = _shaped(file, _shaping(from_, to, busiest, rate_scale, time_scale, jitter, seed))
    traces.write(table, out)
    if as_json:
        console.print_json(json.dumps({"rows": len(table), "file": str(out), "sha256": traces.sha256(out)}))
    else:
        console.print(f"{len(table):,} requests -> {out}", highlight=False, markup=False)


def _shaping(
    from_: str | None, to: str | None, busiest: str | None, rate_scale: float, time_scale: float, jitter: str, seed: int
) -> Shaping:
    from replay.schedule import parse_duration_s
    from replay.traces import Shaping

    def seconds(text: str | None, option: str) -> float | None:
        return None if text is None else parse_duration_s(text, where=option)

    return Shaping(
        from_s=seconds(from_, "--from"), to_s=seconds(to, "--to"), busiest_s=seconds(busiest, "--busiest"), seed=seed,
        rate_scale=rate_scale, time_scale=time_scale, jitter_s=parse_duration_s(jitter, where="--jitter"),
    )  # fmt: skip


def _shaped(file: str, shaping: Shaping) -> Any:
    """The trace as recorded where nothing is asked of it, so that describe shows the file and not a plan."""
    from replay import traces

    table = traces.read(file)
    return table if shaping == traces.Shaping() else traces.shape(table, shaping)


def _show(figures: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    arrivals = Table(title=f"{escape(figures['file'])} ({figures['format']})", show_header=False, title_justify="left")
    arrivals.add_row("requests", f"{figures['rows']:,}")
    arrivals.add_row("span, mean rate", f"{_number(figures['span_s'])} s, {_number(figures['rps'])} requests/s")
    for width in ("10s", "60s"):
        arrivals.add_row(f"peak / mean, per {width}", _number(figures[f"peak_to_mean_{width}"]))
        arrivals.add_row(f"index of dispersion, per {width}", f"{_number(figures[f'idc_{width}'])} (Poisson: 1)")
    arrivals.add_row("CV of times between arrivals", f"{_number(figures['cv_interarrival'])} (Poisson: 1)")
    if reuse := figures["prefix_reuse"]:
        arrivals.add_row("blocks seen before (unlimited cache)", f"{reuse['block_share']:.1%} of {reuse['blocks']:,}")
        arrivals.add_row("requests with first block seen before", f"{reuse['request_share']:.1%}")
    for name in ("sessions", "models", "tenants"):
        if figures[name] is not None:
            arrivals.add_row(name, f"{figures[name]:,}")
    quantiles = ("mean", "p50", "p90", "p99", "max")
    tokens = Table("tokens", *quantiles)
    for side in ("prompt", "output"):
        tokens.add_row(side, *(_number(figures[f"{side}_tokens"][quantile]) for quantile in quantiles))
    console.print(arrivals, tokens, highlight=False)
    for warning in figures["warnings"]:
        console.print(f"[bold yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    """Four digits, which is what a reader takes in; "-" where the figure is not defined."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

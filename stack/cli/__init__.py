"""The command ``tidegauge``: exit codes 0 done, 1 a check failed, 2 bad input."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from replay.errors import InputError

app = typer.Typer(
    name="tidegauge", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Which balancer, queue, rate limit and autoscaler serve my traffic within my latency targets for the least money?",
)  # fmt: skip
console = Console()
errors = Console(stderr=True)


def main() -> None:
    """Entry point: one clear error for bad input, never a traceback."""
    try:
        app()
    except InputError as error:
        errors.print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True, highlight=False, markup=True)
        sys.exit(2)


# Each module registers its commands on ``app``; heavy imports stay inside them, so that --help is quick.
from stack.cli import dashboards, policies, replica, report, run, serve, trace  # noqa: E402, F401 (the order of --help)

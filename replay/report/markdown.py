"""The report as Markdown that stands alone in a pull request: ground and verdict first, details folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from replay.report.assemble import Report
from replay.report.compare import too_few
from replay.report.metrics import Values
from replay.report.tables import GLOSSARY, RUN_HEADINGS, differences, overview, price_words, run_rows, trace_words

_BARS: Final = "▁▂▃▄▅▆▇█"
SPARK_WIDTH: Final = 60


def markdown(report: Report) -> str:
    """The whole text, with a line end."""
    names = [policy.name for policy in report.policies]
    lines = [
        f"**{_plain(report.ground)}**",
        "",
        f"## {_plain(report.title)}",
        "",
        f"**Verdict.** {_plain(report.verdict.sentence)}",
        "",
    ]
    lines += [
        f"Traffic: {_plain(trace_words(report))}  ",
        f"Objective: {report.slo}, for at least {report.target:.0%} of all that arrived  ",
    ]
    lines += [f"Arrivals: `{sparkline(report.policies[0].timeline.arrivals_rps)}`", ""]
    lines += [f"> ⛔ INVALID: {_plain(fault)}" for fault in report.faults] + [""] * bool(report.faults)
    lines += [f"> ⚠ {_plain(warning)}" for warning in report.warnings] + [""] * bool(report.warnings)
    lines += _table(["a run", *names], ([label, *cells] for label, cells in overview(report)))
    if rows := differences(report):
        heading = f"against {report.baseline}"
        asked = (
            f"intervals answer “{report.question}”"
            if any(c.ci_low is not None for c in report.comparisons)
            else f"no interval: {too_few(report.comparisons[0].n)}"
        )
        lines += ["", f"Differences {_plain(heading)} (95 %; {_plain(asked)}; descriptive, the verdict alone decides):", ""]
        lines += _table([heading, *names[1:]], ([label, *cells] for label, cells in rows))
    lines += ["", "<details><summary>Runs, prices and definitions</summary>", ""]
    lines += _table(list(RUN_HEADINGS), run_rows(report))
    lines += ["", f"Prices: {_plain(price_words(report))}", ""]
    lines += [f"- **{term}**: {meaning}" for term, meaning in GLOSSARY.items()]
    return "\n".join([*lines, "", "</details>"]) + "\n"


def sparkline(values: Values, width: int = SPARK_WIDTH) -> str:
    """Values as a row of block characters, the largest of each stretch; empty for no values.

    >>> import numpy as np
    >>> sparkline(np.array([0.0, 1.0, 4.0, 8.0]), width=4)
    '▁▂▅█'
    """
    if not len(values):
        return ""
    stretches = [
        values[len(values) * i // width : max(len(values) * (i + 1) // width, len(values) * i // width + 1)] for i in range(width)
    ]
    peak = float(values.max()) or 1.0
    return "".join(_BARS[round(float(stretch.max()) / peak * (len(_BARS) - 1))] for stretch in stretches)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(headings), "|---" * len(headings) + "|", *map(line, rows)]


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave alone: names come from files, not from us."""
    for special in "\\`*_<>[]":
        text = text.replace(special, f"\\{special}" if special not in "<>" else {"<": "&lt;", ">": "&gt;"}[special])
    return " ".join(text.split())

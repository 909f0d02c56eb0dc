"""The report as one self-contained HTML file: no script, no network, light and dark, for screen, phone and paper."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from replay.report import plots, tables
from replay.report.assemble import Policy, Report
from replay.report.compare import too_few


def page(report: Report, command: str = "") -> str:
    """The page's HTML. ``command`` is the line that made it, printed for whoever wants to make it again."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["whole"] = _whole
    here = resources.files("replay.report")
    template = environment.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8"))
    # CSS and SVG are our own output; the names inside the SVG were escaped as it was drawn.
    return template.render(
        report=report, command=command, css=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704
        figures=[(figure, Markup(figure.svg)) for figure in plots.figures(report)],  # noqa: S704
        overview=tables.overview(report), sections=tables.sections(report), runs=tables.run_rows(report),
        run_headings=tables.RUN_HEADINGS, glossary=tables.GLOSSARY.items(), traffic=tables.trace_words(report),
        prices=tables.price_words(report),
        versions=_versions(report), specs=[(policy.name, _yaml(policy.spec)) for policy in report.policies],
        experiment=_yaml(report.spec), badges=[_badge(policy) for policy in report.policies],
        lowest={"lower": "↓", "higher": "↑", "": ""},
        few=too_few(report.comparisons[0].n) if report.comparisons else "",
        has_interval=any(comparison.ci_low is not None for comparison in report.comparisons),
    )  # fmt: skip


def _whole(text: str) -> str:
    """The text with its units tied to their numbers, so that a cell breaks between figures only."""
    return re.sub(r"(?<=\d) (?=(ms|s|%|/s)(\W|$))", "\u00a0", text)


def _badge(policy: Policy) -> tuple[str, str, str]:
    """(tone, policy, what it says of its runs)."""
    valid = sum(not arm.faults for arm in policy.arms)
    runs = "1 run" if len(policy.arms) == 1 else f"{len(policy.arms)} runs"
    if policy.faults:
        return "bad", policy.name, f"{runs}, cannot win"
    if valid < len(policy.arms):
        return "warn", policy.name, f"{valid} of {runs} valid"
    return "fine", policy.name, f"{runs}, valid"


def _versions(report: Report) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for arm in (arm for policy in report.policies for arm in policy.arms):
        for package, version in (arm.manifest.get("versions") or {}).items():
            found.setdefault(str(package), {})[str(version)] = None
    return [(package, ", ".join(versions)) for package, versions in sorted(found.items())]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True) if value else ""

"""The report as files: JSON and CSV at full precision, Markdown, and the page."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, Final

from replay.report.assemble import Policy, Report
from replay.report.markdown import markdown
from replay.report.metrics import METRICS
from replay.report.page import page
from replay.report.tables import GLOSSARY, price_words, trace_words
from replay.runs import write_atomically

SCHEMA_VERSION: Final = 1
CSV_COLUMNS: Final = (
    "policy", "repeat", "metric", "unit", "value", "baseline", "difference", "percent", "ci_low_percent", "ci_high_percent",
    "pairs", "question", "note",
)  # fmt: skip


def write(report: Report, folder: str | Path, command: str = "") -> dict[str, Path]:
    """report.html, report.md, report.csv and report.json in ``folder``; returns their paths by suffix."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"html": page(report, command), "md": markdown(report), "csv": as_csv(report), "json": as_json(report)}
    paths = {suffix: folder / f"report.{suffix}" for suffix in texts}
    for suffix, content in texts.items():
        write_atomically(paths[suffix], content)
    return paths


def as_json(report: Report) -> str:
    """One JSON object. Null: not measured; the string "inf": a quantile among the failures, beyond every time."""
    return json.dumps(_finite(as_dict(report)), indent=1, allow_nan=False) + "\n"


def as_dict(report: Report) -> dict[str, Any]:
    """The report as plain values, at full precision."""
    return {
        "schema": SCHEMA_VERSION, "title": report.title, "ground": report.ground,
        "verdict": {"kind": report.verdict.kind, "winner": report.verdict.winner, "sentence": report.verdict.sentence},
        "slo": {name: limit for name in ("ttft_s", "tpot_s", "e2e_s") if (limit := getattr(report.slo, name)) is not None},
        "target": report.target, "baseline": report.baseline, "question": report.question,
        "traffic": trace_words(report), "prices": price_words(report),
        "policies": [_policy(policy) for policy in report.policies],
        "comparisons": [comparison._asdict() for comparison in report.comparisons],
        "faults": report.faults, "warnings": report.warnings, "units": {metric.name: metric.unit for metric in METRICS},
        "definitions": GLOSSARY,
    }  # fmt: skip


def _policy(policy: Policy) -> dict[str, Any]:
    runs = [
        {
            "repeat": arm.repeat, "id": arm.name, "seed": arm.manifest.get("seed"), "valid": not arm.faults, "faults": arm.faults,
            "conserved": arm.conserved, "metrics": arm.figures,
        }
        for arm in policy.arms
    ]  # fmt: skip
    attainment = None if policy.attainment is None else policy.attainment._asdict()
    return {
        "name": policy.name, "faults": policy.faults, "attainment_interval": attainment, "metrics": policy.figures, "runs": runs,
        "spec": policy.spec,
    }  # fmt: skip


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def as_csv(report: Report) -> str:
    """Tidy rows: one a metric and policy over its repeats (repeat empty, with the difference), then one a metric and run."""
    out = io.StringIO()
    rows = csv.DictWriter(out, CSV_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for policy in report.policies:
        versus = report.versus(policy.name)
        for metric in METRICS:
            row = {"policy": policy.name, "metric": metric.name, "unit": metric.unit, "value": policy.figures[metric.name]}
            if c := versus.get(metric.name):
                row |= {
                    "baseline": c.baseline, "difference": c.difference, "percent": c.percent, "ci_low_percent": c.ci_low,
                    "ci_high_percent": c.ci_high, "pairs": c.n, "question": c.question, "note": c.note,
                }  # fmt: skip
            rows.writerow(row)
    for arm in (arm for policy in report.policies for arm in policy.arms):
        for metric in METRICS:
            value = arm.figures[metric.name]
            rows.writerow({"policy": arm.policy, "repeat": arm.repeat, "metric": metric.name, "unit": metric.unit, "value": value})
    return out.getvalue()

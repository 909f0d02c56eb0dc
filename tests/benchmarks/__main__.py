"""``python -m tests.benchmarks [NAME...]``: run the benchmarks, print one table, write build/bench.json.

Each ``bench_<name>.py`` here has ``figures()``, which yields {name, value, unit, against, ratio, target, ok}: a figure, what it
was measured against in the same run, their ratio, and the declared target. Machines are shared and noisy: ratios and medians, not
verdicts.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUT = HERE.parent.parent / "build" / "bench.json"
KEYS = ("name", "value", "unit", "against", "ratio", "target", "ok")


def run(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        print(f"== {name}", flush=True)
        for figure in importlib.import_module(f"tests.benchmarks.bench_{name}").figures():
            assert tuple(figure) == KEYS, f"bench_{name} yields {tuple(figure)}"
            print("   " + "  ".join(f"{key}={show(figure[key])}" for key in KEYS if figure[key] is not None), flush=True)
            yield figure


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    chosen = sys.argv[1:] or known
    if unknown := set(chosen) - set(known):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    # Figures of benchmarks that do not run this time stay in the file.
    kept = [] if not OUT.exists() else [f for f in json.loads(OUT.read_text()) if f["benchmark"] not in chosen]
    figures = [{"benchmark": name, **figure} for name in chosen for figure in run([name])]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(kept + figures, indent=1) + "\n")
    table = Table("figure", "value", "unit", "against", "ratio", "target", "")
    for figure in figures:
        mark = {True: "[green]ok[/]", False: "[red]short[/]", None: ""}[figure["ok"]]
        table.add_row(*(show(figure[key]) if figure[key] is not None else "" for key in KEYS[:-1]), mark)
    Console(width=160).print(table)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

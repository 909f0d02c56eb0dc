"""Dashboards as the JSON files that Grafana loads. They are committed, and a test holds that they are current."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import fleet

FOLDER: Final = Path(__file__).parent / "json"
BOARDS: Final = {"fleet": fleet.build}


def render(name: str) -> str:
    """The JSON of one dashboard; keys sorted, so that a change of it reads as a small difference."""
    return JSONEncoder(sort_keys=True, indent=1).encode(BOARDS[name]()) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write every dashboard into ``folder`` and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json" for name in BOARDS]
    for name, file in zip(BOARDS, files, strict=True):
        file.write_text(render(name))
    return files


def outdated(folder: Path = FOLDER) -> list[Path]:
    """The files in ``folder`` that are missing or that ``write`` would change."""
    files = {name: folder / f"{name}.json" for name in BOARDS}
    return [file for name, file in files.items() if not file.exists() or file.read_text() != render(name)]

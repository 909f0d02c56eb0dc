"""The house rules that can be read off the source: floors, purity of ``replay/``, one locustfile, nothing foreign in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("loadgen", "replay", "tracing", "dashboards", "stack")

# Imports run downward only: who may import whom, beside itself. ``replay.x`` admits that module alone.
FLOORS = {
    "stack": ("replay", "tracing", "dashboards", "loadgen"),  # loadgen: only to find its folder, see below
    "loadgen": ("replay", "tracing"),
    "dashboards": ("tracing.names",),
    "tracing": ("replay.records", "replay.runs", "replay.wire", "replay.errors"),
    "replay": (),
}
# Inside replay, from the ground up; a module imports only from rows above its own (or its own row).
STOREYS = (
    ("replay.errors", "replay.windows"),
    ("replay.records", "replay.wire", "replay.sse", "replay.strict"),
    ("replay.traces", "replay.requests", "replay.schedule", "replay.slo", "replay.prompts", "replay.coldstart", "replay.hardware"),
    ("replay.policies.protocols", "replay.effects"),
    tuple(f"replay.policies.{role}" for role in ("balancers", "queues", "limiters", "autoscalers", "costs")),
    ("replay.fleet", "replay.engine"),
    ("replay.policies.spec",),  # builds the Policy that Fleet takes
    ("replay.inputs", "replay.virtual"),
    ("replay.runs",),
    ("replay.simulation",),
    ("replay.report",),
)  # fmt: skip


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions; ``from replay import runs`` counts as replay.runs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = (ROOT / Path(*node.module.split("."), alias.name)).with_suffix(".py")
                is_module = inner.exists() or inner.with_suffix("").is_dir()
                yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


@pytest.mark.parametrize("path", sources(*ROOMS), ids=module_of)
def test_imports_run_downward(path: Path) -> None:
    room = module_of(path).split(".")[0]
    for line, module in imports(path):
        if module.split(".")[0] in ROOMS and not within(module, room):
            assert any(within(module, allowed) for allowed in FLOORS[room]), f"{path.name}:{line} imports {module}"


def storey(module: str) -> int:
    matches = [(len(name), level) for level, row in enumerate(STOREYS) for name in row if within(module, name)]
    assert matches, f"{module} has no storey: give it one in STOREYS"
    return max(matches)[1]


@pytest.mark.parametrize("path", sources("replay"), ids=module_of)
def test_inside_replay_imports_run_downward_too(path: Path) -> None:
    own = module_of(path)
    if own in ("replay", "replay.policies"):
        return
    for line, module in imports(path):
        if within(module, "replay") and module not in ("replay", "replay.policies"):
            assert storey(module) <= storey(own), f"{path.name}:{line} imports {module}, which is above it"


def test_locust_is_launched_never_imported_outside_loadgen_and_loops_stay_in_their_rooms() -> None:
    rules = {"locust": "loadgen", "gevent": "loadgen", "asyncio": "stack", "uvloop": "stack"}
    for path in sources(*ROOMS):
        for line, module in imports(path):
            home = rules.get(module.split(".")[0])
            assert home in (None, module_of(path).split(".")[0]), f"{path}:{line} imports {module}"
            if module.split(".")[0] == "loadgen" and "stack" in path.parts:
                assert module == "loadgen", f"{path}:{line}: stack may only ask where loadgen lies"


def test_only_the_report_imports_pandas() -> None:
    for path in sources(*ROOMS):
        for line, module in imports(path):
            if module.split(".")[0] == "pandas":
                assert within(module_of(path), "replay.report"), f"{path}:{line}"


PURE = [path for path in sources("replay") if not within(module_of(path), "replay.report") and module_of(path) != "replay.runs"]


@pytest.mark.parametrize("path", PURE, ids=module_of)
def test_replay_has_no_clock_no_sleep_no_randomness_of_its_own(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("hash", "time.time", "time.sleep", "datetime.now", "datetime.datetime.now"), (
                f"{path.name}:{node.lineno}"
            )
            assert not re.fullmatch(r"time\.(monotonic|perf_counter|time)(_ns)?", called), (
                f"{path.name}:{node.lineno} reads a clock"
            )
            assert not re.fullmatch(r"random\.(random|randint|choice|shuffle|uniform|gauss|seed|sample)", called), (
                f"{path.name}:{node.lineno}"
            )
            assert called not in ("np.random.default_rng", "Random") or node.args, f"{path.name}:{node.lineno} draws without a seed"
        elif isinstance(node, ast.For | ast.comprehension):
            assert not isinstance(node.iter, ast.Set | ast.SetComp), f"{path.name} iterates over a set"
            is_set_call = isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) in ("set", "frozenset")
            assert not is_set_call, f"{path.name} iterates over a set"


@pytest.mark.parametrize("path", sources("replay"), ids=module_of)
def test_replay_opens_no_socket(path: Path) -> None:
    for line, module in imports(path):
        assert module.split(".")[0] not in ("socket", "http", "urllib", "ssl", "asyncio", "gevent", "subprocess", "threading"), (
            f"{path}:{line}"
        )


def test_loadgen_has_one_locustfile() -> None:
    # `locust -f loadgen/` imports every file there that does not start with an underscore.
    files = [path.name for path in (ROOT / "loadgen").rglob("*.py") if not path.name.startswith("_")]
    assert files == ["trace_replay.py"]


def test_importing_replay_does_not_import_pandas() -> None:
    import sys

    check = "import sys, replay, replay.fleet, replay.traces, replay.runs; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


def test_the_top_level_holds_what_it_should() -> None:
    allowed = {
        *ROOMS, "tests", "docs", ".ci", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "Makefile",
        "requirements.lock", ".gitignore", ".gitattributes", ".editorconfig", ".dockerignore",
    }  # fmt: skip
    assert {name.split("/")[0] for name in tracked()} <= allowed


def test_no_file_is_too_large_and_the_lock_names_no_address() -> None:
    for name in tracked():
        path = ROOT / name
        if path.is_file():
            assert path.stat().st_size < 1_000_000, name
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_source_files_can_be_held_in_the_head() -> None:
    long = {str(path.relative_to(ROOT)): n for path in sources(*ROOMS) if (n := len(path.read_text().splitlines())) > 520}
    assert not long, f"split these: {long}"

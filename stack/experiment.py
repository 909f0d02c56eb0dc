"""An experiment: one trace, one fleet, several policies, repeats. Read it, plan it, and carry it out live or in virtual time.

Each arm (policy x repeat) leaves a run directory; ``experiment.json`` beside them says which is which.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from replay import traces
from replay.errors import InputError
from replay.hardware import FleetSpec, fleet_spec, price
from replay.policies import spec as policies
from replay.records import NS_PER_S
from replay.runs import write_atomically
from replay.schedule import parse_duration_s
from replay.slo import Slo
from replay.strict import Lines, parameters, parse_yaml, place, read_bounded
from replay.traces import Shaping

SCHEMA_VERSION: Final = 1
KEYS: Final = ("name", "trace", "shaping", "fleet", "policies", "repeats", "seed", "slo", "drain_s")
SHAPING_KEYS: Final = ("from", "to", "busiest", "time_scale", "rate_scale", "jitter")


@dataclass(frozen=True, slots=True)
class Scalars:
    """The keys of an experiment that are plain values."""

    name: str = "experiment"
    trace: str = "azure-code-2023"
    repeats: int = 1
    seed: int = 0
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= 1000:
            raise InputError(f"is {self.repeats}", where="repeats", rule="1 to 1000")
        if not 0 < self.drain_s <= 3600:
            raise InputError(f"is {self.drain_s}", where="drain_s", rule="above 0, at most 3600 s")
        if not self.name or any(character in self.name for character in "/\\\0") or self.name.startswith("."):
            raise InputError(f"is {self.name!r}", where="name", rule="usable as a folder's name")


@dataclass(frozen=True)
class Experiment:
    """An experiment as written, checked."""

    scalars: Scalars
    shaping: Shaping
    fleet: FleetSpec
    policies: tuple[policies.PolicySpec, ...]
    slo: Slo

    @property
    def cold_start_s(self) -> float:
        """How long a new replica takes where we know it: only a stand-in declares it."""
        return self.fleet.phases().total_ns / NS_PER_S if self.fleet.kind == "stand-in" else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.scalars),
            "shaping": asdict(self.shaping),
            "fleet": self.fleet.model_dump(),
            "policies": [policies.to_dict(policy) for policy in self.policies],
            "slo": self.slo.terms(),
        }


@dataclass(frozen=True, slots=True)
class Arm:
    policy: policies.PolicySpec
    repeat: int

    @property
    def folder(self) -> str:
        return f"{self.policy.name}-{self.repeat}"


def load(path: Path) -> Experiment:
    """The experiment in a YAML file; relative paths in it are relative to the file."""
    document, lines = parse_yaml(read_bounded(path), str(path))
    return from_dict(document, where=str(path), lines=lines, folder=path.parent)


def from_dict(document: Any, *, where: str, lines: Lines | None = None, folder: Path = Path()) -> Experiment:
    """A checked experiment from plain data; ``InputError`` names place and rule."""
    lines = lines or {}
    if not isinstance(document, dict):
        raise InputError(f"is {type(document).__name__}", where=where, rule=f"a mapping with {', '.join(KEYS)}")
    for key in document:
        if key not in KEYS:
            raise InputError("unknown key", where=place(where, lines, (str(key),)), rule=f"one of {', '.join(KEYS)}")
    scalars = Scalars(**parameters(Scalars, {k: document[k] for k in Scalars.__slots__ if k in document}, where, lines, ()))
    trace = scalars.trace
    if trace not in traces.SHIPPED and (folder / trace).exists():
        scalars = replace(scalars, trace=str(folder / trace))
    listed = document.get("policies")
    if not isinstance(listed, list) or not listed:
        raise InputError("is no list", where=place(where, lines, ("policies",)), rule="at least one preset, file or policy")
    named = tuple(_policy(item, i, where, lines, folder) for i, item in enumerate(listed))
    names = [policy.name for policy in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice!r} twice", where=place(where, lines, ("policies",)), rule="every policy has a name of its own")
    if "fleet" not in document:
        raise InputError(
            "has no fleet", where=where, rule="fleet: {kind: stand-in | llama | urls, ...}", fix="fleet: {kind: stand-in}"
        )
    fleet = fleet_spec(document["fleet"], place(where, lines, ("fleet",)))
    return Experiment(
        scalars,
        _shaping(document.get("shaping") or {}, where, lines),
        fleet,
        tuple(policies.for_urls(policy, len(fleet.urls)) for policy in named) if fleet.urls else named,
        Slo(**parameters(Slo, document.get("slo") or {}, where, lines, ("slo",))),
    )


def _policy(item: Any, index: int, where: str, lines: Lines, folder: Path) -> policies.PolicySpec:
    if isinstance(item, str):
        return policies.load(folder / item if (folder / item).is_file() else item)
    inner = {path[2:]: line for path, line in lines.items() if path[:2] == ("policies", index)}
    return policies.from_dict(item, where=place(where, lines, ("policies", index)), lines=inner, default_name=f"policy-{index + 1}")


def _shaping(given: Any, where: str, lines: Lines) -> Shaping:
    at = place(where, lines, ("shaping",))
    if not isinstance(given, dict):
        raise InputError(f"is {given!r}", where=at, rule=f"a mapping of {', '.join(SHAPING_KEYS)}")
    for key in given:
        if key not in SHAPING_KEYS:
            raise InputError(
                "unknown key", where=place(where, lines, ("shaping", str(key))), rule=f"one of {', '.join(SHAPING_KEYS)}"
            )

    def seconds(key: str) -> float | None:
        return None if given.get(key) is None else parse_duration_s(given[key], place(where, lines, ("shaping", key)))

    scales = {}
    for key in ("time_scale", "rate_scale"):
        value = given.get(key, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise InputError(f"is {value!r}", where=place(where, lines, ("shaping", key)), rule="a number above 0")
        scales[key] = float(value)
    try:
        return Shaping(
            seconds("from"), seconds("to"), seconds("busiest"), jitter_s=seconds("jitter") or 0.0,
            time_scale=scales["time_scale"], rate_scale=scales["rate_scale"],
        )  # fmt: skip
    except InputError as error:
        raise InputError(error.what, where=f"{at} {error.where.removesuffix('_s')}", rule=error.rule, fix=error.fix) from error


def arms(experiment: Experiment) -> Iterator[Arm]:
    """Every policy once per repeat, in an order that turns at each repeat (A B, B A, ...), so that drift hits all alike."""
    for repeat in range(experiment.scalars.repeats):
        order = experiment.policies if repeat % 2 == 0 else experiment.policies[::-1]
        for policy in order:
            yield Arm(policy, repeat)


def plan(experiment: Experiment, repeat: int) -> pa.Table:
    """The shaped trace of one repeat. Jitter differs by repeat and is equal in all policies: repeats are pairs."""
    seed = experiment.scalars.seed * 1000 + repeat
    return traces.shape(traces.read(experiment.scalars.trace), replace(experiment.shaping, seed=seed))


def ground(experiment: Experiment, *, simulated: bool) -> dict[str, str]:
    """What the figures stand on: the first line of every report."""
    fleet = experiment.fleet
    profile = f"{fleet.model} on {fleet.gpu} x{fleet.tensor_parallel}, {experiment.cold_start_s:g} s cold start"
    if simulated:
        return {"kind": "simulated", "detail": profile}
    return {
        "stand-in": {"kind": "stand-in", "detail": profile},
        "llama": {"kind": "random-weights", "detail": "llama.cpp on CPU, a tiny random-weight model"},
        "urls": {"kind": "fleet", "detail": f"{len(fleet.urls)} endpoints"},
    }[fleet.kind]


def warnings(experiment: Experiment) -> list[str]:
    """What the reader of a plan should know before waiting for it."""
    found = []
    if experiment.scalars.repeats < 3:
        found.append(f"{experiment.scalars.repeats} repeat(s): point estimates only; an interval needs at least 3, a useful one 5")
    if len({policy.replicas.min for policy in experiment.policies}) > 1:
        found.append("the policies start with different numbers of replicas: their first minute is not comparable")
    if len(experiment.policies) < 2:
        found.append("one policy: nothing is compared")
    if not experiment.slo.terms():
        found.append("no slo: goodput and cost per good token will not be printed")
    if price(experiment.fleet) is None:
        found.append("no price is known for this fleet: costs will be unknown; set fleet.usd_per_gpu_hour")
    return found


def manifest(experiment: Experiment, arm: Arm, table: pa.Table, *, simulated: bool) -> dict[str, Any]:
    """The part of run.json that the experiment knows."""
    cost = price(experiment.fleet)
    return {
        "kind": "simulated" if simulated else "live",
        "ground": ground(experiment, simulated=simulated),
        "policy": {"name": arm.policy.name, "spec": policies.to_dict(arm.policy)},
        "fleet": experiment.fleet.model_dump(),
        "trace": {
            "name": Path(experiment.scalars.trace).name,
            "sha256": traces.sha256(experiment.scalars.trace),
            "rows": len(table),
            "shaping": asdict(experiment.shaping),
        },
        "seed": experiment.scalars.seed,
        "repeat": arm.repeat,
        "slo": experiment.slo.terms(),
        "prices": None if cost is None else {**cost._asdict(), "gpu": experiment.fleet.gpu},
        "planned_ns": int(table["arrival_at_ns"][-1].as_py()),
        "drain_ns": round(experiment.scalars.drain_s * NS_PER_S),
    }


def versions() -> dict[str, str]:
    """Our version and those of what the figures depend on."""
    return {name: metadata.version(name) for name in ("tidegauge", "locust", "gevent", "uvloop", "httptools", "pandas", "pyarrow")}


def create(experiment: Experiment, out: Path) -> Path:
    """A new folder ``out/<name>-<time>`` with experiment.json, written before the first arm begins."""
    started_ns = time.time_ns()
    identity = f"{experiment.scalars.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(started_ns / NS_PER_S))}"
    folder = out / identity
    for n in range(2, 1000):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = out / f"{identity}-{n}"
        except OSError as error:
            raise InputError(f"cannot be made: {error.strerror}", where=str(folder), fix="choose another --out") from error
    listing = [{"policy": arm.policy.name, "repeat": arm.repeat, "path": arm.folder} for arm in arms(experiment)]
    document = {
        "schema": SCHEMA_VERSION,
        "id": folder.name,
        "name": experiment.scalars.name,
        "created_unix_ns": started_ns,
        "spec": experiment.to_dict(),
        "slo": experiment.slo.terms(),
        "arms": listing,
    }
    write_atomically(folder / "experiment.json", json.dumps(document, indent=1) + "\n")
    return folder


def simulate(experiment: Experiment, folder: Path, done: Callable[[Arm], None]) -> None:
    """Every arm in virtual time, on all cores; ``done`` is called as each ends."""
    todo = list(arms(experiment))
    workers = min(len(todo), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(_simulate_arm, experiment, arm, folder / arm.folder): arm for arm in todo}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _simulate_arm(experiment: Experiment, arm: Arm, folder: Path) -> None:
    from replay import simulation

    table = plan(experiment, arm.repeat)
    known = manifest(experiment, arm, table, simulated=True)
    seed = experiment.scalars.seed * 1000 + arm.repeat
    result = simulation.simulate(table, arm.policy, experiment.fleet, seed=seed, drain_ns=known["drain_ns"])
    simulation.write(result, folder, {**known, "versions": versions()})

"""Policies as YAML: strict loading into a ``PolicySpec``, its JSON Schema, and the objects built from it.

    name: least-outstanding
    balancer: least_outstanding                   # a kind alone takes its defaults
    queue: {kind: fifo, length_max: 500, timeout_s: 30}
    limiter: {kind: token_bucket, tokens_per_min: 2000000}
    autoscaler: {kind: concurrency, target: 8}
    replicas: {min: 1, max: 4}
    slots_per_replica: 16                          # or unlimited: the engine queues

An unknown key fails with its place and the allowed names. Validation is pydantic's; the classes' fields are the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

from replay.errors import InputError
from replay.fleet import Policy
from replay.policies.autoscalers import AUTOSCALERS
from replay.policies.balancers import BALANCERS
from replay.policies.limiters import LIMITERS
from replay.policies.queues import QUEUES
from replay.strict import Lines, model, parameters, parse_yaml, place, read_bounded

ROLES: Final[dict[str, Mapping[str, type]]] = {
    "balancer": BALANCERS,
    "queue": QUEUES,
    "limiter": LIMITERS,
    "autoscaler": AUTOSCALERS,
}
DEFAULT_KINDS: Final = {"balancer": "round_robin", "queue": "fifo", "limiter": "unlimited", "autoscaler": "fixed"}


@dataclass(frozen=True, slots=True)
class Replicas:
    """The bounds that the fleet applies to every decision of the autoscaler."""

    min: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max or self.max < 1:
            raise InputError(f"min {self.min}, max {self.max}", rule="0 <= min <= max and max >= 1")


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy as written: per role its kind and parameters, validated, not yet built."""

    name: str
    roles: Mapping[str, tuple[str, Mapping[str, Any]]]
    replicas: Replicas = Replicas()
    slots_per_replica: int | Literal["unlimited"] = "unlimited"
    attempts_max: int = 2
    description: str = ""


def load(source: str | Path) -> PolicySpec:
    """The policy in a YAML file, or the preset of that name. Errors name file, line and key."""
    path = Path(source)
    if not path.suffix and not path.exists():
        names = list(preset_names())
        if str(source) not in names:
            raise InputError(
                f"no policy file or preset {str(source)!r}",
                rule=f"a .yaml file or one of {', '.join(names)}",
                fix="tidegauge policies",
            )
        text, where = (
            (resources.files("replay.policies") / "presets" / f"{source}.yaml").read_text(),
            f"preset {source}",
        )
    else:
        text, where = read_bounded(path), str(path)
    document, lines = parse_yaml(text, where)
    return from_dict(document, where=where, lines=lines, default_name=path.stem)


def preset_names() -> Iterator[str]:
    """Names of the presets that ship with the package, sorted."""
    folder = resources.files("replay.policies") / "presets"
    yield from sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def from_dict(document: Any, *, where: str = "policy", lines: Lines | None = None, default_name: str = "policy") -> PolicySpec:
    """A validated spec from plain data; ``InputError`` with place, rule and allowed names otherwise."""
    lines = lines or {}
    if not isinstance(document, dict):
        raise InputError(
            f"is {type(document).__name__}",
            where=where,
            rule="a mapping with balancer, queue, limiter, autoscaler, replicas",
        )
    allowed = [f.name for f in dataclasses.fields(PolicySpec) if f.name != "roles"] + list(ROLES)
    for key in document:
        if key not in allowed:
            raise InputError("unknown key", where=place(where, lines, (str(key),)), rule=f"one of {', '.join(sorted(allowed))}")
    roles = {role: _role(role, document.get(role, DEFAULT_KINDS[role]), where, lines) for role in ROLES}
    slots = document.get("slots_per_replica", "unlimited")
    if slots != "unlimited" and (not isinstance(slots, int) or isinstance(slots, bool) or slots < 1):
        raise InputError(
            f"is {slots!r}",
            where=place(where, lines, ("slots_per_replica",)),
            rule="a number of at least 1, or unlimited",
        )
    if slots == "unlimited" and roles["autoscaler"][0] == "queue_depth":
        raise InputError(
            "queue_depth with unlimited slots",
            where=place(where, lines, ("autoscaler",)),
            rule="the gateway's queue stays empty when the engines take everything",
            fix="slots_per_replica: 32, or autoscaler: concurrency",
        )
    attempts = document.get("attempts_max", 2)
    if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
        raise InputError(f"is {attempts!r}", where=place(where, lines, ("attempts_max",)), rule="a number of at least 1")
    replicas = Replicas(**parameters(Replicas, document.get("replicas", {}), where, lines, ("replicas",)))
    name, description = document.get("name", default_name), document.get("description", "")
    for key, value in (("name", name), ("description", description)):
        if not isinstance(value, str):
            raise InputError(f"is {value!r}", where=place(where, lines, (key,)), rule="text")
    return PolicySpec(name, roles, replicas, slots, attempts, description)


def _role(role: str, written: Any, where: str, lines: Lines) -> tuple[str, dict[str, Any]]:
    kinds = ROLES[role]
    document = {"kind": written} if isinstance(written, str) else written
    if not isinstance(document, dict) or "kind" not in document:
        raise InputError("has no kind", where=place(where, lines, (role,)), rule=f"kind: one of {', '.join(kinds)}")
    kind = document["kind"]
    if kind not in kinds:
        raise InputError(
            f"unknown kind {kind!r}",
            where=place(where, lines, (role, "kind")),
            rule=f"one of {', '.join(kinds)}",
            fix="tidegauge policies",
        )
    given = {key: value for key, value in document.items() if key != "kind"}
    return kind, parameters(kinds[kind], given, where, lines, (role,))


def to_dict(spec: PolicySpec) -> dict[str, Any]:
    """Plain data that ``from_dict`` reads back to an equal spec; every parameter is spelled out."""
    return {
        "name": spec.name,
        **({"description": spec.description} if spec.description else {}),
        **{role: {"kind": kind, **given} for role, (kind, given) in spec.roles.items()},
        "replicas": {"min": spec.replicas.min, "max": spec.replicas.max},
        "slots_per_replica": spec.slots_per_replica,
        "attempts_max": spec.attempts_max,
    }


def build(spec: PolicySpec, seed: int) -> Policy:
    """Fresh objects of a spec. Each role that draws gets a stream of its own, so that roles do not disturb each other."""
    parts: dict[str, Any] = {}
    for role, (kind, given) in spec.roles.items():
        part = parts[role] = ROLES[role][kind](**given)
        if any(f.name == "rng" for f in dataclasses.fields(part)):
            part.rng = Random(f"{seed}/{role}")
    slots = None if spec.slots_per_replica == "unlimited" else spec.slots_per_replica
    return Policy(
        spec.name,
        **parts,
        replicas_min=spec.replicas.min,
        replicas_max=spec.replicas.max,
        slots_per_replica=slots,
        attempts_max=spec.attempts_max,
    )


def for_urls(spec: PolicySpec, urls: int) -> PolicySpec:
    """The policy on a fleet of given endpoints: ``fixed`` means all of them, and no autoscaler gets more than there are."""
    kind, given = spec.roles["autoscaler"]
    if kind == "fixed":
        roles = {**spec.roles, "autoscaler": (kind, {**given, "replicas": urls})}
        return dataclasses.replace(spec, roles=roles, replicas=Replicas(urls, urls))
    return dataclasses.replace(spec, replicas=Replicas(min(spec.replicas.min, urls), min(spec.replicas.max, urls)))


def defaults(cls: type) -> dict[str, Any]:
    """The parameters of one kind and their defaults, as a policy file names them."""
    return {name: field.default for name, field in model(cls).model_fields.items()}


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a policy file, for editors: one branch per kind, with its parameters and text."""

    def branch(kind: str, cls: type) -> dict[str, Any]:
        schema = model(cls).model_json_schema()
        properties = {"kind": {"const": kind}, **schema.get("properties", {})}
        return {
            "type": "object",
            "title": kind,
            "description": (cls.__doc__ or "").split("\n\n")[0],
            "properties": properties,
            "required": ["kind", *schema.get("required", [])],
            "additionalProperties": False,
        }

    roles = {
        role: {
            "oneOf": [{"enum": list(kinds)}, *(branch(kind, cls) for kind, cls in kinds.items())],
            "default": DEFAULT_KINDS[role],
        }
        for role, kinds in ROLES.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Tidegauge policy",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string"},
            "description": {"type": "string"},
            **roles,
            "replicas": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"min": {"type": "integer", "minimum": 0}, "max": {"type": "integer", "minimum": 1}},
            },
            "slots_per_replica": {"oneOf": [{"type": "integer", "minimum": 1}, {"const": "unlimited"}], "default": "unlimited"},
            "attempts_max": {"type": "integer", "minimum": 1, "default": 2},
        },
    }

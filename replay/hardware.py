"""What a fleet is made of: the step-time profile of a model on a GPU, the chip's limits, its memory and its price.

The figures are dated data in ``data/``; this file reads and checks them. No clock; it reads nothing but those files.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from replay.coldstart import ColdStart, cold_start
from replay.errors import InputError

BLOCK_TOKENS: Final = 16  # vLLM's KV block
GPU_MEMORY_SHARE: Final = 0.9  # vLLM's gpu_memory_utilization
ACTIVATION_BYTES: Final = 2 * 2**30  # activations and captured graphs a GPU; an allowance, not measured


class Chip(NamedTuple):
    tflops: float  # dense bf16
    bandwidth_gb_s: float
    memory_mib: int


class Model(NamedTuple):
    parameters: float
    embedding: float  # of these, in the embedding table: looked up, never multiplied (and as many again in the output head)
    kv_bytes: int  # a token


class Price(NamedTuple):
    usd_per_gpu_hour: float
    source: str
    date: str | None


class Profile(NamedTuple):
    """Step time of one replica: ``max(F, a + b*P) + c*A + d*B + e*K`` milliseconds (AIConfigurator's operator tables, fitted).

    P = prefill tokens in the step, A = sum over its prefill chunks of chunk*(past + chunk/2), B = decoding requests,
    K = sum of their context lengths. ``estimated`` where it is derived from another GPU instead of measured.
    """

    F: float
    a: float
    b: float
    c: float
    d: float
    e: float
    model: str
    gpu: str
    tensor_parallel: int
    source: str
    engine: str = ""
    error: str = ""
    estimated: bool = False

    def step_ms(self, prefill_tokens: int = 0, attention: float = 0.0, decoding: int = 0, context: int = 0) -> float:
        return max(self.F, self.a + self.b * prefill_tokens) + self.c * attention + self.d * decoding + self.e * context

    def describe(self) -> str:
        """One line for reports: what the profile is and how far to trust it."""
        kind = "estimated" if self.estimated else self.engine
        return f"{self.model} on {self.gpu} x{self.tensor_parallel} ({kind}; {self.source}; error: {self.error})"


class FleetSpec(BaseModel):
    """The fleet of an experiment, as its YAML says it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kind: Literal["stand-in", "llama", "urls"]
    model: str = "meta-llama/Meta-Llama-3.1-8B"
    gpu: str = "a100_sxm"
    tensor_parallel: int = Field(default=1, ge=1)
    cold_start: str | dict[str, float] = "snapshot"  # a preset, or seconds by phase
    max_num_seqs: int = Field(default=256, ge=1)  # vLLM's defaults, also below
    token_budget: int = Field(default=2048, ge=1)
    usd_per_gpu_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    urls: list[str] = []
    api_key_env: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> FleetSpec:
        if (self.kind == "urls") != bool(self.urls):
            raise InputError(
                f"kind {self.kind!r} with {len(self.urls)} urls", rule="urls are given for kind 'urls' and for no other"
            )
        if self.token_budget < self.max_num_seqs:
            raise InputError(
                f"token_budget {self.token_budget} is below max_num_seqs {self.max_num_seqs}",
                rule="a step must hold one token of every running request",
            )
        cold_start(self.cold_start)
        if self.kind == "stand-in":
            kv_blocks(profile(self))
        return self

    def phases(self) -> ColdStart:
        return cold_start(self.cold_start)


_UNION_ARMS: Final = ("str", "dict[str,float]")  # pydantic puts the arm it tried into the path; a user knows only the key


def fleet_spec(data: object, where: str = "fleet") -> FleetSpec:
    """The spec in a YAML or JSON mapping. Raises InputError with the path of the first key at fault."""
    try:
        return FleetSpec.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join([where, *(str(part) for part in first["loc"] if part not in _UNION_ARMS)])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            below = f"{path}.{cause.where}" if cause.where else path
            raise InputError(cause.what, where=below, rule=cause.rule, fix=cause.fix) from error
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(FleetSpec.model_fields)
            raise InputError("unknown key", where=path, rule=f"one of {allowed}") from error
        raise InputError(f"is {first['input']!r}", where=path, rule=first["msg"]) from error


def profile(spec: FleetSpec) -> Profile:
    """The step-time profile for the spec's model, GPU and tensor parallel degree; InputError lists the known keys."""
    return _profile(f"{spec.model}|{spec.gpu}|tp{spec.tensor_parallel}")


def price(spec: FleetSpec) -> Price | None:
    """What a GPU-hour costs: the spec's own figure, else the dated list price; None where neither is known.

    Only a stand-in stands for a GPU: a replica on this machine or behind a URL has no price but the declared one.
    """
    if spec.usd_per_gpu_hour is not None:
        return Price(spec.usd_per_gpu_hour, "declared in the fleet", None)
    listed = _data("prices.yaml").get(spec.gpu) if spec.kind == "stand-in" else None
    return Price(**listed) if listed else None


def kv_blocks(profile: Profile) -> int:
    """KV blocks one replica holds: vLLM's share of the memory less weights (bf16) and an allowance for activations."""
    chip, model = _chip(profile.gpu), _model(profile.model)
    memory = (chip.memory_mib * 2**20 * GPU_MEMORY_SHARE - ACTIVATION_BYTES) * profile.tensor_parallel
    blocks = int((memory - 2 * model.parameters) // (model.kv_bytes * BLOCK_TOKENS))
    if blocks < 1:
        what = f"{profile.model} leaves no memory for its KV cache on {profile.gpu} x{profile.tensor_parallel}"
        raise InputError(what, fix="a larger gpu, or more of them in tensor_parallel")
    return blocks


def check_profile(profile: Profile) -> Profile:
    """The profile itself, or InputError where a step time is negative or faster than the chip allows.

    A step moves all weights but the embedding table and the KV of its contexts once (bytes/bandwidth), and multiplies every
    token with all weights but embedding and output head (FLOPs/peak). Unknown chips and models are not checked for speed.
    """
    where = f"profile {profile.model}|{profile.gpu}|tp{profile.tensor_parallel}"
    for name in "Fabcde":
        value = getattr(profile, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{value} ms", where=f"{where}.{name}", rule="0 or more")
    if profile.F == 0:
        raise InputError("0 ms", where=f"{where}.F", rule="above 0: a step takes time")
    if profile.gpu not in _data("chips.yaml")["chips"] or profile.model not in _data("chips.yaml")["models"]:
        return profile
    chip, model, gpus = _chip(profile.gpu), _model(profile.model), profile.tensor_parallel
    per_ms = chip.bandwidth_gb_s * 1e6 * gpus
    token_ms = 2 * (model.parameters - 2 * model.embedding) / (chip.tflops * 1e9 * gpus)
    limits = (
        ("one decode step", profile.step_ms(decoding=1), 2 * (model.parameters - model.embedding) / per_ms),
        ("one token of context in decode", profile.e, model.kv_bytes / per_ms),
        ("one token of prefill", profile.b, token_ms),
        ("a decode step of 256 requests", profile.step_ms(decoding=256), 256 * token_ms),
    )
    for what, claimed_ms, least_ms in limits:
        if claimed_ms < least_ms:
            raise InputError(
                f"{what} takes {claimed_ms:.3g} ms, the chip needs {least_ms:.3g} ms", where=where,
                rule="no profile is faster than its chip (FLOPs/peak, bytes/bandwidth)",
            )  # fmt: skip
    return profile


@cache
def _profile(key: str) -> Profile:
    data = _data("step_profiles.json")
    entry = data["profiles"].get(key)
    if entry is None:
        known = ", ".join(sorted(data["profiles"]))
        raise InputError(f"no profile {key!r}", rule=f"one of {known}", fix="choose model, gpu and tensor_parallel of one of them")
    model, gpu, degree = key.split("|")
    if "derived_from" in entry:
        return check_profile(_derived(_profile(entry["derived_from"]), gpu))
    source = f"{data['source']}, {data['date']}"
    return check_profile(Profile(**entry, model=model, gpu=gpu, tensor_parallel=int(degree.removeprefix("tp")), source=source))


def _derived(base: Profile, gpu: str) -> Profile:
    """``base`` moved to another GPU: what memory bounds by bandwidth, what arithmetic bounds by dense FLOPs.

    ``d``, the cost of one more decoding request, is arithmetic under a memory-bound step: the scarcer of the two counts
    (by bandwidth alone, 256 requests on an A10G would beat the chip).
    """
    slower = _chip(base.gpu).bandwidth_gb_s / _chip(gpu).bandwidth_gb_s
    weaker = _chip(base.gpu).tflops / _chip(gpu).tflops
    return base._replace(
        F=base.F * slower, e=base.e * slower, d=base.d * max(slower, weaker),
        a=base.a * weaker, b=base.b * weaker, c=base.c * weaker,
        gpu=gpu, estimated=True, error=f"unknown: scaled from {base.gpu} by bandwidth and FLOPs", source=f"derived; {base.source}",
    )  # fmt: skip


def _chip(gpu: str) -> Chip:
    chips = _data("chips.yaml")["chips"]
    if gpu not in chips:
        raise InputError(f"unknown gpu {gpu!r}", rule=f"one of {', '.join(chips)}")
    return Chip(**chips[gpu])


def _model(name: str) -> Model:
    models = _data("chips.yaml")["models"]
    if name not in models:
        raise InputError(f"unknown model {name!r}", rule=f"one of {', '.join(models)}")
    return Model(**models[name])


@cache
def _data(name: str) -> dict[str, Any]:
    text = (files("replay") / "data" / name).read_text()
    loaded: dict[str, Any] = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    return loaded

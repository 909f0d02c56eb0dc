"""What a gateway is started with, checked before anything is: JSON or keyword arguments in, ``GatewayConfig`` out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replay.errors import InputError
from replay.hardware import FleetSpec, fleet_spec
from replay.policies import spec as policies
from replay.strict import parameters, read_bounded
from stack import httpd
from stack.upstream import Waits


@dataclass(frozen=True)
class GatewayLimits:
    """Sizes in bytes, waits in seconds."""

    header_bytes: int = httpd.Limits().header_bytes
    body_bytes: int = httpd.Limits().body_bytes
    header_s: float = httpd.Limits().header_s
    body_s: float = httpd.Limits().body_s
    idle_s: float = httpd.Limits().idle_s
    write_s: float = httpd.Limits().write_s
    connect_s: float = Waits().connect_s
    silence_s: float = Waits().silence_s
    drain_s: float = 30.0  # what is inside when the gateway is told to stop may take so long to end

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0 and name != "drain_s":
                raise InputError(f"is {value}", where=name, rule="above 0")

    def http(self) -> httpd.Limits:
        return httpd.Limits(*(getattr(self, name) for name in httpd.Limits._fields))

    def waits(self) -> Waits:
        return Waits(self.connect_s, self.silence_s)


@dataclass(frozen=True)
class _Scalars:
    host: str = "127.0.0.1"
    port: int = 0
    run_dir: str = ""
    seed: int = 0
    id: str = ""
    recorder: bool = True
    slo: dict[str, float] | None = None


@dataclass(frozen=True)
class GatewayConfig:
    """A checked configuration. ``api_keys`` maps a key to its tenant; ``recorder`` False leaves the recorder process out."""

    run_dir: Path
    policy: policies.PolicySpec
    fleet: FleetSpec
    host: str = "127.0.0.1"
    port: int = 0
    seed: int = 0
    id: str = ""  # of the run; made where it is empty
    recorder: bool = True
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    slo: Mapping[str, float] = field(default_factory=dict)
    limits: GatewayLimits = GatewayLimits()

    @property
    def gpu(self) -> str:
        """What is billed: a stand-in stands for its GPU, the others are whatever they run on."""
        return self.fleet.gpu if self.fleet.kind == "stand-in" else "cpu" if self.fleet.kind == "llama" else "unknown"

    @classmethod
    def of(cls, document: Any, where: str = "config") -> GatewayConfig:
        """From plain data; InputError with the place of the first key at fault."""
        if not isinstance(document, dict):
            raise InputError("is no mapping", where=where, rule="run_dir, policy, fleet and, as needed, host, port, seed, limits")
        rest = {key: value for key, value in document.items() if key not in ("policy", "fleet", "limits", "api_keys")}
        scalars = parameters(_Scalars, rest, where, {}, ())
        for key in ("run_dir", "policy", "fleet"):
            if not document.get(key):
                raise InputError("is missing", where=f"{where} {key}", fix="see python -m stack.gateway --help")
        scalars.update(run_dir=Path(scalars["run_dir"]), slo=scalars["slo"] or {})
        fleet = fleet_spec(document["fleet"], f"{where} fleet")
        policy = policies.from_dict(document["policy"], where=f"{where} policy")
        return cls(
            api_keys=api_keys(document.get("api_keys") or {}, f"{where} api_keys"),
            policy=policies.for_urls(policy, len(fleet.urls)) if fleet.urls else policy,
            fleet=fleet,
            limits=GatewayLimits(**parameters(GatewayLimits, document.get("limits", {}), where, {}, ("limits",))),
            **scalars,
        )

    @classmethod
    def read(cls, path: Path) -> GatewayConfig:
        try:
            document = json.loads(read_bounded(path))
        except json.JSONDecodeError as error:
            raise InputError(f"is not JSON: {error}", where=str(path), fix="python -m json.tool on the file") from error
        return cls.of(document, str(path))


def api_keys(document: Any, where: str) -> dict[str, str]:
    """A mapping of key to tenant. The error names the place by number: a key is never shown."""
    if not isinstance(document, dict):
        raise InputError("is no mapping", where=where, rule="key: tenant")
    for number, (key, tenant) in enumerate(document.items(), 1):
        if not (isinstance(key, str) and key and isinstance(tenant, str) and tenant):
            raise InputError("is no text", where=f"{where}, entry {number}", rule="key: tenant, both texts and not empty")
    return dict(document)


def url(host: str, port: int) -> str:
    """Where a gateway listens, as its clients write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

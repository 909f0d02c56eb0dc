"""The service-level objective: up to three limits that a request has to keep, all of them, to be good."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from replay.errors import InputError

_TERM = re.compile(r"\s*(ttft|tpot|e2e)\s*<=?\s*([0-9]*\.?[0-9]+)\s*(ms|s)\s*")
_EXAMPLE = "write it like 'ttft<=1s,tpot<=50ms' (terms: ttft, tpot, e2e; units: ms, s)"


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds; a term that is None is not part of the objective."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name, limit_s in asdict(self).items():
            if limit_s is not None and not limit_s > 0:
                raise InputError(f"{name} is {limit_s}", where="slo", rule="a limit is above 0", fix=_EXAMPLE)

    @classmethod
    def parse(cls, text: str) -> Slo:
        """An objective from its short form.

        >>> Slo.parse("ttft<=1s, tpot<=50ms")
        Slo(ttft_s=1.0, tpot_s=0.05, e2e_s=None)
        """
        limits: dict[str, float] = {}
        for term in text.split(","):
            if not (match := _TERM.fullmatch(term)):
                raise InputError(f"cannot read {term.strip()!r}", where="--slo", fix=_EXAMPLE)
            name, number, unit = match.groups()
            if f"{name}_s" in limits:
                raise InputError(f"names {name} twice", where="--slo", rule="one limit a term", fix=_EXAMPLE)
            limits[f"{name}_s"] = float(number) / (1000 if unit == "ms" else 1)
        return cls(**limits)

    @classmethod
    def from_mapping(cls, limits: Mapping[str, float | None] | None) -> Slo:
        """An objective as manifests hold it: {"ttft_s": 1.0}; unknown terms are refused."""
        limits = limits or {}
        unknown = sorted(set(limits) - {"ttft_s", "tpot_s", "e2e_s"})
        if unknown:
            raise InputError(f"unknown term {unknown[0]!r}", where="slo", rule="one of ttft_s, tpot_s, e2e_s", fix=_EXAMPLE)
        return cls(**limits)

    def __bool__(self) -> bool:
        return any(limit_s is not None for limit_s in asdict(self).values())

    def __str__(self) -> str:
        limits = {name: limit_s for name, limit_s in asdict(self).items() if limit_s is not None}
        return ", ".join(f"{name[:-2].upper()} ≤ {limit_words(limit_s)}" for name, limit_s in limits.items()) or "none"


def limit_words(limit_s: float) -> str:
    """A limit as it was set: 0.05 is "50 ms", 2.0 is "2 s"."""
    return f"{limit_s * 1000:g} ms" if limit_s < 1 else f"{limit_s:g} s"

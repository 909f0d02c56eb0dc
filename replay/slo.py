"""The service-level objective: up to three limits that a request has to keep, all of them, to be good."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from replay.errors import InputError
from replay.schedule import parse_duration_s

_TERM = re.compile(r"(\w+)\s*(?:<=?|=)\s*(.+)")
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
        for term in filter(None, (term.strip() for term in text.split(","))):
            match = _TERM.fullmatch(term)
            if match is None or f"{match[1]}_s" not in cls.__slots__:
                raise InputError(f"cannot read {term!r}", where="--slo", fix=_EXAMPLE)
            if f"{match[1]}_s" in limits:
                raise InputError(f"names {match[1]} twice", where="--slo", rule="one limit a term", fix=_EXAMPLE)
            limits[f"{match[1]}_s"] = parse_duration_s(match[2], where=f"--slo {match[1]}")
        return cls(**limits)

    @classmethod
    def from_mapping(cls, limits: Mapping[str, float | None] | None) -> Slo:
        """An objective as manifests hold it: {"ttft_s": 1.0}; unknown terms are refused."""
        limits = limits or {}
        unknown = sorted(set(limits) - {"ttft_s", "tpot_s", "e2e_s"})
        if unknown:
            raise InputError(f"unknown term {unknown[0]!r}", where="slo", rule="one of ttft_s, tpot_s, e2e_s", fix=_EXAMPLE)
        return cls(**limits)

    def terms(self) -> dict[str, float]:
        """The limits that are set, as manifests hold them."""
        return {name: limit_s for name, limit_s in asdict(self).items() if limit_s is not None}

    def __bool__(self) -> bool:
        return bool(self.terms())

    def __str__(self) -> str:
        return ", ".join(f"{name[:-2].upper()} ≤ {limit_words(limit_s)}" for name, limit_s in self.terms().items()) or "none"


def limit_words(limit_s: float) -> str:
    """A limit as it was set: 0.05 is "50 ms", 2.0 is "2 s"."""
    return f"{limit_s * 1000:g} ms" if limit_s < 1 else f"{limit_s:g} s"

"""Runs -> one report: policies, comparisons, verdict, and everything a page has to own up to.

    report = assemble(["runs/20261116"], slo=Slo.parse("ttft<=1s"))

Runs are read one after another and reduced at once, so memory holds one run's rows, not all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from replay.errors import InputError
from replay.report.compare import PAIRS_MIN, Comparison, Interval, compare, t_interval
from replay.report.load import REPORT_COLUMNS, load_run
from replay.report.metrics import Measured, Totals, figures, measure, pool
from replay.report.timeline import Timeline, timeline
from replay.report.verdict import COST_METRICS, TARGET, Standing, Verdict, decide
from replay.runs import Manifest, RunDir
from replay.slo import Slo

TOKENS_TOLERANCE: Final = 0.01  # arms whose answers differ more in length did not do the same work
GROUNDS: Final = {
    "fleet": "Live on your fleet",
    "stand-in": "Live path on stand-in GPUs, latencies from a profile",
    "random-weights": "Live on a real engine with random weights",
    "simulated": "Simulated in virtual time",
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of one policy, reduced."""

    policy: str
    repeat: int
    path: Path
    name: str
    manifest: Manifest
    faults: list[str]
    measured: Measured
    figures: dict[str, float | None]
    conserved: bool | None  # planned = sum of statuses, every one with a row; None: there is no plan to hold it against


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy over its repeats. Figures are over its valid runs, or over all of them where none is valid."""

    name: str
    arms: list[Arm]
    counted: list[Arm]
    totals: Totals
    figures: dict[str, float | None]
    attainment: Interval | None  # over repeats, inside [0, 1]
    faults: list[str]  # why it cannot win; empty where it can
    timeline: Timeline  # of its first repeat
    spec: dict[str, Any]
    same: int  # repeats left out, since they were the same simulation again


@dataclass(frozen=True, slots=True)
class Report:
    """What every rendering shows; renderings add no figure of their own."""

    title: str
    ground: str
    question: str
    slo: Slo
    target: float
    baseline: str
    policies: list[Policy]
    comparisons: list[Comparison]
    verdict: Verdict
    warnings: list[str]
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """Every fault of every run, by name: what a page marks in red."""
        of_runs = [f"{a.policy}, repeat {a.repeat}: {fault}" for p in self.policies for a in p.arms for fault in a.faults]
        return of_runs + [f"{p.name}: {fault}" for p in self.policies for fault in p.faults if fault not in p.arms[0].faults]

    def versus(self, policy: str) -> dict[str, Comparison]:
        """The comparisons of ``policy`` against the baseline by metric; empty for the baseline and where none was made."""
        return {c.metric: c for c in self.comparisons if c.policy == policy}


def assemble(paths: Sequence[str | Path], slo: Slo | None = None, baseline: str | None = None, target: float = TARGET) -> Report:
    """The report over run directories and experiment folders. ``slo``: instead of the one the runs declare.

    ``baseline`` names the policy that the others are compared with (default: the first one).
    """
    if not 0 < target <= 1:
        raise InputError(
            f"the target is {target}", where="--target", rule="above 0, at most 1", fix="0.95 means 95 % of requests good"
        )
    experiment, places, warnings = _places(paths)
    manifests = [RunDir.open(place).manifest for place in places]
    slo = slo or _declared_slo(experiment, manifests)
    policies = _policies(places, manifests, slo)
    names = [policy.name for policy in policies]
    baseline = baseline or names[0]
    if baseline not in names:
        raise InputError(
            f"no policy is named {baseline!r}", where="--baseline", rule="one of the runs' policies", fix=" or ".join(names)
        )
    policies.sort(key=lambda policy: policy.name != baseline)  # stable: the baseline first, then as they were given
    unlike = _unlike(policies)
    question = _question(policies)
    comparisons, verdict = [], Verdict("not comparable", f"No verdict: {unlike}")
    if not unlike:
        policies[1:] = [replace(p, faults=p.faults + _unequal_work(policies[0], p)) for p in policies[1:]]
        comparisons = [c for policy in policies[1:] for c in _against(policies[0], policy, question)]
        verdict = _decide(policies, slo, target, question)
    return Report(
        title=str(experiment.get("name") or ", ".join(names)), ground=_ground(policies), question=question, slo=slo, target=target,
        baseline=baseline, policies=policies, comparisons=comparisons, verdict=verdict,
        warnings=warnings + _warnings(policies), spec=experiment.get("spec") or {},
    )  # fmt: skip


def _places(paths: Sequence[str | Path]) -> tuple[dict[str, Any], list[Path], list[str]]:
    """(experiment, run directories, warnings): experiment folders opened into their arms."""
    experiment: dict[str, Any] = {}
    places: list[Path] = []
    warnings: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError("does not exist", where=str(path), fix="name a folder under runs/")
        if not (path / "experiment.json").is_file():
            places.append(path)
            continue
        found = json.loads((path / "experiment.json").read_text())
        experiment = experiment or found
        for arm in found["arms"]:
            if (path / arm["path"] / "run.json").is_file():
                places.append(path / arm["path"])
            else:
                warnings.append(f"{arm['policy']}, repeat {arm['repeat']} left no run: it is missing here")
    if not places:
        raise InputError("holds no run", where=", ".join(map(str, paths)), fix="name a folder that `tidegauge run` has filled")
    return experiment, places, warnings


def _declared_slo(experiment: dict[str, Any], manifests: Sequence[Manifest]) -> Slo:
    if experiment.get("slo"):
        return Slo.from_mapping(experiment["slo"])
    declared = {Slo.from_mapping(manifest.get("slo")) for manifest in manifests}
    if len(declared) > 1:
        raise InputError("the runs declare different objectives", fix="say which one with --slo 'ttft<=1s,tpot<=50ms'")
    return declared.pop()


def _policies(places: Sequence[Path], manifests: Sequence[Manifest], slo: Slo) -> list[Policy]:
    """Runs by policy in the order given; a repeat number that comes twice is taken as the next free one."""
    groups: dict[str, dict[int, tuple[Path, Manifest]]] = {}
    for place, manifest in zip(places, manifests, strict=True):
        name = str((manifest.get("policy") or {}).get("name") or manifest.get("id") or place.name)
        taken = groups.setdefault(name, {})
        repeat = int(manifest.get("repeat") or 0)
        taken[repeat if repeat not in taken else max(taken) + 1] = (place, manifest)
    return [_policy(name, runs, slo) for name, runs in groups.items()]


def _policy(name: str, runs: dict[int, tuple[Path, Manifest]], slo: Slo) -> Policy:
    arms: list[Arm] = []
    shown: Timeline | None = None
    for repeat, (place, manifest) in sorted(runs.items()):
        run = load_run(place, REPORT_COLUMNS)
        measured = measure(run, slo)
        if manifest.get("kind") == "simulated" and any(measured.totals == arm.measured.totals for arm in arms):
            continue  # the same simulation again, to the last digit: no repeat
        conserved = None if run.planned is None else not (run.lost or run.repeated or run.foreign)
        arms.append(Arm(name, repeat, place, run.name, run.manifest, run.faults(), measured, figures(measured.totals), conserved))
        shown = shown or timeline(run)
    assert shown is not None
    counted = [arm for arm in arms if not arm.faults] or arms
    totals = pool([arm.measured.totals for arm in counted])
    shares = [arm.figures["attainment"] for arm in counted]
    interval = t_interval([s for s in shares if s is not None])
    if interval is not None:
        interval = Interval(interval.mean, max(0.0, interval.low), min(1.0, interval.high))
    faults = arms[0].faults if all(arm.faults for arm in arms) else []
    spec = (arms[0].manifest.get("policy") or {}).get("spec") or {}
    return Policy(name, arms, counted, totals, figures(totals), interval, list(faults), shown, spec, len(runs) - len(arms))


def _pairs(a: Policy, b: Policy) -> list[tuple[Arm, Arm]]:
    """Pairs of valid runs by repeat."""
    left = {arm.repeat: arm for arm in a.arms if not arm.faults}
    return [(left[arm.repeat], arm) for arm in b.arms if arm.repeat in left and not arm.faults]


def _against(baseline: Policy, policy: Policy, question: str) -> list[Comparison]:
    pairs = [(a.figures, b.figures) for a, b in _pairs(baseline, policy)]
    return compare(baseline.name, policy.name, (baseline.figures, policy.figures), pairs, question)


def _decide(policies: Sequence[Policy], slo: Slo, target: float, question: str) -> Verdict:
    by_name = {policy.name: policy for policy in policies}
    able = [policy for policy in policies if not policy.faults]
    standings = [
        Standing(p.name, p.figures["attainment"], p.attainment, {m: p.figures[m] for m in COST_METRICS}, p.faults) for p in policies
    ]
    pairs = [len(_pairs(a, b)) for a in able for b in able if a is not b] or [len(policy.counted) for policy in able]

    def ask(a: str, b: str, metric: str) -> Comparison:
        return next(c for c in _against(by_name[a], by_name[b], question) if c.metric == metric)

    return decide(standings, slo, target, min(pairs, default=0), ask)


def _trace_key(arm: Arm) -> str:
    trace = arm.manifest.get("trace") or {}
    return json.dumps([trace.get("sha256"), trace.get("rows"), trace.get("shaping")], sort_keys=True)


def _unlike(policies: Sequence[Policy]) -> str:
    """Why these runs are not compared with each other; empty where they may be."""
    grounds = {str((arm.manifest.get("ground") or {}).get("kind")): arm for p in policies for arm in p.arms}
    if len(grounds) > 1:
        return f"the runs stand on different ground ({', '.join(sorted(grounds))}); report each on its own."
    seen: dict[int, Arm] = {}
    for arm in (arm for policy in policies for arm in policy.arms):
        first = seen.setdefault(arm.repeat, arm)
        if _trace_key(first) != _trace_key(arm):
            return (
                f"the runs replayed different traces in repeat {arm.repeat}: {first.policy} {_trace_words(first)}, "
                f"{arm.policy} {_trace_words(arm)}; compare runs of one trace and shaping."
            )
    return ""


def _trace_words(arm: Arm) -> str:
    trace = arm.manifest.get("trace") or {}
    return f"{trace.get('name', 'an unnamed trace')} ({trace.get('rows', '?')} rows)"


def _question(policies: Sequence[Policy]) -> str:
    """What an interval over these repeats is about: this trace again, or windows like these."""
    arms = policies[0].arms
    shapings = [(arm.manifest.get("trace") or {}).get("shaping") or {} for arm in arms]
    windows = {json.dumps([s.get("from_s"), s.get("to_s"), s.get("busiest_s")]) for s in shapings}
    if len(windows) > 1:
        return "windows like these" if len(windows) == len(arms) else "this trace again, over several windows"
    jitter_s = max((float(s.get("jitter_s") or 0) for s in shapings), default=0)
    noise = [f"arrivals jittered by {jitter_s:g} s"] * (jitter_s > 0)
    noise += ["service times drawn anew"] * ((arms[0].manifest.get("ground") or {}).get("kind") == "simulated")
    return f"this trace again ({', '.join(noise)})" if noise else "this trace again"


def _ground(policies: Sequence[Policy]) -> str:
    """The first line of every rendering."""
    found: list[str] = []
    for arm in (arm for policy in policies for arm in policy.arms):
        ground = arm.manifest.get("ground") or {}
        words = GROUNDS.get(str(ground.get("kind")), "Ground not stated by the run")
        line = f"{words}: {ground['detail']}" if ground.get("detail") else words
        if line not in found:
            found.append(line)
    return "; ".join(found)


def _unequal_work(baseline: Policy, policy: Policy) -> list[str]:
    """The fault of a policy whose answers to the same requests differ in length from the baseline's: not the same work."""
    for a, b in _pairs(baseline, policy):
        left, right = a.measured.tokens, b.measured.tokens
        if len(left) != len(right):
            continue
        both = ~np.isnan(left) & ~np.isnan(right)
        apart = float(right[both].sum(dtype=float) / max(left[both].sum(dtype=float), 1)) - 1
        if both.any() and abs(apart) > TOKENS_TOLERANCE:
            longer = "longer" if apart > 0 else "shorter"
            return [f"its answers to the same requests are {abs(apart):.1%} {longer} than those under {baseline.name}"]
    return []


def _warnings(policies: Sequence[Policy]) -> list[str]:
    """What a reader has to know beside the figures."""
    warnings = []
    for policy in policies:
        totals, invalid = policy.totals, [arm for arm in policy.arms if arm.faults]
        if invalid and len(invalid) < len(policy.arms):
            warnings.append(f"{policy.name}: figures are over the {len(policy.counted)} valid of {len(policy.arms)} runs")
        if policy.same:
            warnings.append(
                f"{policy.name}: {policy.same} repeats are an earlier simulation again, not counted; jitter the arrivals"
            )
        if shares := [
            found["host_busy_share"] for arm in policy.arms if (found := arm.manifest.get("validity", {})).get("host_bound")
        ]:
            warnings.append(
                f"{policy.name}: host-bound, the sender's machine was {max(shares):.0%} busy; figures are partly its own"
            )
        if not totals["ok"]:
            warnings.append(f"{policy.name}: no request succeeded, so there are no latencies of ok requests")
        if totals["no_usage"]:
            warnings.append(
                f"{policy.name}: {totals['no_usage']:,.0f} ok requests a run came without usage; their tokens are not counted"
            )
        if totals["length_off"]:
            warnings.append(f"{policy.name}: {totals['length_off']:,.0f} answers a run were over 10 % off their recorded length")
        if totals["gpu_s"] is None:
            warnings.append(f"{policy.name}: no replica lifetimes were recorded, so GPU-hours and cost are unknown")
        elif totals["cost_usd"] is None:
            warnings.append(f"{policy.name}: no price per GPU-hour is known, so cost is unknown")
    if 1 < (count := min(len(policy.counted) for policy in policies)) < PAIRS_MIN:
        warnings.append(f"{count} repeats a policy: intervals need at least {PAIRS_MIN}")
    return warnings

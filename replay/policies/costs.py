"""What a fleet cost: replica lifetimes x a price, pro rata and on demand. Pure arithmetic, units in the names.

A replica is paid from the moment it was *requested* (the machine is yours while it boots) to the moment it stopped, cut to
the window that the tokens were counted in. Null is "not known", never 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from replay.records import NS_PER_S, ReplicaLifetime

S_PER_HOUR = 3600


def billed_ns(life: ReplicaLifetime, start_ns: int, end_ns: int) -> int:
    """Nanoseconds of ``life`` from requested to stopped inside [start_ns, end_ns]; one that still lives runs to the end."""
    stopped_at_ns = end_ns if life.stopped_at_ns is None else min(life.stopped_at_ns, end_ns)
    return max(0, stopped_at_ns - max(life.requested_at_ns, start_ns))


def replica_seconds(lifetimes: Iterable[ReplicaLifetime], start_ns: int, end_ns: int) -> float:
    """Seconds of all replicas together, cold starts and drains included."""
    return sum(billed_ns(life, start_ns, end_ns) for life in lifetimes) / NS_PER_S


def gpu_seconds(lifetimes: Iterable[ReplicaLifetime], start_ns: int, end_ns: int) -> float:
    """The same times the GPUs of each replica (tensor parallel 2 costs twice)."""
    return sum(billed_ns(life, start_ns, end_ns) * life.gpu_count for life in lifetimes) / NS_PER_S


def replicas_peak(lifetimes: Iterable[ReplicaLifetime], start_ns: int, end_ns: int) -> int:
    """The most replicas paid for at one instant; one that stops as another is requested is not counted twice."""
    changes: list[tuple[int, int]] = []
    for life in lifetimes:
        if billed_ns(life, start_ns, end_ns):
            begin_ns = max(life.requested_at_ns, start_ns)
            changes += [(begin_ns, +1), (begin_ns + billed_ns(life, start_ns, end_ns), -1)]
    peak = now = 0
    for _, change in sorted(changes):  # at one instant -1 sorts before +1
        now += change
        peak = max(peak, now)
    return peak


def cost_usd(gpu_s: float | None, usd_per_gpu_hour: float | None) -> float | None:
    """US dollars pro rata; null where the time or the price is not known."""
    return None if gpu_s is None or usd_per_gpu_hour is None else gpu_s / S_PER_HOUR * usd_per_gpu_hour


def per_million(amount: float | None, tokens: float | None) -> float | None:
    """``amount`` per 1M tokens; null where either is not known or there are no tokens (no good token has no price)."""
    return None if amount is None or not tokens else amount / tokens * 1_000_000

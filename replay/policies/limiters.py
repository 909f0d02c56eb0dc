"""Rate limiters: who may come in at all. Tokens are estimated on admission and settled when the true usage is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from replay.errors import InputError
from replay.policies.protocols import Charge, RateLimiter
from replay.requests import Request

NS_PER_MIN = 60 * 1_000_000_000
TENANTS_MAX = 100_000  # bounds the memory that hostile tenant names can take


@dataclass(slots=True)
class Unlimited:
    """Admits everything."""

    def admit(self, now_ns: int, request: Request) -> int | Charge:
        return 0

    def settle(self, now_ns: int, request: Request, output_tokens: int) -> None:
        pass


@dataclass(slots=True)
class Bucket:
    """A token bucket: refills at ``per_min``, never holds more than ``burst``; settling may take it below zero (a debt)."""

    per_min: float
    burst: float
    level: float
    at_ns: int

    def refill(self, now_ns: int) -> None:
        self.level = min(self.burst, self.level + (now_ns - self.at_ns) * self.per_min / NS_PER_MIN)
        self.at_ns = now_ns

    def wait_ns(self, amount: float) -> int:
        """Until ``amount`` is there, after ``refill``; an amount above the burst waits for a full bucket (and then borrows)."""
        lacking = min(amount, self.burst) - self.level
        return 0 if lacking <= 1e-9 else max(1, round(lacking * NS_PER_MIN / self.per_min))


@dataclass(slots=True)
class TokenBucket:
    """Requests per minute and tokens per minute, each a bucket with an explicit burst, per tenant or for all together.

    Upstreams (LiteLLM, AIBrix) count in fixed windows, which let twice the limit through at a window's edge; a bucket lets at most
    rate x time + burst through. An absent limit is no limit. A request without a declared output cap is charged ``output_default``.
    """

    requests_per_min: float | None = None
    tokens_per_min: float | None = None
    burst_requests: float | None = None  # default: ten seconds' worth
    burst_tokens: float | None = None
    output_default: int = 256
    per: Literal["tenant", "all"] = "tenant"
    _buckets: dict[str, tuple[Bucket | None, Bucket | None]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "tokens_per_min", "burst_requests", "burst_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"is {value}", where=name, rule="above 0", fix="leave it out for no limit")
        if self.requests_per_min is None and self.tokens_per_min is None:
            raise InputError(
                "has no limit",
                where="token_bucket",
                rule="requests_per_min or tokens_per_min",
                fix="set one, or kind: unlimited",
            )
        if self.output_default < 0:
            raise InputError(f"is {self.output_default}", where="output_default", rule="0 or more")

    def _pair(self, now_ns: int, request: Request) -> tuple[Bucket | None, Bucket | None]:
        key = request.tenant if self.per == "tenant" else ""
        pair = self._buckets.get(key)
        if pair is None:
            if len(self._buckets) >= TENANTS_MAX:
                self._buckets.pop(next(iter(self._buckets)))
            pair = (
                self._full(now_ns, self.requests_per_min, self.burst_requests, floor=1.0),
                self._full(now_ns, self.tokens_per_min, self.burst_tokens, floor=1.0),
            )
            self._buckets[key] = pair
        return pair

    @staticmethod
    def _full(now_ns: int, per_min: float | None, burst: float | None, floor: float) -> Bucket | None:
        if per_min is None:
            return None
        size = max(burst if burst is not None else per_min / 6, floor)
        return Bucket(per_min, size, size, now_ns)

    def _estimate(self, request: Request) -> int:
        cap = request.output_cap if request.output_cap is not None else self.output_default
        return request.prompt_tokens_est + cap

    def admit(self, now_ns: int, request: Request) -> int | Charge:
        requests, tokens = self._pair(now_ns, request)
        estimate, wait_ns = self._estimate(request), 0
        for bucket, amount in ((requests, 1), (tokens, estimate)):
            if bucket is not None:
                bucket.refill(now_ns)
                wait_ns = max(wait_ns, bucket.wait_ns(amount))
        if wait_ns:
            return wait_ns
        if requests is not None:
            requests.level -= 1
        if tokens is not None:
            tokens.level -= estimate
        return 0

    def settle(self, now_ns: int, request: Request, output_tokens: int) -> None:
        tokens = self._pair(now_ns, request)[1]
        if tokens is not None:
            tokens.refill(now_ns)
            unused = self._estimate(request) - (request.prompt_tokens_est + output_tokens)
            tokens.level = min(tokens.burst, tokens.level + unused)


LIMITERS: dict[str, type[RateLimiter]] = {"unlimited": Unlimited, "token_bucket": TokenBucket}

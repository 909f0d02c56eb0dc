"""What a gateway can observe of a request, built by one function for gateway and simulation alike.

A policy sees only this. It never sees the recorded (true) output length: a test holds that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import xxhash

PREFIX_BLOCK_BYTES: Final = 2048  # 512 tokens x 4 bytes: a Mooncake block, as prompts.py writes it


class Request(NamedTuple):
    """A request as a policy sees it. ``prompt_tokens_est`` is estimated from bytes, ``output_cap`` declared by the client."""

    request_id: int
    tenant: str
    model: str
    priority: int
    session: str
    deadline_at_ns: int | None
    prompt_bytes: int
    prompt_tokens_est: int
    prefix_hashes: tuple[int, ...]
    output_cap: int | None
    origin: str = "online"


@dataclass(slots=True)
class TokenRatio:
    """Bytes per prompt token, learnt from the ``usage`` of finished requests (exponentially weighted, one in 100)."""

    bytes_per_token: float = 4.0  # English text under the tokenizers of 2024-26; only the first requests see it
    weight: float = 0.01

    def observe(self, prompt_bytes: int, prompt_tokens: int) -> None:
        if prompt_tokens > 0 and prompt_bytes > 0:
            self.bytes_per_token += self.weight * (prompt_bytes / prompt_tokens - self.bytes_per_token)

    def estimate(self, prompt_bytes: int) -> int:
        return max(1, round(prompt_bytes / self.bytes_per_token))


def block_hashes(prompt: bytes, block_bytes: int = PREFIX_BLOCK_BYTES) -> tuple[int, ...]:
    """Chained 64-bit hashes of the full blocks of a prompt: equal up to block n iff the text is equal up to there."""
    digest, hashes = xxhash.xxh3_64(), []
    for start in range(0, len(prompt) - block_bytes + 1, block_bytes):
        digest.update(prompt[start : start + block_bytes])
        hashes.append(digest.intdigest())
    return tuple(hashes)


def declared_output_cap(output_tokens: Sequence[int]) -> int:
    """The output cap that a replay declares for each of its requests: the trace's p99 (nearest rank), at least 1.

    One function for load generator and simulation, so that policies which read the cap decide alike in both.

    >>> declared_output_cap([10] * 98 + [200, 5000])
    200
    """
    ranked = sorted(output_tokens)
    return max(1, ranked[-(-99 * len(ranked) // 100) - 1])


def observe(
    request_id: int, *, prompt_bytes: int, prefix_hashes: tuple[int, ...], ratio: TokenRatio, tenant: str = "", model: str = "",
    priority: int = 0, session: str = "", deadline_at_ns: int | None = None, output_cap: int | None = None,
) -> Request:  # fmt: skip
    """The request as policies see it; everything here is on the wire before the first token."""
    return Request(
        request_id, tenant, model, priority, session, deadline_at_ns, prompt_bytes, ratio.estimate(prompt_bytes), prefix_hashes,
        output_cap,
    )  # fmt: skip

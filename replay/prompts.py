"""Prompt text of a wanted length that shares exactly the prefixes a trace says are shared.

A prompt is its blocks of 512 tokens (Mooncake's), one per prefix hash, then a tail that belongs to this request alone. Each
block, and the tail, starts with a hex token of its own and goes on with a slice of one pool of ordinary words, so that a block
costs a hash and a slice. The salt is the run's id: no run is served from the prefix cache that another one filled.

May live here: text, and which blocks of it are equal. No tokenizer (it would be the client's bottleneck): bytes per token is
a number the caller learns from ``usage``.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Final

import xxhash

from replay.errors import InputError
from replay.requests import PREFIX_BLOCK_BYTES

BLOCK_TOKENS: Final = 512
POOL_BYTES: Final = 1 << 20
_TOKEN_HEX: Final = 12  # 48 bits: among 100,000 blocks the chance that any two start alike is 2e-5

# Common enough to be one token each, with the blank before them; 3 letters on average, so that a token is about 4 bytes, the
# ratio that gateway and simulation begin with (replay.requests.TokenRatio).
_WORDS: Final = """
    a i an as at be by do go he if in is it me my no of on or so to up us we all and any are ask big box but buy can car cut day
    did dog eat end far few for fun get got had has her him his hot how its job let lot low man may men met new not now off old one
    our out own pay put ran red run saw say see set she sit sun ten the too top try two use was way who why win yes yet you also
    back been best book both city come door down even ever face fact find four from girl give good hand have head help here home
    idea into just"""


class Prompts:
    """Prompt texts of one run. Pure ASCII letters, digits and blanks: JSON needs no escapes."""

    def __init__(self, salt: str, bytes_per_token: float = 4.0) -> None:
        if not 0.5 <= bytes_per_token <= 64:  # below, a block would hold little beside its own hex token
            raise InputError(f"bytes_per_token is {bytes_per_token}", rule="between 0.5 and 64")
        self.bytes_per_token = bytes_per_token
        self._block_bytes = round(BLOCK_TOKENS * bytes_per_token)
        self._block_seed, self._tail_seed = (xxhash.xxh3_64_intdigest(f"{salt}/{part}".encode()) for part in ("block", "tail"))
        self._pool = _pool()

    def text(self, request_id: int, prompt_tokens: int, prefix_hashes: Sequence[int] | None = None) -> bytes:
        """round(prompt_tokens x bytes_per_token) bytes; equal to another request's up to the first block whose hash differs.

        Hashes beyond the length are left out; the last one may stand for a block that is only begun. About 1 us a block.
        """
        size = round(prompt_tokens * self.bytes_per_token)
        blocks = -(-size // self._block_bytes)
        pieces = [self._piece(self._block_seed, prefix, self._block_bytes) for prefix in (prefix_hashes or ())[:blocks]]
        rest = size - len(pieces) * self._block_bytes
        if rest > 0:
            pieces.append(self._piece(self._tail_seed, request_id, rest))
        return b"".join(pieces)[:size]

    def _piece(self, seed: int, number: int, size: int) -> bytes:
        """Text that is a function of seed and number: a hex token, then words from a place in the pool."""
        digest = xxhash.xxh3_64_intdigest(b"%d" % number, seed)
        words = size - _TOKEN_HEX - 1
        start = digest % POOL_BYTES
        text = self._pool[start : start + words]
        while len(text) < words:  # at the pool's end, or for a tail that is longer than the pool
            text += self._pool[: words - len(text)]
        return (b"%012x " % (digest >> 16) + text)[:size]


def prefix_hashes_of(request_id: int, prompt_tokens: int, prefix_hashes: Sequence[int] | None = None) -> tuple[int, ...]:
    """What ``requests.block_hashes`` would tell a gateway about this prompt's text, without building the text.

    Not the same numbers, but equal for two requests, block by block, exactly where those of their texts are. It holds for text
    of 4 bytes a token that the gateway sees from its first byte: at another ratio a gateway's blocks of PREFIX_BLOCK_BYTES end
    elsewhere, and a shared prefix counts up to one block more or less; text before the prompt (a system message of the
    client's) shifts it likewise.
    """
    full = prompt_tokens * 4 // PREFIX_BLOCK_BYTES
    digest, hashes = xxhash.xxh3_64(), []
    for prefix in (prefix_hashes or ())[:full]:
        digest.update(prefix.to_bytes(8, "little"))
        hashes.append(digest.intdigest())
    own = xxhash.xxh3_64_intdigest(b"%d" % request_id, digest.intdigest())
    hashes.extend((own + block) % 2**64 for block in range(full - len(hashes)))
    return tuple(hashes)


@functools.cache
def _pool() -> bytes:
    """The pool of words, the same in every process and run; built once, in about 20 ms."""
    words = random.Random(512).choices(_WORDS.split(), k=POOL_BYTES // 3)  # any seed does: the text only has to stay the same
    return " ".join(words).encode()[:POOL_BYTES]

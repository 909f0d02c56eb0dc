"""Prompt texts: their length, what they share, and that a gateway sees what the simulation was told."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.errors import InputError
from replay.prompts import BLOCK_TOKENS, POOL_BYTES, Prompts, prefix_hashes_of
from replay.requests import PREFIX_BLOCK_BYTES, block_hashes

BLOCK = PREFIX_BLOCK_BYTES


@given(
    request=st.integers(0, 2**40), tokens=st.integers(0, 6000), ids=st.none() | st.lists(st.integers(0, 2**64 - 1), max_size=15),
    ratio=st.floats(0.5, 8), salt=st.text(max_size=5),
)  # fmt: skip
def test_any_prompt_is_plain_text_of_the_wanted_length(
    request: int, tokens: int, ids: list[int] | None, ratio: float, salt: str
) -> None:
    text = Prompts(salt, ratio).text(request, tokens, ids)
    assert len(text) == round(tokens * ratio)
    assert re.fullmatch(rb"[a-z0-9 ]*", text)
    assert json.dumps(text.decode()) == f'"{text.decode()}"', "needs no escapes"
    assert text == Prompts(salt, ratio).text(request, tokens, ids), "the same in every process"


def test_prompts_share_the_blocks_whose_ids_are_equal_and_nothing_after() -> None:
    prompts = Prompts("run")
    first, second = prompts.text(1, 2100, [5, 6, 7, 8, 9]), prompts.text(2, 2100, [5, 6, 70, 8, 9])
    assert first[: 2 * BLOCK] == second[: 2 * BLOCK]
    assert first[2 * BLOCK : 2 * BLOCK + 12] != second[2 * BLOCK : 2 * BLOCK + 12], "another block differs from its first bytes"
    assert first[3 * BLOCK :] == second[3 * BLOCK :], "a block is a function of its id"
    assert len(first) == 2100 * 4, "the last block is only begun"


def test_the_tail_belongs_to_one_request() -> None:
    prompts = Prompts("run")
    first, second = prompts.text(1, 1100, [5]), prompts.text(2, 1100, [5])
    assert first[:BLOCK] == second[:BLOCK]
    assert first[BLOCK : BLOCK + 12] != second[BLOCK : BLOCK + 12]
    assert prompts.text(1, 1100)[:12] != prompts.text(2, 1100)[:12]
    assert prompts.text(5, 1024)[:12] != prompts.text(1, 1024, [5, 6])[:12], "request 5 does not start like block 5"


def test_another_run_shares_nothing_from_the_first_bytes_on() -> None:
    for ids in (None, [1, 2, 3]):
        assert Prompts("run-1").text(7, 2000, ids)[:12] != Prompts("run-2").text(7, 2000, ids)[:12]


def test_no_two_of_many_blocks_start_alike() -> None:
    prompts = Prompts("run")
    starts = {prompts.text(0, 10, [number])[:12] for number in range(20_000)} | {
        prompts.text(number, 10)[:12] for number in range(20_000)
    }
    assert len(starts) == 40_000


def test_a_prompt_longer_than_the_pool() -> None:
    text = Prompts("run").text(3, POOL_BYTES, None)
    assert len(text) == 4 * POOL_BYTES


def test_the_words_are_ordinary_and_a_token_is_about_four_bytes() -> None:
    text = Prompts("run").text(1, 100_000).decode()
    words = text.split()[2:-1]  # without the hex token and what the slice cut
    assert all(word.isalpha() and len(word) <= 4 for word in words)
    assert len(text) / len(words) == pytest.approx(4.0, abs=0.1)


def test_the_ratio_has_bounds() -> None:
    for ratio in (0, 0.4, 65, float("nan")):
        with pytest.raises(InputError, match="bytes_per_token"):
            Prompts("run", ratio)


chains = st.lists(st.integers(0, 3), max_size=5)  # few ids: shared prefixes, and equal ids at different places


@given(family=st.lists(st.tuples(st.integers(0, 3000), st.none() | chains), min_size=2, max_size=8))
def test_simulation_and_gateway_see_the_same_sharing(family: list[tuple[int, list[int] | None]]) -> None:
    prompts = Prompts("run")
    seen = [block_hashes(prompts.text(number, tokens, ids)) for number, (tokens, ids) in enumerate(family)]
    told = [prefix_hashes_of(number, tokens, ids) for number, (tokens, ids) in enumerate(family)]
    assert [len(hashes) for hashes in told] == [len(hashes) for hashes in seen]
    assert len({*sum(told, ())}) == len({*sum(seen, ())}), "as many different blocks"
    for one in range(len(family)):
        for other in range(one):
            equal_told = [a == b for a, b in zip(told[one], told[other], strict=False)]
            equal_seen = [a == b for a, b in zip(seen[one], seen[other], strict=False)]
            assert equal_told == equal_seen
            assert all(earlier or not later for earlier, later in pairwise(equal_told)), "sharing is a prefix"


def test_a_block_is_what_the_gateway_hashes() -> None:
    assert BLOCK_TOKENS * 4 == PREFIX_BLOCK_BYTES
    assert prefix_hashes_of(1, 511, [9]) == (), "a block that is only begun is none"
    assert len(prefix_hashes_of(1, 512, [9, 10])) == 1
    assert prefix_hashes_of(1, 512, [9]) == prefix_hashes_of(2, 512, [9]) != prefix_hashes_of(1, 512, None)

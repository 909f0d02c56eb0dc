"""Profiles, chips, prices and cold starts: dated data, checked."""

from __future__ import annotations

from typing import Any

import pytest

from replay.coldstart import PRESETS, cold_start
from replay.errors import InputError
from replay.hardware import FleetSpec, check_profile, fleet_spec, kv_blocks, price, profile

LLAMA_8B = "meta-llama/Meta-Llama-3.1-8B"
A100 = profile(FleetSpec(kind="stand-in"))
KEYS = [
    *((LLAMA_8B, gpu, 1) for gpu in ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s", "a10", "a10g", "l4")),
    *(("meta-llama/Meta-Llama-3.1-70B", gpu, 4) for gpu in ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm")),
    ("meta-llama/Meta-Llama-3.1-70B", "h100_sxm", 8),
    *(("Qwen/Qwen3-32B", gpu, 2) for gpu in ("a100_sxm", "h100_sxm", "h200_sxm")),
    ("Qwen/Qwen3-8B", "h100_sxm", 1),
]


@pytest.mark.parametrize(("model", "gpu", "degree"), KEYS)
def test_every_profile_is_within_its_chip_and_holds_a_context(model: str, gpu: str, degree: int) -> None:
    found = profile(FleetSpec(kind="stand-in", model=model, gpu=gpu, tensor_parallel=degree))
    assert (found.model, found.gpu, found.tensor_parallel) == (model, gpu, degree)
    assert kv_blocks(found) * 16 >= 8192
    assert found.source
    assert found.error


def test_kv_cache_of_an_8b_on_80_gb_is_some_55_gb() -> None:
    assert kv_blocks(A100) * 16 * 128 * 1024 == pytest.approx(59e9, rel=0.05)


def test_derived_profiles_say_so_and_are_slower_than_what_they_come_from() -> None:
    l40s = profile(FleetSpec(kind="stand-in", gpu="l40s"))
    l4 = profile(FleetSpec(kind="stand-in", gpu="l4"))
    assert (l40s.estimated, l4.estimated) == (False, True)
    assert pytest.approx(l40s.F * 864 / 300) == l4.F
    assert l4.b == pytest.approx(l40s.b * 362 / 121)
    assert "estimated" in l4.describe()


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"meta-llama/Meta-Llama-3.1-8B\|h100_sxm\|tp1") as caught:
        fleet_spec({"kind": "stand-in", "gpu": "h100"})
    assert "h100|tp1" in caught.value.what


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"d": -0.01}, "0 or more"),
        ({"F": float("nan")}, "0 or more"),
        ({"F": 0.0}, "takes time"),
        ({"F": 7.0, "a": 7.0}, "one decode step"),  # 15 GB of weights at 2039 GB/s: 7.36 ms
        ({"e": 6e-5}, "context"),
        ({"b": 0.04}, "prefill"),
        ({"F": 7.4, "a": 7.0, "d": 0.0}, "256 requests"),
    ],
)
def test_a_profile_that_beats_its_chip_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        check_profile(A100._replace(**changes))


@pytest.mark.parametrize(
    ("document", "place", "rule"),
    [
        ({"kind": "stand-in", "gpus": 2}, "fleet.gpus", "tensor_parallel"),
        ({"kind": "rented"}, "fleet.kind", ""),
        ({"kind": "stand-in", "max_num_seqs": "256"}, "fleet.max_num_seqs", ""),
        ({"kind": "stand-in", "token_budget": 100}, "fleet", "one token of every running request"),
        ({"kind": "stand-in", "cold_start": "warm"}, "fleet.cold_start", "snapshot"),
        ({"kind": "stand-in", "cold_start": {"boot": 3}}, "fleet.cold_start", "provision"),
        ({"kind": "stand-in", "cold_start": {"image": -1}}, "fleet.cold_start.image", "0 or more"),
        ({"kind": "stand-in", "cold_start": {"image": float("inf")}}, "fleet.cold_start.image", "0 or more"),
        ({"kind": "stand-in", "cold_start": 7}, "fleet.cold_start", ""),
        ({"kind": "stand-in", "usd_per_gpu_hour": float("nan")}, "fleet.usd_per_gpu_hour", ""),
        ({"kind": "urls"}, "fleet", "urls are given"),
        ({"kind": "stand-in", "urls": ["http://a"]}, "fleet", "urls are given"),
        ([], "fleet", ""),
    ],
)
def test_a_bad_fleet_names_the_key(document: Any, place: str, rule: str) -> None:
    with pytest.raises(InputError) as caught:
        fleet_spec(document)
    assert caught.value.where == place
    assert rule in caught.value.rule


def test_a_declared_price_wins_and_a_gpu_without_one_costs_nothing_known() -> None:
    listed = price(FleetSpec(kind="stand-in"))
    assert listed is not None
    assert (listed.usd_per_gpu_hour, listed.date) == (3.43, "2026-11-09")
    declared = price(FleetSpec(kind="stand-in", usd_per_gpu_hour=1.5))
    assert declared is not None
    assert declared.usd_per_gpu_hour == 1.5
    assert price(FleetSpec(kind="stand-in", gpu="l40s")) is None
    assert price(FleetSpec(kind="llama")) is None, "a replica on this machine is no A100"


def test_cold_starts_have_the_measured_totals() -> None:
    totals_s = {name: preset.total_ns / 1e9 for name, preset in PRESETS.items()}
    assert totals_s == {"snapshot": 7, "cached": 52, "uncached": 188, "baked_image": 660}
    assert cold_start({"image": 1.5, "engine_start": 2}).total_ns == 3_500_000_000
    assert FleetSpec(kind="stand-in", cold_start={"weights": 0.25}).phases().total_ns == 250_000_000

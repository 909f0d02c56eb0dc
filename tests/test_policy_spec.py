"""Policies as YAML: what is written is what is built, and what is wrong is said with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from replay.errors import InputError
from replay.policies import spec


@pytest.mark.parametrize("name", list(spec.preset_names()))
def test_every_preset_loads_builds_and_fits_the_schema(name: str) -> None:
    loaded = spec.load(name)
    assert loaded.name == name
    assert loaded.description
    assert spec.from_dict(spec.to_dict(loaded)) == loaded
    spec.build(loaded, seed=1)
    path = Path(spec.__file__).parent / "presets" / f"{name}.yaml"
    jsonschema.validate(yaml.safe_load(path.read_text()), spec.json_schema())


@pytest.mark.parametrize(
    ("written", "place", "rule"),
    [
        ("balancr: round_robin", "p.yaml:1 balancr", "balancer"),
        ("balancer: fastest", "p.yaml:1 balancer", "round_robin"),
        ("queue:\n  kind: fifo\n  lenght_max: 3", "p.yaml:3 queue.lenght_max", "length_max"),
        ("queue: {kind: fifo, length_max: -1}", "p.yaml:1 queue.length_max", "0 or more"),
        ("autoscaler:\n  kind: concurrency\n  target: ten", "p.yaml:3 autoscaler.target", "number"),
        ("autoscaler: {kind: concurrency, target: 0}", "p.yaml:1 autoscaler.target", "above 0"),
        ("autoscaler: {target: 3}", "p.yaml:1 autoscaler", "kind"),
        ("limiter: token_bucket", "p.yaml:1 limiter", "requests_per_min"),
        ("autoscaler: queue_depth", "p.yaml:1 autoscaler", "slots_per_replica: 32"),
        ("replicas: {min: 3, max: 2}", "p.yaml:1 replicas", "min <= max"),
        ("replicas: {min: 1, most: 2}", "p.yaml:1 replicas.most", "max"),
        ("slots_per_replica: 0", "p.yaml:1 slots_per_replica", "at least 1"),
        ("attempts_max: true", "p.yaml:1 attempts_max", "at least 1"),
        ("name: 7", "p.yaml:1 name", "text"),
        ("- a\n- b", "p.yaml", "mapping"),
        ("a: [", "p.yaml:1", ""),
    ],
)
def test_what_is_wrong_is_said_with_file_line_key_and_rule(tmp_path: Path, written: str, place: str, rule: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(written)
    with pytest.raises(InputError) as caught:
        spec.load(path)
    assert place in str(caught.value)
    assert rule in str(caught.value)


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(InputError, match="lo-concurrency"):
        spec.load("no-such-policy")


def test_a_missing_or_oversized_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        spec.load(tmp_path / "missing.yaml")
    (tmp_path / "big.yaml").write_text("#" * (1 << 20) + "\nname: x")
    with pytest.raises(InputError, match="1 MiB"):
        spec.load(tmp_path / "big.yaml")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.text() | st.sampled_from(["balancer", "queue", "kind", "replicas", "limiter", "autoscaler", "min"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_document_loads_or_is_refused_politely(document: Any) -> None:
    try:
        spec.from_dict(document)
    except InputError as error:
        assert str(error)


@given(st.text(max_size=200))
def test_any_text_parses_or_is_refused_politely(text: str) -> None:
    try:
        spec.parse_yaml(text, "p.yaml")
    except InputError as error:
        assert "p.yaml" in str(error)


def test_the_schema_knows_every_kind_and_refuses_what_loading_refuses() -> None:
    schema = spec.json_schema()
    json.dumps(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for role, kinds in spec.ROLES.items():
        for kind in kinds:
            required = {"requests_per_min": 5} if kind == "token_bucket" else {}
            assert validator.is_valid({role: {"kind": kind, **required}})
            assert not validator.is_valid({role: {"kind": kind, "no_such_key": 1}})


def test_a_policy_never_sees_the_recorded_output_length() -> None:
    from replay.requests import Request, TokenRatio, observe

    assert "output_tokens" not in Request._fields
    seen = observe(1, prompt_bytes=400, prefix_hashes=(1,), ratio=TokenRatio(), output_cap=300)
    assert (seen.prompt_tokens_est, seen.output_cap) == (100, 300)


def test_on_given_endpoints_fixed_means_all_of_them_and_no_autoscaler_gets_more() -> None:
    fixed = spec.for_urls(spec.load("round-robin"), 3)
    assert (fixed.replicas, fixed.roles["autoscaler"][1]["replicas"]) == (spec.Replicas(3, 3), 3)
    scaled = spec.for_urls(spec.load("lo-concurrency"), 3)
    assert scaled.replicas == spec.Replicas(1, 3)

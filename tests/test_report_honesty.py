"""Bad and broken input: one clear sentence, and what can still be said is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from replay.errors import InputError
from replay.records import OK, TIMEOUT, Outcome
from replay.report.assemble import Report, assemble
from replay.report.load import load_run
from replay.slo import Slo
from tests.make_run import ns, plan_table, write_experiment, write_run
from tests.test_report_compare import write_arm

SLO = Slo(ttft_s=1.0)


def row(request: int, **more: Any) -> Outcome:
    at = ns(request)
    instants = {"first_token_at_ns": at + ns(0.5), "last_token_at_ns": at + ns(0.6), "done_at_ns": at + ns(0.7)}
    return Outcome(request, at, at, **{**instants, "output_tokens": 5, "first_chunk_tokens": 1, "status": OK, **more})


def report(*paths: Path) -> Report:
    return assemble(paths, slo=SLO)


def test_a_killed_run_is_reported_up_to_its_cut_and_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [row(i) for i in range(4)], plan=plan_table(range(10)), ended_s=None)
    run = load_run(tmp_path / "run")
    assert (run.planned, run.lost, run.cut_at_s, run.window_s) == (10, 6, 3.7, 3.7)
    assert run.requests["status"].tolist() == ["ok"] * 4 + ["timeout"] * 6
    assert run.requests["detail"].tolist()[4:] == ["no outcome"] * 6
    found = report(tmp_path / "run")
    assert found.policies[0].figures["timeout"] == 6
    assert found.policies[0].figures["attainment"] == pytest.approx(0.4)
    [fault] = found.faults
    assert (
        fault
        == "a, repeat 0: run cut short at second 3.7 (no end was recorded): 6 of 10 requests have no outcome and count as timeout"
    )


def test_a_run_that_stopped_itself_early_is_cut_where_it_says(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(i) for i in range(4)], plan=plan_table(range(10)), ended_s=5)
    run.update_manifest(ended={"at_ns": ns(5), "reason": "disk full"})
    assert load_run(tmp_path / "run").cut_at_s == 5
    assert "run cut short at second 5.0 (disk full)" in report(tmp_path / "run").faults[0]


def test_rows_that_went_missing_repeated_or_were_never_planned_break_conservation(tmp_path: Path) -> None:
    rows = [row(0), row(1, status=TIMEOUT, done_at_ns=ns(90)), row(1), row(7)]
    write_run(tmp_path / "run", rows, plan=plan_table(range(4)))
    found = report(tmp_path / "run")
    [arm] = found.policies[0].arms
    assert arm.conserved is False
    assert arm.faults == [
        "2 of 4 requests left no row; they count as timeout",
        "1 requests left more than one row; the first one counts",
        "1 rows are of requests that the plan does not have; they are left out",
    ]
    assert [arm.figures[name] for name in ("arrived", "ok", "timeout")] == [4, 2, 2]


def test_every_request_of_a_whole_run_has_one_status(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [row(i) for i in range(4)], plan=plan_table(range(4)))
    [arm] = report(tmp_path / "run").policies[0].arms
    assert (arm.conserved, arm.faults) == (True, [])


def test_a_host_bound_run_is_marked_and_a_free_one_is_not(tmp_path: Path) -> None:
    for name, busy in (("bound", 0.93), ("free", 0.4)):
        verdict = {"valid": True, "reasons": [], "host_busy_share": busy, "host_bound": busy > 0.8}
        write_run(tmp_path / name, [row(0)], plan=plan_table(range(1)), validity=verdict)
    assert any("host-bound" in warning and "93%" in warning for warning in report(tmp_path / "bound").warnings)
    assert not any("host-bound" in warning for warning in report(tmp_path / "free").warnings)


def test_zero_successes_are_reported_without_latencies(tmp_path: Path) -> None:
    rows = [Outcome(i, ns(i), ns(i), done_at_ns=ns(i + 1), status=TIMEOUT) for i in range(5)]
    write_run(tmp_path / "run", rows, plan=plan_table(range(5)))
    found = report(tmp_path / "run")
    figures = found.policies[0].figures
    assert (figures["attainment"], figures["ttft_p95_s"], figures["ttft_all_p50_s"]) == (0.0, None, float("inf"))
    assert "a: no request succeeded, so there are no latencies of ok requests" in found.warnings


def test_a_run_without_a_single_row_is_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [], plan=plan_table([]))
    assert report(tmp_path / "run").policies[0].figures["attainment"] is None


def test_runs_of_different_traces_are_shown_and_not_compared(tmp_path: Path) -> None:
    other = {"name": "other.csv", "sha256": "1" * 64, "rows": 100, "shaping": {}}
    found = report(write_arm(tmp_path, policy="a", good=99), write_arm(tmp_path, policy="b", good=98, trace=other))
    assert (found.verdict.kind, found.comparisons) == ("not comparable", [])
    assert "different traces in repeat 0: a hand-made (100 rows), b other.csv (100 rows)" in found.verdict.sentence
    assert [policy.figures["attainment"] for policy in found.policies] == [0.99, 0.98]


def test_runs_on_different_ground_are_not_compared(tmp_path: Path) -> None:
    simulated = {"kind": "simulated", "ground": {"kind": "simulated", "detail": "p"}}
    found = report(write_arm(tmp_path, policy="a", good=99), write_arm(tmp_path, policy="b", good=98, **simulated))
    assert found.verdict.sentence == (
        "No verdict: the runs stand on different ground (simulated, stand-in); report each on its own."
    )
    assert found.ground == "Live path on stand-in GPUs, latencies from a profile: llama-8b on a100; Simulated in virtual time: p"


def test_unknown_prices_and_lifetimes_are_said(tmp_path: Path) -> None:
    no_price = write_arm(tmp_path, policy="a", good=99, prices=None)
    no_lives = write_arm(tmp_path, policy="b", good=99, lifetimes=[])
    assert report(no_price, no_lives).warnings == [
        "a: no price per GPU-hour is known, so cost is unknown",
        "b: no replica lifetimes were recorded, so GPU-hours and cost are unknown",
    ]


def test_an_experiment_is_read_from_its_folder_and_a_missing_arm_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "exp"
    folder.mkdir()
    runs = [write_run(folder / name, [row(0)], plan=plan_table([0]), policy=name) for name in ("a", "b")]
    write_experiment(folder, {"ttft_s": 1.0}, runs)
    (folder / "b" / "run.json").unlink()
    found = assemble([folder])
    assert (found.slo, [policy.name for policy in found.policies]) == (SLO, ["a"])
    assert "b, repeat 0 left no run: it is missing here" in found.warnings


def test_two_plain_runs_of_one_policy_are_two_repeats(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, [row(0)], plan=plan_table([0])).path for name in ("x", "y"))
    assert [arm.repeat for arm in report(first, second).policies[0].arms] == [0, 1]


def test_bad_input_is_one_clear_sentence(tmp_path: Path) -> None:
    a = write_arm(tmp_path, policy="a", good=99, slo={"ttft_s": 1.0})
    b = write_arm(tmp_path, policy="b", good=99, slo={"ttft_s": 2.0})
    cases: list[tuple[Any, str]] = [
        (lambda: assemble([tmp_path / "nowhere"]), "nowhere: does not exist. Try: name a folder under runs/"),
        (lambda: assemble([tmp_path]), "is no run directory: run.json is missing"),
        (lambda: assemble([a, b]), "the runs declare different objectives. Try: say which one with --slo"),
        (lambda: assemble([a], baseline="c"), "--baseline: no policy is named 'c'"),
        (lambda: assemble([a], target=95), "--target: the target is 95"),
        (lambda: Slo.parse("ttft>1"), "--slo: cannot read 'ttft>1'"),
        (lambda: Slo.parse("ttft<=1s,ttft<=2s"), "--slo: names ttft twice"),
        (lambda: Slo.parse("ttft<=0s"), "slo: ttft_s is 0.0 (rule: a limit is above 0)"),
        (lambda: Slo.from_mapping({"itl_s": 1.0}), "slo: unknown term 'itl_s'"),
    ]
    for attempt, words in cases:
        with pytest.raises(InputError) as caught:
            attempt()
        assert words in str(caught.value)

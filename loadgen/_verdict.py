"""Whether a run measured the server or the sender, and the figures that say so. Pure: rows in, plain numbers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from replay.records import NS_PER_S, OK, STATUSES

LATENESS_P99_MAX_S: Final = 0.005
CPU_SHARE_MAX: Final = 0.80
HOST_BUSY_MAX: Final = 0.80
QUANTILES: Final = (0.5, 0.95, 0.99)
COLUMNS: Final = (
    "scheduled_at_ns", "sent_at_ns", "first_token_at_ns", "last_token_at_ns", "done_at_ns", "output_tokens", "first_chunk_tokens",
    "status",
)  # fmt: skip
Columns = dict[str, npt.NDArray[Any]]  # of the records, by name


def lateness_s(rows: Columns) -> tuple[float, float, float] | None:
    """(p50, p99, max) of actual minus planned send; None where nothing was sent."""
    late = (rows["sent_at_ns"] - rows["scheduled_at_ns"])[rows["sent_at_ns"] >= 0] / NS_PER_S
    return (float(np.quantile(late, 0.5)), float(np.quantile(late, 0.99)), float(late.max())) if len(late) else None


def verdict(
    rows: Columns, figures: Sequence[dict[str, Any]], *, planned: int, host_busy_share: float, problems: Sequence[str]
) -> dict[str, Any]:
    """The manifest's ``validity``: rows of all workers in the run directory, and what each worker reported of itself.

    ``problems`` are reasons found elsewhere (a lost worker, a full disk, a stop); a busy host is marked, not judged: replicas that
    compute on the sender's machine make it busy, and lateness says whether that hurt.
    """
    late = lateness_s(rows)
    cpu_share = max((worker["cpu_share"] for worker in figures), default=0.0)
    left_rows = sum(worker["rows"] for worker in figures)
    reasons = list(problems)
    if late and late[1] > LATENESS_P99_MAX_S:
        reasons.append(f"the sender was late: p99 {late[1] * 1e3:.1f} ms (limit {LATENESS_P99_MAX_S * 1e3:.0f} ms)")
    if cpu_share > CPU_SHARE_MAX:
        reasons.append(f"the sender used {cpu_share:.0%} of its core (limit {CPU_SHARE_MAX:.0%}): share it with --processes")
    if not problems and left_rows != planned:
        reasons.append(f"{planned - left_rows} of {planned} requests left no row")
    return {
        "valid": not reasons,
        "reasons": reasons,
        "lateness_p50_s": late and late[0],
        "lateness_p99_s": late and late[1],
        "lateness_max_s": late and late[2],
        "sender_cpu_share": round(cpu_share, 4),
        "host_busy_share": round(host_busy_share, 4),
        "host_bound": host_busy_share > HOST_BUSY_MAX,
        "planned": planned,
        "rows": left_rows,
        "prompt_tokens_off": sum(worker["prompt_off"] for worker in figures),
        "output_tokens_off": sum(worker["output_off"] for worker in figures),
    }


def latencies_s(rows: Columns) -> Columns:
    """TTFT and E2E from the planned send, TPOT over the tokens after the first chunk; of the ok requests that have them."""
    first, last, output = rows["first_token_at_ns"], rows["last_token_at_ns"], rows["output_tokens"]
    ok = rows["status"] == OK
    started = ok & (first >= 0)
    later = output - np.maximum(rows["first_chunk_tokens"], 1)
    timed = started & (later > 0)
    return {
        "TTFT": (first - rows["scheduled_at_ns"])[started] / NS_PER_S,
        "TPOT": (last - first)[timed] / later[timed] / NS_PER_S,
        "E2E": (rows["done_at_ns"] - rows["scheduled_at_ns"])[ok] / NS_PER_S,
    }


def summary(rows: Columns, validity: dict[str, Any], *, run_dir: str, seconds: float, notes: Sequence[str]) -> Iterator[str]:
    """What is printed at the end: figures, statuses, validity, where it lies, what to type next."""
    counts = {name: int((rows["status"] == code).sum()) for code, name in enumerate(STATUSES)}
    yield f"{len(rows['status'])} of {validity['planned']} requests in {seconds:.1f} s: " + ", ".join(
        f"{count} {name}" for name, count in counts.items() if count or name == "ok"
    )
    yield f"{'of the ok':10}{'p50':>10}{'p95':>10}{'p99':>10}{'n':>9}"
    for name, values in latencies_s(rows).items():
        cells = [f"{milliseconds(np.quantile(values, share)):>10}" if len(values) else f"{'-':>10}" for share in QUANTILES]
        yield f"{name:10}{''.join(cells)}{len(values):>9}"
    if validity["lateness_p50_s"] is not None:
        late = [milliseconds(validity[f"lateness_{name}_s"]) for name in ("p50", "p99", "max")]
        yield f"send lateness p50 {late[0]}, p99 {late[1]}, max {late[2]}; sender CPU {validity['sender_cpu_share']:.0%} of a core"
    if validity["prompt_tokens_off"] or validity["output_tokens_off"]:
        yield (
            f"lengths off by more than 10 % from the recorded: {validity['prompt_tokens_off']} prompts, "
            f"{validity['output_tokens_off']} outputs"
        )
    if validity["host_bound"]:
        yield f"host-bound: this machine was {validity['host_busy_share']:.0%} busy, and the figures are partly its own"
    yield from notes
    yield "VALID" if validity["valid"] else "INVALID: " + "; ".join(validity["reasons"])
    yield f"run directory: {run_dir}"
    yield f"next: tidegauge report {run_dir}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"

"""Run directories as tidy pandas frames; every column is documented here, with its unit.

May live here: reading, completing what a cut run left out, derived latencies. No statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from replay.errors import InputError
from replay.records import NS_PER_S, ReplicaLifetime
from replay.runs import Manifest, RunDir, phase_columns

# Columns of ``Run.requests``: name -> (unit, meaning). Null is NaN or None and means "not measured".
REQUEST_COLUMNS: Final[dict[str, tuple[str, str]]] = {
    "request_id": ("", "number of the request in the plan"),
    "trace_id": ("", "W3C trace id, 32 hex digits"),
    "status": ("", "ok, limited, shed, timeout, cancelled or error; exactly one"),
    "detail": ("", "what went wrong, in words"),
    "scheduled_at_ns": ("ns", "when it was due, from the start of the run"),
    "sent_at_ns": ("ns", "when its first byte was really sent"),
    "gateway_at_ns": ("ns", "when the gateway had its last byte"),
    "first_chunk_at_ns": ("ns", "first chunk of the answer, empty or not"),
    "first_token_at_ns": ("ns", "first non-empty delta"),
    "last_token_at_ns": ("ns", "last non-empty delta"),
    "done_at_ns": ("ns", "end of the answer, or of the attempt"),
    "longest_gap_ns": ("ns", "longest pause between two chunks"),
    **{name: ("ns", f"phase {name[:-3]}; the phases sum to E2E") for name in phase_columns()},
    "chunks": ("chunks", "non-empty deltas received"),
    "prompt_tokens": ("tokens", "of the prompt, as the server counted"),
    "output_tokens": ("tokens", "of the answer, as the server counted"),
    "cached_tokens": ("tokens", "of the prompt that came from a prefix cache"),
    "first_chunk_tokens": ("tokens", "in the first non-empty delta"),
    "tokens_lost": ("tokens", "generated and thrown away (retry, migration)"),
    "replica_id": ("", "replica that answered"),
    "decode_replica_id": ("", "replica that decoded, where another one prefilled"),
    "http_status": ("", "HTTP status of the answer"),
    "attempts": ("attempts", "dispatches to a replica"),
    "queue_reason": ("", "why it waited in the gateway: none, no_slot, cold_start, held"),
    "origin": ("", "online or batch"),
    "tenant": ("", "who asked"),
    "model": ("", "what was asked"),
    "session_id": ("", "conversation"),
    "turn": ("", "number of the turn in its conversation"),
    "priority": ("", "as the trace has it"),
    "recorded_prompt_tokens": ("tokens", "prompt length in the trace"),
    "recorded_output_tokens": ("tokens", "output length in the trace"),
    "ttft_s": ("s", "time to first token, from the schedule: first_token_at - scheduled_at"),
    "ttft_sent_s": ("s", "time to first token, from the actual send: first_token_at - sent_at"),
    "tpot_s": ("s", "(last_token_at - first_token_at) / (output_tokens - first_chunk_tokens)"),
    "e2e_s": ("s", "end to end: done_at - scheduled_at"),
    "late_s": ("s", "how late it was sent: sent_at - scheduled_at"),
}
# Columns of ``Run.states``: the fleet once a second and at every change.
STATE_COLUMNS: Final[dict[str, tuple[str, str]]] = {
    "at_s": ("s", "from the start of the run"),
    "queued": ("requests", "in the gateway's queue"),
    "running": ("requests", "dispatched and not ended"),
    "wanted": ("replicas", "what the autoscaler asked for"),
    "starting": ("replicas", "requested and not ready"),
    "ready": ("replicas", "taking requests"),
    "draining": ("replicas", "finishing what they have"),
    "arrived": ("requests", "so far"),
    "ended": ("requests", "so far, in any status"),
    "usd_per_hour": ("USD/h", "price of all replicas requested and not stopped"),
}
# Columns of ``Run.replicas``: one row a lifetime.
REPLICA_COLUMNS: Final[dict[str, tuple[str, str]]] = {
    "replica_id": ("", "number of the replica"),
    "pool": ("", "pool it belongs to"),
    "gpu": ("", "GPU type"),
    "gpu_count": ("GPUs", "of this replica"),
    "requested_at_s": ("s", "when it was asked for; negative where it was before the run's start"),
    "ready_at_s": ("s", "when it could take requests"),
    "stopped_at_s": ("s", "when it was gone; null while it lived"),
    "reason": ("", "why it stopped"),
}
# What a report needs of the rows; the rest stays on disk.
REPORT_COLUMNS: Final = [
    "request_id", "status", "scheduled_at_ns", "sent_at_ns", "first_token_at_ns", "last_token_at_ns", "done_at_ns",
    "output_tokens", "first_chunk_tokens", "recorded_output_tokens", *phase_columns(),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One run, complete: as many rows as its plan, in the plan's order.

    requests  one row a request (REQUEST_COLUMNS); a planned request that left no row is ``timeout``, detail "no outcome"
    states    the time line (STATE_COLUMNS); empty where no gateway of ours was in the path
    replicas  one row a lifetime (REPLICA_COLUMNS)
    window_s  the run's window, which tokens, replicas and money are counted in: from 0 to the end of the last request or of
              the schedule, whichever is later, or to the cut
    planned   requests in the plan (None: no plan)      lost, repeated, foreign   planned without a row, with several, unplanned
    cut_at_s  the second at which the run was cut short (None: it ran to its end)
    """

    path: Path
    manifest: Manifest
    requests: pd.DataFrame
    states: pd.DataFrame
    replicas: pd.DataFrame
    lifetimes: list[ReplicaLifetime]
    window_s: float
    planned: int | None
    lost: int
    repeated: int
    foreign: int
    cut_at_s: float | None

    @property
    def name(self) -> str:
        return str(self.manifest.get("id") or self.path.name)

    def faults(self) -> list[str]:
        """Why this run cannot decide anything, one sentence a fault; empty where it is valid."""
        validity: dict[str, Any] = self.manifest.get("validity") or {}
        faults = [str(reason) for reason in validity.get("reasons") or ()]
        if validity.get("valid") is False and not faults:
            faults.append("the sender marked it invalid without a reason")
        if self.cut_at_s is not None:
            why = (self.manifest.get("ended") or {}).get("reason") or "no end was recorded"
            faults.append(
                f"run cut short at second {self.cut_at_s:.1f} ({why}): "
                f"{self.lost} of {self.planned} requests have no outcome and count as timeout"
            )
        elif self.lost:
            faults.append(f"{self.lost} of {self.planned} requests left no row; they count as timeout")
        if self.repeated:
            faults.append(f"{self.repeated} requests left more than one row; the first one counts")
        if self.foreign:
            faults.append(f"{self.foreign} rows are of requests that the plan does not have; they are left out")
        return faults


def load_run(path: str | Path, columns: list[str] | None = None) -> Run:
    """A run directory as frames; ``columns`` limits what is read of the rows (default: all).

    >>> run = load_run("runs/20261116-181703")  # doctest: +SKIP
    >>> run.requests.groupby("status").ttft_s.describe()  # doctest: +SKIP
    """
    directory = RunDir.open(path)
    manifest, lifetimes = directory.manifest, directory.lifetimes()
    plan = directory.plan(["arrival_at_ns"])
    arrivals_ns = None if plan is None else plan["arrival_at_ns"].to_numpy()
    rows = _checked(directory.outcomes(columns).to_pandas(), directory.path)
    last_ns = np.nanmax(rows[["scheduled_at_ns", "sent_at_ns", "done_at_ns"]].to_numpy(float), initial=0)
    rows, lost, repeated, foreign = _complete(rows, arrivals_ns)
    end_ns, is_cut = _window(manifest, arrivals_ns, last_ns)
    return Run(
        path=Path(path), manifest=manifest, requests=_with_latencies(rows), states=_states_frame(directory),
        replicas=_replicas_frame(lifetimes), lifetimes=lifetimes, window_s=end_ns / NS_PER_S,
        planned=None if arrivals_ns is None else len(arrivals_ns), lost=lost, repeated=repeated, foreign=foreign,
        cut_at_s=end_ns / NS_PER_S if is_cut else None,
    )  # fmt: skip


def _checked(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The documented columns of the rows; what a report cannot do without has to be there."""
    for name in ("request_id", "status", "scheduled_at_ns", "done_at_ns", "first_token_at_ns", "output_tokens"):
        if name not in rows:
            raise InputError(f"its rows have no column {name}", where=str(path), fix="use the version that wrote the run")
    optional = [name for name in REPORT_COLUMNS if name not in rows]
    return rows.assign(**dict.fromkeys(optional, np.nan))[[name for name in REQUEST_COLUMNS if name in {*rows, *optional}]]


def _complete(rows: pd.DataFrame, arrivals_ns: Any) -> tuple[pd.DataFrame, int, int, int]:
    """Exactly one row a planned request, in the plan's order, and how many were lost, repeated, not planned."""
    rows = rows.sort_values(["request_id", "done_at_ns"], kind="stable")
    repeated = rows["request_id"][rows["request_id"].duplicated()].nunique()
    rows = rows.drop_duplicates("request_id")
    if arrivals_ns is None:
        return rows.reset_index(drop=True), 0, repeated, 0
    planned = rows["request_id"] < len(arrivals_ns)
    foreign, rows = int((~planned).sum()), rows[planned]
    missing = np.setdiff1d(np.arange(len(arrivals_ns)), rows["request_id"].to_numpy(), assume_unique=True)
    if len(missing):
        lost = {"request_id": missing, "status": "timeout", "detail": "no outcome", "scheduled_at_ns": arrivals_ns[missing]}
        rows = rows.set_index("request_id").reindex(np.arange(len(arrivals_ns))).rename_axis("request_id").reset_index()
        for name in [name for name in lost if name in rows]:
            rows.loc[missing, name] = lost[name]
    return rows.reset_index(drop=True), len(missing), repeated, foreign


def _window(manifest: Manifest, arrivals_ns: Any, last_ns: float) -> tuple[float, bool]:
    """(end of the run's window in ns, whether the run was cut short there)."""
    has_plan = arrivals_ns is not None and len(arrivals_ns) > 0
    planned_ns = float(manifest.get("planned_ns") or (arrivals_ns.max() if has_plan else 0))
    if not (ended := manifest.get("ended")):
        return last_ns, True
    ended_ns = float(ended["at_ns"])
    return min(max(planned_ns, last_ns), ended_ns), ended_ns < planned_ns


def _with_latencies(rows: pd.DataFrame) -> pd.DataFrame:
    """The frame with ttft_s, ttft_sent_s, tpot_s, e2e_s and late_s; null where an instant is missing.

    TPOT has no value for an answer whose first chunk held every token. A server that does not say how many tokens the
    first chunk held is taken to have sent one.
    """
    rows = rows.copy(deep=False)
    first, last = rows["first_token_at_ns"], rows["last_token_at_ns"]
    later_tokens = rows["output_tokens"] - rows["first_chunk_tokens"].clip(lower=1).fillna(1)
    rows["ttft_s"] = (first - rows["scheduled_at_ns"]) / NS_PER_S
    rows["ttft_sent_s"] = (first - rows["sent_at_ns"]) / NS_PER_S
    rows["tpot_s"] = (last - first) / later_tokens.where(later_tokens > 0) / NS_PER_S
    rows["e2e_s"] = (rows["done_at_ns"] - rows["scheduled_at_ns"]) / NS_PER_S
    rows["late_s"] = (rows["sent_at_ns"] - rows["scheduled_at_ns"]) / NS_PER_S
    return rows


def _states_frame(directory: RunDir) -> pd.DataFrame:
    states = pd.DataFrame(directory.states()).sort_values("at_ns", kind="stable")
    states.insert(0, "at_s", states.pop("at_ns") / NS_PER_S)
    return states.reset_index(drop=True)


def _replicas_frame(lifetimes: list[ReplicaLifetime]) -> pd.DataFrame:
    frame = pd.DataFrame(lifetimes, columns=list(ReplicaLifetime._fields))
    for name in ("requested_at_ns", "ready_at_ns", "stopped_at_ns"):
        frame[f"{name[:-3]}_s"] = pd.to_numeric(frame.pop(name)) / NS_PER_S
    return frame[list(REPLICA_COLUMNS)]

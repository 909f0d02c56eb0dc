"""A fleet under a policy in virtual time: the plan in, the files of a live run out.

Nothing is random but the service noise, drawn per request id from the seed, so that two policies meet the same requests at the
same speeds. The same inputs give the same bytes. May live here: a simulated run's inputs and outputs; virtual.py drives it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from replay.errors import InputError
from replay.fleet import Fleet
from replay.hardware import FleetSpec
from replay.policies.spec import PolicySpec, build, to_dict
from replay.records import ERROR, FLEET_STATE_DTYPE, LIMITED, NS_PER_S, OK, OUTCOME_DTYPE, SHED, TIMEOUT, Outcome, ReplicaLifetime
from replay.runs import Manifest, RunDir, outcomes_to_table, part_path, phase_columns
from replay.virtual import Driver, Row

NETWORK_NS: Final = 50_000  # client <-> gateway, each way: one data centre
GATEWAY_NS: Final = 150_000  # the gateway's own work between its decision and the replica
NOISE_SIGMA: Final = 0.03  # service noise, lognormal of mean 1: a declared guess until a calibration says better
DRAIN_NS: Final = 60 * NS_PER_S  # after the last planned request; what is inside then is ``timeout``
# The only error of simulated replicas, which do not break, is to refuse what exceeds their memory.
HTTP_STATUS: Final = {OK: 200, LIMITED: 429, SHED: 503, ERROR: 400}
STEM: Final = "simulation"  # of its Parquet part


@dataclass(frozen=True)
class SimResult:
    """What a simulated run left. ``outcomes``: OUTCOME_DTYPE, row i is request i; ``states``: FLEET_STATE_DTYPE."""

    plan: pa.Table
    outcomes: npt.NDArray[Any]
    states: npt.NDArray[Any]
    lifetimes: list[ReplicaLifetime]
    ended_at_ns: int
    inputs: dict[str, Any]  # all that the result follows from, beside the plan


def simulate(
    plan: pa.Table,
    policy: PolicySpec,
    fleet: FleetSpec,
    *,
    seed: int,
    network_ns: int = NETWORK_NS,
    gateway_ns: int = GATEWAY_NS,
    drain_ns: int = DRAIN_NS,
    noise_sigma: float = NOISE_SIGMA,
) -> SimResult:
    """Run the plan (trace columns, request_id = row number) against the fleet under the policy, from time 0 to the last end.

    The first replicas are asked for before time 0 and ready at 0, as a live arm waits for them; they are billed from 0.
    Raises InputError for a fleet that has no profile, a plan that is empty or not numbered by row.
    """
    if fleet.kind != "stand-in":
        raise InputError(f"kind {fleet.kind!r}", where="fleet", rule="simulated is a fleet of kind stand-in: it has a profile")
    if not len(plan) or plan["request_id"].to_pylist() != list(range(len(plan))):
        raise InputError(f"{len(plan)} requests", where="plan", rule="at least one, with request_id 0, 1, 2 ... by row")
    inputs = {
        "policy": to_dict(policy),
        "fleet": fleet.model_dump(),
        "seed": seed,
        "network_ns": network_ns,
        "gateway_ns": gateway_ns,
        "drain_ns": drain_ns,
        "noise_sigma": noise_sigma,
    }
    driver = Driver(plan, Fleet(build(policy, seed)), fleet, network_ns, gateway_ns, service_noise(seed, len(plan), noise_sigma))
    driver.run(drain_ns)
    states = np.frombuffer(bytes(driver.states), FLEET_STATE_DTYPE)
    return SimResult(plan, _outcomes(driver), states, list(driver.lifetimes.values()), driver.ended_at_ns, inputs)


def service_noise(seed: int, requests: int, sigma: float) -> list[float]:
    """The slowness of each request, lognormal with mean 1: entry i depends on seed and i alone, so that arms stay paired."""
    key = xxhash.xxh3_128_intdigest(f"{seed}/service".encode())
    normal = np.random.Generator(np.random.Philox(key=key)).standard_normal(requests)
    slowness: list[float] = np.exp(sigma * normal - sigma * sigma / 2).tolist()
    return slowness


def write(result: SimResult, path: Path, manifest: Manifest) -> RunDir:
    """The run directory that a live run would leave, complete. ``manifest``: what the caller knows (runs.Manifest).

    No clock is read: the run's id is a hash of its inputs, and it began at the epoch.
    """
    known = {
        "id": f"sim-{_digest(result)}",
        "kind": "simulated",
        "started_at_unix_ns": 0,
        "seed": result.inputs["seed"],
        **manifest,
    }
    known["simulation"] = {name: result.inputs[name] for name in ("network_ns", "gateway_ns", "drain_ns", "noise_sigma")}
    run = RunDir.create(path, known, result.plan)
    rows = outcomes_to_table(result.outcomes, known["id"], result.plan)
    pq.write_table(rows, part_path(run.path / "requests", STEM, 0, len(rows)))
    gateway = run.path / "gateway"
    gateway.mkdir(exist_ok=True)
    pq.write_table(pa.table({name: result.states[name] for name in FLEET_STATE_DTYPE.names or ()}), gateway / "states.parquet")
    lives = "".join(json.dumps(life._asdict()) + "\n" for life in result.lifetimes)
    (gateway / "lifetimes.jsonl").write_text(lives)
    (gateway / "run.json").write_text(json.dumps({"started_at_unix_ns": known["started_at_unix_ns"]}) + "\n")
    run.update_manifest(ended={"at_ns": result.ended_at_ns, "reason": "complete"}, validity={"valid": True, "reasons": []})
    return run


def _digest(result: SimResult) -> str:
    """Of everything the result follows from: 16 hex digits."""
    digest = xxhash.xxh3_64(json.dumps(result.inputs, sort_keys=True).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, result.plan.schema) as stream:
        stream.write_table(result.plan.combine_chunks())
    digest.update(memoryview(sink.getvalue()))
    return digest.hexdigest()


def _outcomes(driver: Driver) -> npt.NDArray[Any]:
    """The driver's rows as outcomes, by request id; the phases of a request that was dispatched sum to its end-to-end time."""
    table = np.frombuffer(driver.rows, np.int64).reshape(-1, len(Row._fields))
    row = dict(zip(Row._fields, table[np.argsort(table[:, 0])].T, strict=True))
    out = np.array([tuple(Outcome(0))], OUTCOME_DTYPE).repeat(len(table))
    for name in ("request_id", "status", "scheduled_at_ns", "sent_at_ns", "done_at_ns", "replica_id", "attempts", "queue_reason"):
        out[name] = row[name]
    sent, dispatched = row["sent_at_ns"] >= 0, row["dispatched_at_ns"] >= 0
    started, ok = row["first_at_ns"] >= 0, row["status"] == OK
    answered = row["status"] != TIMEOUT  # else the client ended it, and nothing travelled back

    def known(where: npt.NDArray[np.bool_], values: Any) -> npt.NDArray[np.int64]:
        return np.where(where, values, -1)

    out["gateway_at_ns"] = known(sent, row["sent_at_ns"] + driver.network_ns)
    out["first_chunk_at_ns"] = out["first_token_at_ns"] = known(started, row["first_at_ns"] + driver.network_ns)
    out["last_token_at_ns"] = known(ok, row["done_at_ns"])
    for name in ("limit_ns", "queue_ns", "cold_start_ns", "retry_ns"):
        out[name] = row[name]
    left_at_ns = row["dispatched_at_ns"] + np.minimum(driver.gateway_ns, row["ended_at_ns"] - row["dispatched_at_ns"])
    out["route_ns"] = known(dispatched, left_at_ns - row["dispatched_at_ns"])
    out["prefill_ns"] = known(dispatched, np.where(started, row["first_at_ns"], row["ended_at_ns"]) - left_at_ns)
    out["decode_ns"] = known(started, row["ended_at_ns"] - row["first_at_ns"])
    out["network_ns"] = known(sent, driver.network_ns * (1 + answered))
    phases = [np.maximum(out[name], 0) for name in phase_columns() if name != "unexplained_ns"]
    out["unexplained_ns"] = row["done_at_ns"] - row["scheduled_at_ns"] - sum(phases)
    out["chunks"] = known(started, row["tokens"])
    out["first_chunk_tokens"] = known(started, 1)  # the engine publishes token by token
    out["output_tokens"] = known(ok, row["tokens"])
    out["prompt_tokens"] = known(ok, np.array(driver.requests.prompt_tokens)[row["request_id"]])
    for status, code in HTTP_STATUS.items():
        out["http_status"][row["status"] == status] = code
    out["detail"] = np.array([text.encode() for text in driver.texts])[row["detail"]]
    out["model"] = driver.spec.model.encode()
    return out

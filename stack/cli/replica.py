"""``tidegauge replica``: one replica in the foreground, for trying things by hand."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from stack.cli import app, console


@app.command(epilog="Example: tidegauge replica --gpu h100_sxm --port 8000")
def replica(
    gpu: Annotated[str, typer.Option(help="GPU whose profile keeps the time; a wrong one lists them all.")] = "a100_sxm",
    model: Annotated[str, typer.Option(help="Model of the profile.")] = "meta-llama/Meta-Llama-3.1-8B",
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that the model is spread over.")] = 1,
    cold_start: Annotated[str, typer.Option(help="A preset (snapshot cached uncached baked_image), or seconds.")] = "0",
    max_num_seqs: Annotated[int, typer.Option(help="Requests in the running batch.")] = 256,
    token_budget: Annotated[int, typer.Option(help="Tokens in a step, decodes and prefill together.")] = 2048,
    host: Annotated[str, typer.Option(help="Where to listen; on loopback unless told otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the lengths that a client leaves open.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help='Print one line {"port","pid"} once it listens.')] = False,
) -> None:
    """A stand-in GPU server: OpenAI's API and vLLM's metrics, at the pace of a GPU's profile. No GPU, no model, filler words."""
    import uvloop

    from replay.hardware import fleet_spec, profile
    from stack import replica as stand_in

    try:
        start: str | dict[str, float] = {"engine_start": float(cold_start)}
    except ValueError:
        start = cold_start
    fleet = {
        "kind": "stand-in", "gpu": gpu, "model": model, "tensor_parallel": tensor_parallel, "cold_start": start,
        "max_num_seqs": max_num_seqs, "token_budget": token_budget,
    }  # fmt: skip
    spec = fleet_spec(fleet, where="replica")

    def listening(bound: int) -> None:
        if as_json:
            print(json.dumps({"port": bound, "pid": os.getpid()}), flush=True)
            return
        console.print(f"stand-in, not a GPU: {profile(spec).describe()}")
        console.print(f"http://{host}:{bound}/v1  ready after {spec.phases().total_ns / 1e9:g} s of cold start; Ctrl-C ends it")

    uvloop.run(stand_in.run(spec, stand_in.ReplicaConfig(fleet=fleet, host=host, port=port, seed=seed), listening))

"""``tidegauge gateway``: the gateway in the foreground, in front of a fleet that it runs itself or of URLs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from stack.cli import app, console


@app.command(epilog="Example: tidegauge gateway --policy lo-concurrency --fleet fleet.yaml --port 8080")
def gateway(
    policy: Annotated[str, typer.Option(help="Policy file or preset; `tidegauge policies` lists them.")],
    fleet: Annotated[Path, typer.Option(help="Fleet as YAML: kind stand-in, llama or urls, and what belongs to it.")],
    host: Annotated[str, typer.Option(help="Where to listen; on loopback unless told otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 0,
    run_dir: Annotated[Path | None, typer.Option(help="Where records go; a new folder under runs/ if not given.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="YAML mapping of API key to tenant; without it, nobody needs one.")] = None,
    seed: Annotated[int, typer.Option(help="Of what the policy draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help='Print one line {"port","url","pid"} once it listens.')] = False,
) -> None:
    """An OpenAI-compatible gateway: balances, queues, limits and scales as the policy says, and records every request."""
    import uvloop

    from replay.hardware import fleet_spec
    from replay.policies import spec
    from replay.strict import parse_yaml, read_bounded
    from stack import config
    from stack.gateway import run

    keys = config.api_keys(parse_yaml(read_bounded(api_keys), str(api_keys))[0], str(api_keys)) if api_keys else {}
    checked = config.GatewayConfig(
        run_dir=run_dir or Path("runs") / f"gateway-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}",
        policy=spec.load(policy),
        fleet=fleet_spec(parse_yaml(read_bounded(fleet), str(fleet))[0], str(fleet)),
        host=host,
        port=port,
        seed=seed,
        api_keys=keys,
    )

    def listening(bound: int) -> None:
        if as_json:
            print(json.dumps({"port": bound, "url": config.url(host, bound), "pid": os.getpid()}), flush=True)
            return
        console.print(
            f"{config.url(host, bound)}/v1  policy {checked.policy.name}; records go to {checked.run_dir}; Ctrl-C ends it"
        )

    raise typer.Exit(uvloop.run(run(checked, listening)))

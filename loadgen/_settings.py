"""What a replay is told: the options in Locust's help and page, and their one strict reading.

Every option is text until ``Settings.read``: Locust's page sends text, and one reading gives one set of errors.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any, Final

from replay import traces
from replay.errors import InputError
from replay.schedule import parse_duration_s
from replay.slo import Slo

# flag, destination, default, metavar, help. None of them shadows an option of Locust's own (a test compares).
_OPTIONS: Final = (
    ("--trace", "trace", "", "<file>", "Recorded traffic (CSV, JSONL or Parquet), or azure-code-2023: an hour that comes along"),
    ("--run-dir", "run_dir", "", "<folder>", "Where rows, spans and the manifest go; default runs/<run id>"),
    ("--run-id", "run_id", "", "<text>", "Name of the run; it salts the prompts. Default: time and a random part"),
    ("--from", "from_time", "", "<time>", "Replay the trace from here on, e.g. 10m"),
    ("--to", "to_time", "", "<time>", "Replay the trace up to here, e.g. 15m"),
    ("--busiest", "busiest", "", "<time>", "Replay only the busiest window of this length, e.g. 90s"),
    ("--time-scale", "time_scale", "1", "<factor>", "2 = twice as slow"),
    ("--rate-scale", "rate_scale", "1", "<factor>", "2 = twice as many requests in the same time"),
    ("--jitter", "jitter", "0", "<time>", "Move every arrival later by up to this much, seeded"),
    ("--seed", "seed", "0", "<int>", "Seed of jitter and rate scale"),
    ("--model", "model", "", "<name>", "Model to ask for; default: the only one in /v1/models"),
    ("--api-key", "api_key", "", "<key>", "Sent as bearer token; better set OPENAI_API_KEY. Never logged or written"),
    ("--endpoint", "endpoint", "chat", "<name>", "chat (/v1/chat/completions) or completions (/v1/completions)"),
    ("--timeout", "timeout", "600s", "<time>", "A request that takes longer ends as timeout"),
    ("--drain", "drain", "2m", "<time>", "How long to wait for answers after the trace; what is inside then ends as timeout"),
    ("--slo", "slo", "", "<terms>", "Targets that a good request meets, e.g. ttft<=2s,tpot<=50ms,e2e<=30s"),
    ("--bytes-per-token", "bytes_per_token", "auto", "<number>", "Bytes of prompt text per token; auto asks the server twice"),
)  # fmt: skip
_SECRET: Final = frozenset({"api_key"})


def add_arguments(parser: Any) -> None:
    """Add the options to Locust's parser: a group of their own in --help, and fields in the page (but for the key)."""
    group = parser.add_argument_group(
        "Trace replay",
        "Open-loop replay of recorded traffic: requests leave when they were recorded, so users, spawn rate and run time are set "
        "for you, and Locust ends by itself after the trace and the drain. Exit code 0: valid, 1: invalid, 2: bad input. "
        "Page and master listen on 127.0.0.1 unless --web-host or --master-bind-host say otherwise.\n"
        "Example: locust -f loadgen/ --headless --host http://127.0.0.1:8000 --trace azure-code-2023 --busiest 90s",
    )
    for flag, destination, default, metavar, text in _OPTIONS:
        action = group.add_argument(flag, dest=destination, default=default, metavar=metavar, help=text)
        # Locust shows actions with these attributes in its page; a secret's default would stand in the page's source.
        action.include_in_web_ui = destination not in _SECRET
        action.is_secret = action.is_required = action.is_multiple = False
    # Locust answers --help before it reads a locustfile, so that it cannot know these; this prints all of them.
    group.add_argument("--replay-help", action="help", help="Show Locust's options and these, and exit")
    # Loopback unless asked: page and RPC port have no password. Locust's own default is every interface.
    parser.set_defaults(web_host="127.0.0.1", master_bind_host="127.0.0.1")


@dataclass(frozen=True)
class Settings:
    """The options, read. ``repr`` leaves the key out."""

    host: str
    trace: str
    run_dir: str
    run_id: str
    shaping: traces.Shaping
    model: str
    endpoint: str
    timeout_s: float
    drain_s: float
    slo: dict[str, float]  # {"ttft_s": 2.0}: the terms that are set
    bytes_per_token: float | None  # None: ask the server

    @classmethod
    def read(cls, options: argparse.Namespace, host: str | None) -> Settings:
        """InputError names the option, the rule and what to try."""
        if not options.trace:
            raise InputError(
                "no trace given", where="--trace", fix="--trace azure-code-2023, the hour that comes along, or your own file"
            )
        if not host:
            raise InputError("no address to send to", where="--host", fix="--host http://127.0.0.1:8000")
        if options.endpoint not in ("chat", "completions"):
            raise InputError(f"is {options.endpoint!r}", where="--endpoint", rule="chat or completions")
        run_id = options.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        if not re.fullmatch(r"[\w./:+=-]{1,200}", run_id, re.ASCII):
            raise InputError(f"is {run_id!r}", where="--run-id", rule="letters, digits and ._-/:+=, at most 200")
        return cls(
            host=host,
            trace=options.trace,
            run_dir=options.run_dir or os.path.join("runs", run_id),
            run_id=run_id,
            shaping=read_shaping(options),
            model=options.model,
            endpoint=options.endpoint,
            timeout_s=parse_duration_s(options.timeout, where="--timeout"),
            drain_s=parse_duration_s(options.drain, where="--drain"),
            slo=Slo.parse(options.slo).terms(),
            bytes_per_token=None
            if options.bytes_per_token == "auto"  # noqa: S105
            else _number(options.bytes_per_token, "--bytes-per-token"),
        )


def api_key(options: argparse.Namespace) -> str:
    """The key, from the option or OPENAI_API_KEY; kept out of Settings, so that printing or writing those cannot show it."""
    key: str = options.api_key or os.environ.get("OPENAI_API_KEY", "")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise InputError(
            "holds a blank or a sign that no header can carry", where="--api-key or OPENAI_API_KEY", fix="check it for a line end"
        )
    return key


def read_shaping(options: argparse.Namespace) -> traces.Shaping:
    def span(text: str, flag: str) -> float | None:
        return parse_duration_s(text, where=flag) if text else None

    return traces.Shaping(
        from_s=span(options.from_time, "--from"),
        to_s=span(options.to_time, "--to"),
        busiest_s=span(options.busiest, "--busiest"),
        time_scale=_number(options.time_scale, "--time-scale"),
        rate_scale=_number(options.rate_scale, "--rate-scale"),
        jitter_s=span(options.jitter, "--jitter") or 0.0,
        seed=int(_number(options.seed, "--seed", whole=True)),
    )


def _number(text: str, flag: str, whole: bool = False) -> float:
    try:
        number = int(text) if whole else float(text)
    except ValueError as error:
        raise InputError(f"is {text!r}", where=flag, rule="a whole number" if whole else "a number") from error
    if not 0 <= number < float("inf"):
        raise InputError(f"is {text}", where=flag, rule="a finite number, not negative")
    return number

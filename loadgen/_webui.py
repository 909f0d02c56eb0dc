"""What Locust shows of a replay: its table (terminal, page, CSV, HTML report), and a tab of our own in its page."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from flask import Response, json, request

from loadgen._histogram import LogHistogram
from loadgen._leader import Leader
from loadgen._outcomes import Ended
from loadgen._verdict import milliseconds
from replay.records import NS_PER_S, OK, STATUSES

KEY: Final = "tidegauge"


def table(environment: Any, path: str) -> Callable[[Ended], None]:
    """Locust's table: one request event each, and TTFT and TPOT as entries beside (as events they would inflate the totals)."""
    fire, stats = environment.events.request.fire, environment.runner.stats

    def show(ended: Ended) -> None:
        exception = None if ended.status == OK else f"{STATUSES[ended.status]}: {ended.detail}"
        fire(
            request_type="POST", name=path, response_time=ended.e2e_ns / 1e6, response_length=max(ended.output_tokens, 0),
            exception=exception, context={}, response=None,
        )  # fmt: skip
        if ended.ttft_ns >= 0:
            stats.get("TTFT", "POST").log(ended.ttft_ns / 1e6, 0)
        if ended.tpot_ns >= 0:
            stats.get("TPOT", "POST").log(ended.tpot_ns / 1e6, 0)

    return show


def add_tab(web_ui: Any, rows: Callable[[], list[dict[str, str]]]) -> None:
    """How far the replay is, how late it sends, what it measures now, the verdict: ``rows()`` is asked whenever the page polls."""
    web_ui.template_args |= {
        "extended_tabs": [{"title": "Replay", "key": KEY}],
        "extended_tables": [{"key": KEY, "structure": [{"key": "name", "title": "Replay"}, {"key": "value", "title": ""}]}],
    }

    def extend(response: Response) -> Response:
        if request.path.endswith("/stats/requests") and response.status_code == 200 and response.is_json:
            response.set_data(json.dumps({**response.get_json(), "extended_stats": [{"key": KEY, "data": rows()}]}))
        return response

    web_ui.app.after_request(extend)


def progress_rows(leader: Leader, stats: Any) -> list[dict[str, str]]:
    """Name and value of each line of the tab."""
    workers = [worker for worker in leader.live.values() if worker]
    statuses = [sum(worker["statuses"][code] for worker in workers) for code in range(len(STATUSES))]
    lateness = LogHistogram()
    for worker in workers:
        lateness.merge(worker["lateness"])
    planned, planned_s = len(leader.plan), leader.planned_ns / NS_PER_S
    second = max(0.0, time.time() - leader.started_at_unix_ns / NS_PER_S) if leader.started_at_unix_ns else 0.0
    ended = sum(statuses)
    found = {
        "Progress": f"{ended} of {planned} ended ({ended / planned:.0%}), {sum(w['inside'] for w in workers)} inside",
        "Trace": f"second {min(second, planned_s):.0f} of {planned_s:.0f}" + (", draining" if second > planned_s else ""),
        "Statuses": ", ".join(f"{count} {name}" for name, count in zip(STATUSES, statuses, strict=True) if count) or "-",
        "Send lateness p50 / p99": " / ".join(_quantile(lateness, share) for share in (0.5, 0.99)),
        "TTFT now p50 / p95 / p99": _now(stats, "TTFT"),
        "TPOT now p50 / p95 / p99": _now(stats, "TPOT"),
        "Run directory": leader.settings.run_dir,
    }
    if leader.validity:
        found["Verdict"] = "valid" if leader.validity["valid"] else "INVALID: " + "; ".join(leader.validity["reasons"])
        found["Next"] = f"tidegauge report {leader.settings.run_dir}"
    return [{"name": name, "value": value} for name, value in found.items()]


def _quantile(histogram: LogHistogram, share: float) -> str:
    value = histogram.quantile_ns(share)
    return "-" if value is None else milliseconds(value / 1e9)


def _now(stats: Any, name: str) -> str:
    """Over the last ten seconds, as Locust rounds it."""
    entry = stats.get(name, "POST")
    found = [entry.get_current_response_time_percentile(share) for share in (0.5, 0.95, 0.99)]
    return " / ".join("-" if value is None else f"{value} ms" for value in found)

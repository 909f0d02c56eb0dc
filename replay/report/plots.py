"""The plots of a report as static inline SVG: altair describes them, vl-convert draws them, no browser and no network.

Colours are CSS variables of the page (``var(--p0)``), so that one SVG serves light, dark and paper. Everything is reduced
before it is drawn: a curve has at most ``ECDF_POINTS`` points, a time line ``timeline.BINS``; no mark stands for a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from replay.records import PHASES
from replay.report.assemble import Policy, Report
from replay.report.formats import seconds
from replay.report.metrics import Values
from replay.report.timeline import Timeline
from replay.slo import limit_words

WIDTH: Final = 430  # of the plotting area in CSS pixels; the page scales it, to three quarters at a width of 380
ECDF_POINTS: Final = 400
ECDF_HEIGHT: Final = 220
SHORTEST_S: Final = 1e-4  # left end of logarithmic axes: below a tenth of a millisecond nothing is told apart
MINUTES_FROM_S: Final = 600  # longer windows are labelled in minutes
POLICY_COLOURS: Final = [f"var(--p{index})" for index in range(8)]
POLICY_DASHES: Final = [
    [1, 0],
    [6, 2],
    [2, 2],
    [8, 2, 2, 2],
    [4, 4],
    [10, 3],
    [1, 3],
    [6, 2, 1, 2, 1, 2],
]  # beside colour, for print
STATES: Final = {"ready": "var(--ready)", "starting": "var(--starting)", "draining": "var(--draining)"}
PHASE_COLOURS: Final = dict(zip(PHASES, (f"var(--f{index})" for index in range(len(PHASES))), strict=True))
_AXIS_EXPR: Final = "datum.value < 1 ? format(datum.value * 1000, '~g') + ' ms' : format(datum.value, '~g') + ' s'"


class Figure(NamedTuple):
    """A plot for the page. ``legend`` holds (label, colour, dash or None), drawn as HTML so that it wraps and stays readable."""

    name: str
    title: str
    caption: str
    svg: str
    legend: list[tuple[str, str, list[int] | None]]


def figures(report: Report) -> list[Figure]:
    """Every plot that the runs have data for."""
    policies = report.policies
    drawn = [_traffic(policies), _replicas(policies)]
    drawn += [_ecdf(policies, "ttft_s", "TTFT", report.slo.ttft_s), _ecdf(policies, "tpot_s", "TPOT", report.slo.tpot_s)]
    return [figure for figure in [*drawn, _phases(policies)] if figure is not None]


def _policy_legend(policies: Sequence[Policy]) -> list[tuple[str, str, list[int] | None]]:
    return [(policy.name, POLICY_COLOURS[index % 8], POLICY_DASHES[index % 8]) for index, policy in enumerate(policies)]


def _by_policy(policies: Sequence[Policy]) -> dict[str, Any]:
    """Colour and dash of each policy; legends are the page's."""
    names = [policy.name for policy in policies]
    colours, dashes = ([table[index % 8] for index in range(len(names))] for table in (POLICY_COLOURS, POLICY_DASHES))
    return {
        "color": alt.Color("policy:N", scale=alt.Scale(domain=names, range=colours), legend=None),
        "strokeDash": alt.StrokeDash("policy:N", scale=alt.Scale(domain=names, range=dashes), legend=None),
    }


def _shown(policies: Sequence[Policy]) -> str:
    """Which repeat time lines are of, where there are several."""
    repeats = {policy.arms[0].repeat for policy in policies}
    several = any(len(policy.arms) > 1 for policy in policies)
    return f" Shown is repeat {min(repeats)}, one of {max(len(policy.arms) for policy in policies)}." if several else ""


def _window_s(policies: Sequence[Policy]) -> float:
    return max(policy.timeline.bin_s * len(policy.timeline.arrivals_rps) for policy in policies)


def _time_axis(policies: Sequence[Policy]) -> tuple[float, str]:
    """(seconds in one unit of the axis, its title)."""
    return (60.0, "minutes from the start") if _window_s(policies) >= MINUTES_FROM_S else (1.0, "seconds from the start")


def _starts(line: Timeline) -> Values:
    """Where each bin begins, in seconds."""
    starts: Values = np.arange(len(line.arrivals_rps), dtype=np.float64) * np.float64(line.bin_s)
    return starts


def _traffic(policies: Sequence[Policy]) -> Figure:
    """Arrivals, and below them on the same axis the queue that they made under each policy."""
    line = policies[0].timeline
    unit_s, title = _time_axis(policies)
    x = alt.X(
        "at:Q", title=title, axis=alt.Axis(tickCount=8), scale=alt.Scale(domain=[0, _window_s(policies) / unit_s], nice=False)
    )
    arrivals = pd.DataFrame({"at": _starts(line) / unit_s, "rps": line.arrivals_rps})
    chart: Any = (
        alt.Chart(arrivals)
        .mark_area(interpolate="step-after", color="var(--arrivals)")
        .encode(x=x, y=alt.Y("rps:Q", title="arrivals per second"))
        .properties(width=WIDTH, height=130)
    )
    queues = [
        pd.DataFrame({"policy": policy.name, "at": _starts(policy.timeline) / unit_s, "queued": policy.timeline.queued})
        for policy in policies
        if policy.timeline.queued is not None
    ]
    caption = f"Planned arrivals in bins of {seconds(line.bin_s)}, the same for every policy."
    if not queues:
        return _figure("traffic", "Arrivals", caption + _shown(policies), chart, [])
    chart &= (
        alt.Chart(pd.concat(queues))
        .mark_line(interpolate="step-after", strokeWidth=1.6)
        .encode(x=x, y=alt.Y("queued:Q", title="requests waiting"), **_by_policy(policies))
        .properties(width=WIDTH, height=130)
    )
    caption += f" Below, the longest queue in the gateway in each bin; what waits inside a replica is not in it.{_shown(policies)}"
    return _figure("traffic", "Arrivals and queue over time", caption, chart, _policy_legend(policies))


def _replicas(policies: Sequence[Policy]) -> Figure | None:
    unit_s, title = _time_axis(policies)
    frames = []
    for policy in policies:
        below = np.zeros(len(policy.timeline.arrivals_rps))
        for state in STATES:
            if (counts := getattr(policy.timeline, state)) is not None:
                at = _starts(policy.timeline) / unit_s
                frames.append(pd.DataFrame({"policy": policy.name, "state": state, "at": at, "from": below, "to": below + counts}))
                below = below + counts
    if not frames:
        return None
    chart = (
        alt.Chart(pd.concat(frames))
        .mark_area(interpolate="step-after")
        .encode(
            x=alt.X(
                "at:Q",
                title=title,
                axis=alt.Axis(tickCount=8),
                scale=alt.Scale(domain=[0, _window_s(policies) / unit_s], nice=False),
            ),
            y=alt.Y("from:Q", title=None, axis=alt.Axis(tickMinStep=1, tickCount=4)),
            y2="to:Q",
            color=alt.Color("state:N", scale=alt.Scale(domain=list(STATES), range=list(STATES.values())), legend=None),
            row=alt.Row("policy:N", sort=[policy.name for policy in policies], title=None, header=_row_header()),
        )
        .properties(width=WIDTH, height=80)
    )
    caption = f"Replicas paid for, by what they were doing (mean over each bin).{_shown(policies)}"
    return _figure("replicas", "Replicas over time", caption, chart, [(state, colour, None) for state, colour in STATES.items()])


def _row_header() -> alt.Header:
    return alt.Header(labelAngle=0, labelOrient="top", labelAnchor="start", labelFontWeight="bold", labelPadding=4)


def ecdf(ascending: Values, failures: int) -> tuple[Values, Values]:
    """(values, share of all that are at most that) at no more than ``ECDF_POINTS`` ranks, a quarter of them in the last 1 %.

    Failures are beyond every value, so the curve ends at the share that succeeded.
    """
    count = len(ascending)
    body, tail = ECDF_POINTS * 3 // 4, ECDF_POINTS // 4
    shares = np.concatenate([np.linspace(0, 0.99, body, endpoint=False), np.linspace(0.99, 1, tail)])
    ranks = np.unique(np.ceil(shares * count).clip(1, count).astype(int))
    return ascending[ranks - 1].clip(min=SHORTEST_S), ranks / (count + failures)


def _ecdf(policies: Sequence[Policy], name: str, label: str, limit_s: float | None) -> Figure | None:
    frames = []
    for policy in policies:
        pooled = np.sort(np.concatenate([arm.measured.samples[name] for arm in policy.counted]))
        if len(pooled):
            values_s, shares = ecdf(pooled, sum(arm.measured.failures for arm in policy.counted))
            frames.append(pd.DataFrame({"policy": policy.name, "seconds": values_s, "share": shares}))
    if not frames:
        return None
    data = pd.concat(frames)
    low_s, high_s = (min(data["seconds"].min(), limit_s or math.inf), max(data["seconds"].max(), limit_s or 0))
    scale = alt.Scale(type="log", domain=[low_s * 0.9, high_s * 1.1], nice=False)
    axis = alt.Axis(values=_log_ticks(low_s * 0.9, high_s * 1.1), labelExpr=_AXIS_EXPR)
    chart: Any = (
        alt.Chart(data)
        .mark_line(interpolate="step-after", strokeWidth=1.8, clip=True)
        .encode(
            x=alt.X("seconds:Q", scale=scale, axis=axis, title=f"{label}, logarithmic"),
            y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"), title="share of requests at most that"),
            order="share:Q",
            **_by_policy(policies),
        )
    )
    if limit_s is not None:
        rule = alt.Chart(pd.DataFrame({"seconds": [limit_s], "text": [f"SLO {limit_words(limit_s)}"]}))
        at_limit = alt.X("seconds:Q", scale=scale, axis=axis)
        line = rule.mark_rule(color="var(--ink)", strokeDash=[3, 3]).encode(x=at_limit)
        is_far = math.log(limit_s / low_s) > 0.7 * math.log(high_s / low_s)  # no room for the words to its right
        side: dict[str, Any] = {"align": "right", "dx": -5} if is_far else {"align": "left", "dx": 5}
        chart += line + rule.mark_text(**side, y=ECDF_HEIGHT - 10, color="var(--ink)").encode(x=at_limit, text="text:N")
    caption = f"{label} over all that arrived, repeats pooled: a curve that ends below 100 % shows what failed."
    return _figure(
        name.removesuffix("_s"),
        f"{label} distribution",
        caption,
        chart.properties(width=WIDTH, height=ECDF_HEIGHT),
        _policy_legend(policies),
    )


def _log_ticks(low_s: float, high_s: float) -> list[float]:
    """Decades inside the axis, with 2 and 5 between them where there are few."""
    decades = range(math.floor(math.log10(low_s)), math.ceil(math.log10(high_s)) + 1)
    steps = (1,) if len(decades) > 5 else (1, 3) if len(decades) > 3 else (1, 2, 5)
    return [step * 10.0**decade for decade in decades for step in steps if low_s <= step * 10.0**decade <= high_s]


def _phases(policies: Sequence[Policy]) -> Figure | None:
    rows = [
        {"policy": policy.name, "part": part, "phase": phase.replace("_", " "), "order": order, "seconds": spent_s}
        for policy in policies
        for part, prefix in (("all", "phase"), ("slowest 5 %", "tail"))
        for order, phase in enumerate(PHASES)
        if (spent_s := policy.totals[f"{prefix}_{phase}_s"])
    ]
    if not rows:
        return None
    seen = [phase for phase in PHASES if any(row["phase"] == phase.replace("_", " ") for row in rows)]
    words = [phase.replace("_", " ") for phase in seen]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(height=20)
        .encode(
            x=alt.X("seconds:Q", title="mean seconds of ok requests", axis=alt.Axis(tickCount=6)),
            y=alt.Y("part:N", title=None, sort=["all", "slowest 5 %"]),
            color=alt.Color("phase:N", scale=alt.Scale(domain=words, range=[PHASE_COLOURS[p] for p in seen]), legend=None),
            order="order:Q",
            row=alt.Row("policy:N", sort=[policy.name for policy in policies], title=None, header=_row_header()),
        )
        .properties(width=WIDTH - 40, height=56)
    )
    caption = "Mean time of ok requests by phase, of all of them and of the slowest 5 % by E2E; phases sum to E2E."
    return _figure(
        "phases", "Where the time went", caption, chart, [(w, PHASE_COLOURS[p], None) for p, w in zip(seen, words, strict=True)]
    )


def _figure(name: str, title: str, caption: str, chart: Any, legend: list[tuple[str, str, list[int] | None]]) -> Figure:
    ink = {
        "labelColor": "var(--ink-2)",
        "titleColor": "var(--ink-2)",
        "labelFontSize": 13,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
    }
    lines = {"domainColor": "var(--line)", "tickColor": "var(--line)", "gridColor": "var(--grid)"}
    styled = (
        chart.configure(background="transparent", padding=8, font="system-ui, sans-serif", aria=False)
        .configure_view(stroke=None)
        .configure_axis(**ink, **lines)
        .configure_header(labelColor="var(--ink)", labelFontSize=13)
        .configure_text(fontSize=13)
        .configure_facet(spacing=14)
    )
    return Figure(name, title, caption, _inline(vl_convert.vegalite_to_svg(styled.to_dict()), name, f"{title}. {caption}"), legend)


def _inline(svg: str, name: str, label: str) -> str:
    """The SVG as an element of a page: it scales, has a name for screen readers, and ids that no other plot has."""
    svg = re.sub(r'\b(id="|url\(#)', rf"\g<1>{name}-", svg)
    head = re.match(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', svg)
    assert head is not None, "vl-convert wrote no viewBox"
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{head[1]}" role="img" aria-label="{escaped}">' + svg[head.end() :]

"""The few kinds of panel that every dashboard is made of, and the queries in them, over the table of names.

A panel takes a ``names.Metric``, so it cannot ask for a metric that nobody emits; unit and description come from there.
Quantiles are taken of the summed buckets (sum by le), shares of summed counters, never means of means.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

from tracing import names

with warnings.catch_warnings():
    # 0.0.21 warns that its v1 dashboards are old; file provisioning of v2 is rejected by Grafana 13.0 (grafana#127928).
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
    from grafana_foundation_sdk.models import common as common_models
    from grafana_foundation_sdk.models import dashboard as dashboard_models

Dashboard = dashboard_models.Dashboard
PROMETHEUS: Final = common_models.DataSourceRef(type_val="prometheus", uid="prometheus")
GRID_COLUMNS: Final = 24
# Units of the table of names, as Grafana writes them; and of their rates.
_UNITS: Final = {"s": "s", "USD": "currencyUSD", "USD/h": "currencyUSD"}
_RATE_UNITS: Final = {"requests": "reqps", "USD": "currencyUSD"}
SHARE: Final = "percentunit"


Panel = timeseries.Panel | stat.Panel
P = TypeVar("P", timeseries.Panel, stat.Panel)
Row = list[Panel]  # panels that share a row of the grid


class Query(NamedTuple):
    expression: str
    legend: str
    exemplar: bool = False


def selected(metric: names.Metric, suffix: str = "") -> str:
    """The metric with the dashboard's variables as its filter."""
    variables = [label for label in ("run", "policy", "model") if label in (*names.COMMON_LABELS, *metric.labels)]
    return metric.name + suffix + "{" + ",".join(f'{label}=~"${label}"' for label in variables) + "}"


def rate(metric: names.Metric, by: str, legend: str = "") -> Query:
    """A counter's increase per second, summed by a label."""
    return Query(f"sum by ({by}) (rate({selected(metric)}[$__rate_interval]))", legend or f"{{{{{by}}}}}")


def quantiles(metric: names.Metric, *shares: float) -> list[Query]:
    """Quantiles of a histogram, client and gateway side by side."""
    buckets = f"sum by (le, side) (rate({selected(metric, '_bucket')}[$__rate_interval]))"
    return [Query(f"histogram_quantile({share}, {buckets})", f"{{{{side}}}} p{share * 100:g}", True) for share in shares]


def rate_once(metric: names.Metric, by: str) -> Query:
    """Like ``rate``, but what client and gateway both saw counts once: the larger of the two is all there was."""
    each_side = f"sum by (side, {by}) (rate({selected(metric)}[$__rate_interval]))"
    return Query(f"max by ({by}) ({each_side})", f"{{{{{by}}}}}")


def last(metric: names.Metric, by: str = "", legend: str = "") -> Query:
    """A gauge as it is now, or a counter's total; summed by a label, or altogether."""
    if not by:
        return Query(f"sum({selected(metric)})", legend)
    return Query(f"sum by ({by}) ({selected(metric)})", f"{{{{{by}}}}}")


def share(part: names.Metric, whole: names.Metric, legend: str) -> Query:
    """One counter as a share of another."""
    counted = [f"sum by (side) (rate({selected(metric)}[$__rate_interval]))" for metric in (part, whole)]
    return Query(" / ".join(counted), legend)


def unit_of(metric: names.Metric, *, per_second: bool = False) -> str:
    """Grafana's unit for a metric; a rate of seconds is a number of requests (Little's law), hence plain."""
    return (_RATE_UNITS if per_second else _UNITS).get(metric.unit, "short")


def lines(
    title: str, normal: str, metric: names.Metric, queries: Sequence[Query], *, unit: str = "", stacked: bool = False
) -> timeseries.Panel:
    """Values over time. ``normal`` says what a reader should expect to see, after what the metric is."""
    panel = (
        timeseries.Panel()
        .unit(unit or unit_of(metric))
        .min(0)
        .fill_opacity(30 if stacked else 8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .calcs(["mean", "max", "lastNotNull"])
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    return _complete(panel, title, normal, metric, queries)


def number(title: str, normal: str, metric: names.Metric, query: Query, *, unit: str = "") -> stat.Panel:
    """One figure, as it is now."""
    panel = (
        stat.Panel()
        .unit(unit or unit_of(metric))
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return _complete(panel, title, normal, metric, [query])


def _complete(panel: P, title: str, normal: str, metric: names.Metric, queries: Iterable[Query]) -> P:
    panel = panel.title(title).description(f"{metric.description}. {normal}").datasource(PROMETHEUS)
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(
            prometheus.Dataquery()
            .ref_id(letter)
            .datasource(PROMETHEUS)
            .expr(query.expression)
            .legend_format(query.legend)
            .exemplar(query.exemplar)
            .range()
        )
    return panel


def variable(name: str, label: str, metric: names.Metric) -> dashboard.QueryVariable:
    """A choice among the values of a label, all of them at first."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query(f"label_values({metric.name}, {name})")
        .refresh(dashboard_models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard_models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard_models.VariableOption(selected=True, text="All", value="$__all"))
    )


def board(
    uid: str, title: str, description: str, variables: Sequence[dashboard.QueryVariable], rows: Sequence[tuple[int, Row]]
) -> Dashboard:
    """A dashboard of rows, each with its height; its panels share the width and are numbered from 1."""
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["tidegauge"])
        .time("now-15m", "now")
        .refresh("5s")
        .timezone("browser")
        .tooltip(dashboard_models.DashboardCursorSync.CROSSHAIR)
        .variables(list(variables))
    )
    top, panel_id = 0, 1
    for height, panels in rows:
        width = GRID_COLUMNS // len(panels)
        for column, panel in enumerate(panels):
            at = dashboard_models.GridPos(h=height, w=width, x=column * width, y=top)
            built = built.with_panel(panel.id(panel_id).grid_pos(at))
            panel_id += 1
        top += height
    return built.build()

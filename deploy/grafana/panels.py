"""Panels in a line or two each, and Grafana's JSON made of them."""

import json
from dataclasses import dataclass
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "[$__rate_interval]"
OF_INSTANCE = 'instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """One graph, or one number.

    Attributes:
        queries: By legend; `{{label}}` is filled in by Grafana.
        unit: Grafana's name of it.
    """

    title: str
    text: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    rows: dict[str, list[Panel]]


def rate(metric: str, by: str = "") -> str:
    """Per second, over all API servers."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{RATE}))"


def quantiles(metric: str, *shares: float, by: str = "") -> dict[str, str]:
    """Of a histogram, over all API servers."""
    group = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    return {
        f"{name}p{share * 100:g}": f"histogram_quantile({share}, {rate(f'{metric}_bucket', group)})"
        for share in shares
    }


def mean(metric: str, by: str) -> str:
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def of_instances(metric: str) -> dict[str, str]:
    """A gauge of each instance, which every API server exports."""
    return {"{{instance}}": f"max by (instance) (pd_serve_instance_{metric}{{{OF_INSTANCE}}})"}


def rate_of_instances(metric: str) -> dict[str, str]:
    return {
        "{{instance}}": f"max by (instance) (rate(pd_serve_instance_{metric}_total{{{OF_INSTANCE}}}{RATE}))"
    }


def rendered(dashboard: Dashboard) -> str:
    """The file's text."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, y, 24, 1)}
        )
        y += 1
        columns, height = (4, 4) if row[0].kind == "stat" else (2, 8)
        width = 24 // columns
        for number, panel in enumerate(row):
            place = _at(number % columns * width, y + number // columns * height, width, height)
            panels.append(_panel(panel, place))
        y += -(-len(row) // columns) * height
    for number, shown in enumerate(panels, 1):
        shown["id"] = number
    page = {
        "uid": f"pd-serve-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["pd-serve"],
        "timezone": "browser",
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "schemaVersion": 39,
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "tags": ["pd-serve"], "title": "pd-serve", "asDropdown": True}],
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }
    return json.dumps(page, indent=2) + "\n"


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"},
        {
            "name": "instance",
            "type": "query",
            "label": "Instance",
            "datasource": SOURCE,
            "query": "label_values(pd_serve_instance_info, instance)",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
        if panel.stacked:
            custom |= {"fillOpacity": 40, "stacking": {"mode": "normal"}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
            }
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}

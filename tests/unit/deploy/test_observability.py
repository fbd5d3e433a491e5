"""The dashboards for Grafana and the alerts for Prometheus are valid and query metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.metric_list import metric_names

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
ALERTS = DEPLOY / "prometheus" / "alerts.yml"

#: Metrics of vLLM that the dashboards show beside ours.
VLLM_METRICS = {
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
}


def load(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def metrics_in(expression: str) -> set[str]:
    names = re.findall(r"\b(?:pd_serve_|vllm:)\w+", expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def test_there_are_four_dashboards() -> None:
    assert {path.stem for path in DASHBOARDS} == {"overview", "instances", "migrations", "scaling"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_named_after_its_file(path: Path) -> None:
    dashboard = load(path)

    assert dashboard["uid"] == f"pd-serve-{path.stem}"
    assert dashboard["title"].lower() == f"pd-serve / {path.stem}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_has_an_id_of_its_own_a_description_and_queries(path: Path) -> None:
    panels = load(path)["panels"]
    graphs = [panel for panel in panels if panel["type"] != "row"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert graphs
    for panel in graphs:
        assert all(panel[key] for key in ("title", "description", "targets")), panel["id"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references), panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}, panel["title"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_panel_with_a_line_for_each_instance_sorts_its_legend(path: Path) -> None:
    """Of 64 instances the ones that stand out come first, and the others can be scrolled to."""
    for panel in load(path)["panels"]:
        if any("{{instance}}" in target["legendFormat"] for target in panel.get("targets", ())):
            legend, tooltip = panel["options"]["legend"], panel["options"]["tooltip"]
            assert (legend["displayMode"], legend["placement"]) == ("table", "right"), panel["title"]
            assert (legend["sortBy"], legend["sortDesc"]) == ("Max", True), panel["title"]
            assert "max" in legend["calcs"], panel["title"]
            assert tooltip == {"mode": "multi", "sort": "desc"}, panel["title"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_fit_the_grid_without_overlap(path: Path) -> None:
    """Grafana's grid has 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in load(path)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_queries_use_variables_that_the_dashboard_defines(path: Path) -> None:
    dashboard = load(path)
    defined = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(expressions(dashboard))))

    assert used - defined == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_queries_of_a_dashboard_name_existing_metrics(path: Path) -> None:
    dashboard = load(path)
    variables = [str(variable["query"]) for variable in dashboard["templating"]["list"]]
    asked = {name for text in (*expressions(dashboard), *variables) for name in metrics_in(text)}

    assert asked
    assert asked - metric_names() - VLLM_METRICS == set()


def test_alerts_name_existing_metrics() -> None:
    """No traffic of a test would set most of them off."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    asked = {name for group in groups for rule in group["rules"] for name in metrics_in(rule["expr"])}

    assert asked
    assert asked - metric_names() == set()


def test_a_query_names_the_metric_of_a_histogram_series() -> None:
    query = "histogram_quantile(0.9, sum by (le) (rate(pd_serve_time_to_first_token_seconds_bucket[5m])))"

    assert metrics_in(query) == {"pd_serve_time_to_first_token_seconds"}

"""What Prometheus' operator and Grafana's sidecar are given on Kubernetes."""

import json

import pytest
import yaml

from tests.unit.deploy.manifests import (
    ROOT,
    VERSIONS,
    Manifest,
    check,
    named_ports,
    one,
    pod_templates,
    render,
    selected,
)

FOLDER = "monitoring"
GRAFANA = ROOT / "deploy" / "grafana" / "dashboards"
PROMETHEUS = ROOT / "deploy" / "prometheus"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", render(FOLDER), ids=lambda manifest: manifest["kind"])
def test_manifests_fit_their_schemas(manifest: Manifest, version: str) -> None:
    check(manifest, version)


def test_dashboards_are_those_of_grafana() -> None:
    config_map = one(FOLDER, "ConfigMap")
    files = {path.name: path.read_text() for path in GRAFANA.glob("*.json")}

    assert config_map["data"] == files
    # `kubectl apply` keeps a copy in an annotation, which may have so much.
    assert len(json.dumps(config_map)) < 256 * 2**10


def test_alerts_are_those_of_prometheus() -> None:
    assert one(FOLDER, "PrometheusRule")["spec"] == yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())


def test_every_api_server_is_scraped_as_prometheus_yml_does() -> None:
    templates = pod_templates(one("overlays/cpu", "RayService"))
    spec = one(FOLDER, "PodMonitor")["spec"]
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (endpoint,) = spec["podMetricsEndpoints"]

    assert selected(templates, spec["selector"]["matchLabels"]) == {"api"}
    port = named_ports(templates["api"])[endpoint["port"]]
    environment = {e["name"]: e["value"] for e in templates["api"]["spec"]["containers"][0]["env"]}
    assert environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == str(port)
    assert environment["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] == str(port + 1)
    assert endpoint["honorLabels"] == job["honor_labels"]
    relabelings = {rule["targetLabel"]: rule for rule in endpoint["relabelings"]}
    assert relabelings["job"]["replacement"] == job["job_name"]
    assert relabelings.keys() - {"job"} == {rule["target_label"] for rule in job["relabel_configs"]}


def test_prometheus_reaches_the_port_that_it_scrapes() -> None:
    policy = one(FOLDER, "NetworkPolicy")["spec"]
    monitor = one(FOLDER, "PodMonitor")["spec"]

    assert policy["podSelector"] == monitor["selector"]
    ((rule,),) = [policy["ingress"]]
    assert [port["port"] for port in rule["ports"]] == [monitor["podMetricsEndpoints"][0]["port"]]

"""The manifests fit their schemas, each other, and what the application takes. No cluster is asked."""

import copy
import importlib.metadata
import json
import re
import shlex
import tomllib
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.serve.schema import ServeDeploySchema

from pd_serve.config import ServeConfig
from pd_serve.launch import ray_serve
from tests.unit.deploy.manifests import (
    KUBERNETES,
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

OVERLAYS = ("overlays/cpu", "overlays/gpu")
RENDERED = [(folder, manifest) for folder in OVERLAYS for manifest in render(folder)]
SECRET = yaml.safe_load((KUBERNETES / "secret.yaml").read_text())


def title(value: Any) -> str:
    return f"{value['kind']}-{value['metadata']['name']}" if isinstance(value, dict) else str(value)


@pytest.fixture(params=OVERLAYS)
def service(request: pytest.FixtureRequest) -> Manifest:
    return one(request.param, "RayService")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("folder", "manifest"), [*RENDERED, ("", SECRET)], ids=title)
def test_manifests_fit_their_schemas(folder: str, manifest: Manifest, version: str) -> None:
    check(manifest, version)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "serveConfig"], ""),
        (["spec", "rayClusterConfig", "workerGroupSpecs", 0, "replica"], 2),
        (["spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"], "2"),
        (["spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "securitycontext"], {}),
        (["spec", "upgradeStrategy", "type"], "Rolling"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_what_does_not_fit_is_found(path: list[Any], value: Any) -> None:
    wrong = copy.deepcopy(one("overlays/cpu", "RayService"))
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value

    with pytest.raises(ValidationError):
        check(wrong, VERSIONS[-1])


def serve_config(service: Manifest) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def arguments(service: Manifest) -> ServeConfig:
    (application,) = serve_config(service)["applications"]
    return ServeConfig.of_ray_serve(application["args"])


def test_the_application_is_that_of_serve_yaml(service: Manifest) -> None:
    (ours,) = serve_config(service)["applications"]
    (plain,) = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())["applications"]
    own = ("args", "deployments")

    assert {name: ours[name] for name in ours if name not in own} == {
        name: plain[name] for name in plain if name not in own
    }


def test_ray_serve_and_the_builder_take_the_configuration(service: Manifest) -> None:
    schema = ServeDeploySchema.model_validate(serve_config(service))

    overridden = {deployment.name for deployment in schema.applications[0].deployments}
    assert overridden <= {ray_serve.ApiServerDeployment.name, ray_serve.InstanceManager.name}
    assert arguments(service).model == serve_config(service)["applications"][0]["args"]["model"]


def test_there_is_a_pod_for_each_instance_and_api_server(service: Manifest) -> None:
    args = arguments(service)
    wanted = {"api": args.api_servers, "prefill": args.prefill, "decode": args.decode}
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}

    assert {name: group["replicas"] for name, group in groups.items()} == wanted
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # KubeRay puts it into a shell's command line as it is.
        (resources,) = shlex.split(group["rayStartParams"]["resources"])
        assert json.loads(resources) == {name: 1}
    assert args.prefill_resources == {"prefill": 1}
    assert args.decode_resources == {"decode": 1}
    (deployment,) = serve_config(service)["applications"][0]["deployments"]
    assert deployment["placement_group_bundles"] == [{"api": 1}]


def test_keys_come_from_the_secret(service: Manifest) -> None:
    args = arguments(service)
    files = [args.api_key_file, args.admin_key_file, args.cluster_secret_file]

    for template in pod_templates(service).values():
        spec = template["spec"]
        (mount,) = (mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "keys")
        (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "keys")
        assert volume["secret"]["secretName"] == SECRET["metadata"]["name"]
        assert list(map(str, files)) == [f"{mount['mountPath']}/{key}" for key in SECRET["stringData"]]
        named = re.findall(rf"{mount['mountPath']}/([\w-]+)", json.dumps(spec))
        assert set(named) <= SECRET["stringData"].keys()
    assert set(SECRET["stringData"].values()) == {""}


def test_a_pod_has_time_for_what_it_does_before_it_ends(service: Manifest) -> None:
    templates = pod_templates(service)
    for name in ("api", "prefill", "decode"):
        spec = templates[name]["spec"]
        hook = spec["containers"][0]["lifecycle"]["preStop"]
        if "sleep" in hook:
            seconds = hook["sleep"]["seconds"]
        else:
            (waited,) = re.findall(r"pd-serve drain --node \S+ --wait (\d+)", hook["exec"]["command"][-1])
            seconds = int(waited)
        assert seconds < spec["terminationGracePeriodSeconds"]


def test_no_pod_runs_as_root_or_gains_rights(service: Manifest) -> None:
    for template in pod_templates(service).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert not spec["automountServiceAccountToken"]
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_versions_are_those_of_the_packages(service: Manifest) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {
        container["image"]
        for template in pod_templates(service).values()
        for container in template["spec"]["containers"]
    }

    assert service["spec"]["rayClusterConfig"]["rayVersion"] == importlib.metadata.version("ray")
    assert len(images) == 1
    assert re.fullmatch(rf"pd-serve:{re.escape(version)}-(cpu|cuda)", images.pop())


def test_the_service_leads_to_api_servers(service: Manifest) -> None:
    templates = pod_templates(service)
    spec = one("overlays/cpu", "Service")["spec"]

    assert selected(templates, spec["selector"]) == {"api"}
    (port,) = spec["ports"]
    http = serve_config(service)["http_options"]["port"]
    assert named_ports(templates["api"])[port["targetPort"]] == port["port"] == http
    drains = templates["decode"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    name = one("overlays/cpu", "Service")["metadata"]["name"]
    assert drains.endswith(f"--url http://{name}:{port['port']}")


def test_other_pods_reach_nothing_but_the_api_and_the_operator_the_dashboard(service: Manifest) -> None:
    templates = pod_templates(service)
    outside: dict[str, set[int]] = {name: set() for name in templates}
    closed: set[str] = set()
    for manifest in render("overlays/cpu"):
        if manifest["kind"] != "NetworkPolicy":
            continue
        names = selected(templates, manifest["spec"]["podSelector"]["matchLabels"])
        closed |= names
        for rule in manifest["spec"]["ingress"]:
            (peer,) = rule["from"]
            if "namespaceSelector" not in peer:
                labels = peer["podSelector"]["matchLabels"]
                assert selected(templates, labels) == set(templates)
                continue
            for name in names:
                outside[name] |= {named_ports(templates[name])[port["port"]] for port in rule["ports"]}

    assert closed == set(templates)
    assert outside == {"head": {8265}, "api": {8000}, "prefill": set(), "decode": set()}


def test_one_pod_of_each_kind_stays() -> None:
    templates = pod_templates(one("overlays/cpu", "RayService"))
    budgets = [m["spec"] for m in render("overlays/cpu") if m["kind"] == "PodDisruptionBudget"]
    kept = [selected(templates, budget["selector"]["matchLabels"]) for budget in budgets]

    assert sorted(kept, key=sorted) == sorted(({name} for name in templates), key=sorted)
    assert {budget["minAvailable"] for budget in budgets} == {1}

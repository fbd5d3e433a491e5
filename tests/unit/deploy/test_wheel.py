"""The wheel: what is in it, and that it works where nothing of the checkout is on the path."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

import pytest

from tests.environment import START_ENVIRONMENT

ROOT = Path(__file__).parents[3]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["-q", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(wheel)]
    subprocess.run(command, capture_output=True, check=True)
    return folder


@pytest.fixture(scope="module")
def without_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of this environment, but for vLLM."""
    folder = tmp_path_factory.mktemp("packages")
    for path in SITE_PACKAGES.iterdir():
        if not path.name.startswith(("vllm", "pd_serve", "__")):
            (folder / path.name).symlink_to(path)
    return folder


def run(installed: Path, packages: Path, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """-S: without the link of this environment to the checkout."""
    environment = START_ENVIRONMENT | {"PYTHONPATH": f"{installed}{os.pathsep}{packages}", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_wheel_has_the_product_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "pd_serve",
        "router",
        "migration",
    }
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("pd_serve", "router", "migration")
        for path in (ROOT / package).rglob("*.*")
        if "__pycache__" not in path.parts and path.is_file()
    }
    assert sources == {name for name in names if ".dist-info/" not in name}


def test_the_wheel_claims_the_python_that_the_tests_run_on(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())

    assert metadata["Requires-Python"] == "==3.11.*"


def test_the_command_of_the_wheel_shows_its_help(installed: Path) -> None:
    done = run(installed, SITE_PACKAGES, [str(installed / "bin" / "pd-serve"), "serve", "-h"])

    assert (done.returncode, done.stderr) == (0, "")
    assert "[MODEL] [OPTIONS] [VLLM OPTIONS]" in done.stdout


def test_the_application_of_ray_serve_is_imported_from_the_wheel(installed: Path) -> None:
    code = "import pd_serve.launch.ray_serve as m; print(m.__file__, m.build.__name__)"

    done = run(installed, SITE_PACKAGES, ["-c", code])

    assert done.stdout.split() == [str(installed / "pd_serve" / "launch" / "ray_serve.py"), "build"]


@pytest.mark.parametrize("arguments", [[], ["tiny"], ["tiny", "--max-model-len", "1024"]])
def test_without_vllm_one_line_says_what_to_install(
    installed: Path, without_vllm: Path, arguments: list[str]
) -> None:
    done = run(installed, without_vllm, [str(installed / "bin" / "pd-serve"), "serve", *arguments])

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error  vLLM is not installed")
    assert "requirements-cpu.txt" in line

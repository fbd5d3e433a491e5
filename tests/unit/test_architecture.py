"""Imports point downward only; heavy packages are imported where they are meant to be, and lazily."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: The packages of this repository, and those of them that each may import.
MAY_IMPORT = {
    "deploy": {"deploy", "pd_serve", "router", "migration"},
    "loadtests": {"loadtests", "pd_serve", "router", "migration"},
    "pd_serve": {"pd_serve", "router", "migration"},
    "router": {"router"},
    "migration": {"migration"},
}

#: What a package must not import, not even inside of a function.
FORBIDDEN = {
    "router": {"vllm", "ray", "zmq", "torch", "fastapi", "nixl"},
    "migration": {"ray", "zmq", "fastapi"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, by the file (relative to the root) that imports it.

    Attributes:
        on_import: It is imported as soon as the file is: not inside of a function, nor for types only.
    """

    file: str
    module: str
    on_import: bool

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def imports_of(source: str, file: str) -> Iterator[Import]:
    yield from _walk(ast.parse(source), file, on_import=True)


def _walk(node: ast.AST, file: str, on_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(file, alias.name, on_import)
    elif isinstance(node, ast.ImportFrom):
        package = list(Path(file).parent.parts)
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        yield Import(file, ".".join(part for part in (base, node.module) if part), on_import)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        on_import = False
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.body:
            yield from _walk(child, file, False)
        for child in node.orelse:
            yield from _walk(child, file, on_import)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, file, on_import)


def all_imports() -> list[Import]:
    found = []
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            found += imports_of(path.read_text(encoding="utf-8"), file)
    return found


IMPORTS = all_imports()


def of(package: str) -> list[Import]:
    return [found for found in IMPORTS if found.file.startswith(f"{package}/")]


def test_what_counts_as_an_import() -> None:
    source = """
import a.b, c
from d import e
from . import f
from ..g import h
if TYPE_CHECKING:
    import only_for_types
else:
    import instead
try:
    import maybe
except ImportError:
    pass
class K:
    import in_a_class
def lazily():
    import later
"""
    found = {(found.module, found.on_import) for found in imports_of(source, "pkg/sub/module.py")}

    assert found == {
        ("a.b", True),
        ("c", True),
        ("d", True),
        ("pkg.sub", True),
        ("pkg.g", True),
        ("only_for_types", False),
        ("instead", True),
        ("maybe", True),
        ("in_a_class", True),
        ("later", False),
    }


def test_there_is_something_to_check() -> None:
    assert {package for package in MAY_IMPORT if of(package)} >= {"pd_serve", "router", "migration"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_downward(package: str) -> None:
    upward = MAY_IMPORT.keys() - MAY_IMPORT[package] | {"tests"}

    assert [found for found in of(package) if found.package in upward] == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_what_a_package_does_not_know(package: str) -> None:
    assert [found for found in of(package) if found.package in FORBIDDEN[package]] == []


def test_ray_is_imported_in_one_place_of_the_service() -> None:
    files = {
        found.file for found in IMPORTS if found.package == "ray" and not found.file.startswith("deploy/")
    }

    assert files == {"pd_serve/cluster.py"}


def test_sockets_are_made_in_the_service_only() -> None:
    assert {found.file.split("/")[0] for found in IMPORTS if found.package == "zmq"} == {"pd_serve"}


def test_vllm_is_imported_on_import_by_the_adapter_and_the_front_end_only() -> None:
    """Importing vLLM costs 10 s."""
    files = {found.file for found in IMPORTS if found.package == "vllm" and found.on_import}

    places = ("migration/vllm_engine/", "pd_serve/api/", "pd_serve/simulation/live.py")
    assert {file for file in files if not file.startswith(places)} == set()


@pytest.mark.parametrize("package", ["torch", "ray", "nixl", "transformers"])
def test_the_core_of_the_migration_imports_nothing_heavy(package: str) -> None:
    """The protocol runs where nothing but its own code is: in simulations, in tests."""
    files = {found.file for found in of("migration") if found.package == package and found.on_import}

    assert {file for file in files if not file.startswith("migration/vllm_engine/")} == set()


@pytest.mark.parametrize(
    "module",
    [
        "pd_serve.cli",
        "pd_serve.llumlet",
        "pd_serve.wire",
        "pd_serve.instance",
        "pd_serve.scheduler_process",
        "migration.coordinator",
    ],
)
def test_importing_it_imports_nothing_that_takes_seconds(module: str) -> None:
    """Whatever they import in turn: `pd-serve --help` and a starting actor do not wait for vLLM."""
    code = f"import sys, {module}; print(*sorted({{'vllm', 'ray', 'torch'}} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.split() == []

"""Imports point downward only; heavy packages are imported where they are meant to be, and lazily."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.mirror import EXCEPTIONS, TESTED_THROUGH, has_code, without_test_file

ROOT = Path(__file__).parents[2]

#: From the lowest floor to the highest. A package imports from the floors below its own, and not from its
#: neighbours; imports inside functions and for types count.
FLOORS = (
    ("router",),
    ("migration",),
    ("pd_serve.errors",),
    ("pd_serve.comm", "pd_serve.platform", "pd_serve.setting_types"),
    ("pd_serve.simulated_engine", "pd_serve.models", "pd_serve.observe"),
    ("pd_serve.config",),
    ("pd_serve.instance", "pd_serve.scheduler", "pd_serve.frontend"),
    ("pd_serve.manager", "pd_serve.api"),
    ("pd_serve.dashboard", "pd_serve.simulation"),
    ("pd_serve.launch",),
    ("pd_serve.profiling", "pd_serve.planning"),
    ("pd_serve.cli",),
    ("deploy", "loadtests"),
)

#: Sub-packages of the two lowest floors, in the same way.
FLOORS_INSIDE = {
    "router": (
        ("router.slo", "router.fair_share", "router.rate_limits"),
        ("router.load", "router.request", "router.priority", "router.plugins"),
        ("router.freeness", "router.settings", "router.projected_loads"),
        ("router.handoff", "router.dispatch", "router.rescheduling", "router.scaling"),
        ("router.policies",),
        ("router.dispatcher",),
        ("router.scheduler", "router.waiting_line"),
    ),
    "migration": (
        ("migration.errors", "migration.bounds", "migration.tasks"),
        ("migration.messages",),
        ("migration.record", "migration.engine_rules", "migration.state_machine", "migration.transport"),
        ("migration.engine_interface", "migration.source_table", "migration.destination_table"),
        ("migration.local_instance",),
        ("migration.outgoing", "migration.incoming"),
        ("migration.coordinator", "migration.vllm_engine"),
    ),
}

PACKAGES = ("router", "migration", "pd_serve", "deploy", "loadtests")

#: Maximum length of a source file.
MAX_LINES = 350

#: What a package must not import, not even inside of a function.
FORBIDDEN = {
    "router": {"vllm", "ray", "zmq", "torch", "fastapi", "nixl"},
    "migration": {"ray", "zmq", "fastapi"},
}


Floors = tuple[tuple[str, ...], ...]


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
        module = ".".join(part for part in (base, node.module) if part)
        yield Import(file, module, on_import)
        # `from package import module` is an import of the module; of a class it adds a name that is none.
        for alias in node.names:
            yield Import(file, f"{module}.{alias.name}", on_import)
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
    for package in PACKAGES:
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
        ("d.e", True),
        ("pkg.sub", True),
        ("pkg.sub.f", True),
        ("pkg.g", True),
        ("pkg.g.h", True),
        ("only_for_types", False),
        ("instead", True),
        ("maybe", True),
        ("in_a_class", True),
        ("later", False),
    }


def floor_of(floors: Floors, module: str) -> tuple[int, str] | None:
    """The number of a module's floor and the package that it belongs to; None for a module of no floor."""
    found = [
        (number, package)
        for number, packages in enumerate(floors)
        for package in packages
        if module == package or module.startswith(f"{package}.")
    ]
    return max(found, key=lambda at: len(at[1]), default=None)


def upward(floors: Floors, imports: Iterable[Import]) -> list[str]:
    """Imports that do not point to a lower floor, or within a package."""
    found = []
    for one in imports:
        here = floor_of(floors, one.file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        there = floor_of(floors, one.module)
        if here is not None and there is not None and here[1] != there[1] and there[0] >= here[0]:
            found.append(f"{one.file} imports {one.module}")
    return found


def test_there_is_something_to_check() -> None:
    assert {package for package in PACKAGES if of(package)} >= {"pd_serve", "router", "migration"}


def test_an_upward_import_is_found() -> None:
    floors = (("a",), ("b", "c"))

    assert upward(floors, [Import("a/x.py", "b.y", on_import=False)]) == ["a/x.py imports b.y"]
    assert upward(floors, [Import("b/x.py", "c", on_import=True)]) == ["b/x.py imports c"]
    assert upward(floors, [Import("b/x.py", "a.y", on_import=True), Import("b/x.py", "b.z", True)]) == []


def test_every_module_has_a_floor() -> None:
    modules = {found.file.removesuffix(".py").replace("/", ".") for found in IMPORTS}

    assert [module for module in sorted(modules) if floor_of(FLOORS, module) is None] == []


def test_imports_point_downward() -> None:
    assert upward(FLOORS, IMPORTS) == []


@pytest.mark.parametrize("package", FLOORS_INSIDE)
def test_imports_inside_a_package_point_downward(package: str) -> None:
    assert upward(FLOORS_INSIDE[package], of(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_source_imports_tests(package: str) -> None:
    assert [found for found in of(package) if found.package == "tests"] == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_what_a_package_does_not_know(package: str) -> None:
    assert [found for found in of(package) if found.package in FORBIDDEN[package]] == []


def test_ray_is_imported_where_processes_are_started() -> None:
    files = {
        found.file for found in IMPORTS if found.package == "ray" and not found.file.startswith("deploy/")
    }

    assert files == {
        "pd_serve/manager/ray_actors.py",
        "pd_serve/manager/ray_calls.py",
        "pd_serve/manager/note_keepers.py",
        "pd_serve/manager/ray_head.py",
        "pd_serve/manager/ray_launcher.py",
        "pd_serve/manager/ray_start.py",
        "pd_serve/launch/ray_serve.py",
        "loadtests/bench/ray_llm_app.py",
    }


def test_sockets_are_made_in_the_service_only() -> None:
    files = {found.file for found in IMPORTS if found.package == "zmq"}

    assert {file for file in files if not file.startswith("pd_serve/")} == {
        "loadtests/bench/step_arms.py"  # the front end of an engine process of vLLM's
    }


def test_vllm_is_imported_on_import_by_the_adapter_and_the_front_end_only() -> None:
    """Importing vLLM costs 10 s."""
    files = {found.file for found in IMPORTS if found.package == "vllm" and found.on_import}

    places = ("migration/vllm_engine/", "pd_serve/api/")
    assert {file for file in files if not file.startswith(places)} == set()


@pytest.mark.parametrize("package", ["torch", "ray", "nixl", "transformers"])
def test_the_core_of_the_migration_imports_nothing_heavy(package: str) -> None:
    """The protocol runs where nothing but its own code is: in simulations, in tests."""
    files = {found.file for found in of("migration") if found.package == package and found.on_import}

    assert {file for file in files if not file.startswith("migration/vllm_engine/")} == set()


@pytest.mark.parametrize(
    "module",
    [
        "pd_serve.cli.main",
        "pd_serve.launch.serve",
        "pd_serve.instance.llumlet",
        "pd_serve.comm.wire",
        "pd_serve.instance.instance_process",
        "pd_serve.simulated_engine.vllm_format",
        "pd_serve.scheduler.scheduler_process",
        "migration.coordinator",
    ],
)
def test_importing_it_imports_nothing_that_takes_seconds(module: str) -> None:
    """Whatever they import in turn: `pd-serve --help` and a starting actor do not wait for vLLM."""
    code = f"import sys, {module}; print(*sorted({{'vllm', 'ray', 'torch'}} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


def test_no_file_is_long() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
    }
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_a_class_name_exists_once() -> None:
    """A reader looks for a class by its name."""
    places: dict[str, list[str]] = defaultdict(list)
    for top in ("router", "migration", "pd_serve", "loadtests", "deploy"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(path.relative_to(ROOT).as_posix())

    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize(
    ("body", "code"), [("...", False), ("'''Says what.'''", False), ("'''Says what.'''\n    return 1", True)]
)
def test_a_function_counts_as_code_if_it_has_more_than_a_docstring(body: str, code: bool) -> None:
    assert has_code(f"class K:\n  def f(self):\n    {body}\n") is code


def test_every_module_with_code_has_a_test_file_of_its_name() -> None:
    assert sorted(without_test_file() - EXCEPTIONS) == []


def test_no_exception_is_left_that_is_not_needed() -> None:
    assert sorted(EXCEPTIONS - without_test_file()) == []


def test_the_files_that_test_other_modules_exist() -> None:
    assert [file for file in TESTED_THROUGH if not (ROOT / file).exists()] == []

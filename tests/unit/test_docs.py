"""What docs/ says about the code is what the code says."""

import ast
import importlib.util
import io
import json
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from docs import metric_list, module_list
from migration.errors import RefusalCode
from tests.unit.test_architecture import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def _state_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("state_tables", ROOT / "docs" / "state_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_state_tables_and_bounds_are_those_of_the_code() -> None:
    state_tables = _state_tables()
    page = state_tables.PAGE.read_text(encoding="utf-8")

    assert state_tables.updated(page) == page, "run: python docs/state_tables.py"


def test_metrics_are_those_of_the_code() -> None:
    page = metric_list.PAGE.read_text(encoding="utf-8")

    assert metric_list.updated(page) == page, "run: python -m docs.metric_list"


def test_a_page_without_a_marker_is_not_written() -> None:
    with pytest.raises(ValueError, match="no markers for 'source diagram'"):
        _state_tables().updated("nothing")


def test_the_list_of_modules_is_that_of_the_code() -> None:
    page = module_list.PAGE.read_text(encoding="utf-8")

    assert module_list.updated(page) == page, "run: python -m docs.module_list"
    assert module_list.UNDESCRIBED not in page, "describe the new package in docs/architecture.md"


def test_the_floors_drawn_are_those_that_are_held() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.search(r"## Packages.*?```\n(.*?)```", page, re.DOTALL)
    assert drawn is not None
    floors = [set(line.split("  ")[0].split(", ")) for line in drawn[1].splitlines()]

    assert floors[::-1] == [{name.removeprefix("pd_serve.") for name in floor} for floor in FLOORS]


def test_a_new_package_gets_a_row_and_a_gone_one_loses_it() -> None:
    table = "| `gone/` | what it was | `old` |\n| `router/scaling/` | how many there are | |\n"
    page = module_list.updated(f"a\n{module_list.BEGIN}{table}{module_list.END}b\n")

    assert "`gone/`" not in page
    assert "| `router/scaling/` | how many there are | `" in page
    assert f"| `pd_serve/comm/` | {module_list.UNDESCRIBED} | `" in page


def test_the_readme_compares_by_the_results() -> None:
    results = json.loads((ROOT / "results" / "bench-compare.json").read_text(encoding="utf-8"))
    ratios = results["sizes"]["3"]["arms"]["ours"]["ratio_to_round_robin"]
    columns = (
        "ttft_p50_ms",
        "ttft_p99_ms",
        "itl_p99_ms",
        "tpot_p50_ms",
        "tpot_p99_ms",
        "output_tokens_per_s",
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (steady|full) load, [^|]+\| (.+) \|$", readme, re.MULTILINE)

    assert {load: cells.split(" | ") for load, cells in shown} == {
        load: [f"{ratios[load][column]:.2f}" for column in columns] for load in ("steady", "full")
    }


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    dead = []
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{name}#{anchor}")

    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_exist(page: Path) -> None:
    """Paths in backquotes, as `migration/outgoing.py`, and folders, as `router/`."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(r"`((?:pd_serve|migration|router|deploy|loadtests|tests|docs)/[\w/.]*)`", text)

    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_code_of_a_refusal_is_explained() -> None:
    page = (ROOT / "docs" / "api-errors.md").read_text(encoding="utf-8")
    table = page.partition("| `reason` of a refused migration |")[2].partition("\n\n")[0]

    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == sorted(RefusalCode)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_that_are_named_are_in_the_makefile(page: Path) -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))

    assert named <= verbs


#: Folders and files at the root whose docstrings, comments and texts are read for citations.
SOURCES = ("pd_serve", "migration", "router", "deploy", "loadtests", "tests", "docs")
SUFFIXES = (
    ".py",
    ".md",
    ".sh",
    ".toml",
    ".yaml",
    ".yml",
    ".lock",
    ".js",
    ".html",
    ".j2",
    ".svg",
    ".csv",
    ".json",
)

#: Documents that were never in the repository.
OUTSIDE = re.compile(r"\b(?:DESIGN|FACTS|HOUSE|DEFECTS)\b|\.\./shared\b")
PATH = re.compile(
    r"(?<![\w/.:@${}-])(?:\.\.?/)*[\w.-]+(?:/[\w.-]+)+(?:" + "|".join(SUFFIXES).replace(".", r"\.") + r")\b"
)
DOCUMENT = re.compile(r"(?<![\w/.-])[\w-]+\.md\b")

#: Written when something runs, and not kept.
GENERATED = {"results/loadtest/report.html", "results/gpu-check.json"}


@cache
def repository_files() -> tuple[str, ...]:
    """Paths relative to the root."""
    paths = [path for folder in (*SOURCES, "results") for path in (ROOT / folder).rglob("*")]
    return tuple(path.relative_to(ROOT).as_posix() for path in (*paths, *ROOT.glob("*.*")) if path.is_file())


def is_there(cited: str, page: Path) -> bool:
    """In the repository, also as the end of a path there, or in the source of an installed library."""
    if cited in GENERATED or (ROOT / cited).exists() or (page.parent / cited).exists():
        return True
    if any(f"/{file}".endswith(f"/{cited}") for file in repository_files()):
        return True
    package = cited.split("/")[0]
    library = importlib.util.find_spec(package) if package.isidentifier() and package not in SOURCES else None
    places = library.submodule_search_locations if library is not None else None
    return any((Path(place).parent / cited).exists() for place in places or ())


def absent(text: str, page: Path) -> list[str]:
    """Files and documents that `text`, which stands in `page`, cites, and that are not in the repository."""
    text = re.sub(r"https?://\S+", "", text)
    paths = [path for path in PATH.findall(text) if not is_there(path, page)]
    documents = [name for name in DOCUMENT.findall(text) if not is_there(name, page)]
    return [*OUTSIDE.findall(text), *paths, *documents]


def texts(page: Path) -> Iterator[str]:
    """Docstrings and comments of a module; anything else whole."""
    content = page.read_text(encoding="utf-8")
    if page.suffix != ".py":
        yield content
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("See DESIGN section 4.", ["DESIGN"]),
        ("Source: FACTS of this project, section 2.", ["FACTS"]),
        ("is `../shared/traces` beside the project", ["../shared"]),
        ("moved to router/book.py", ["router/book.py"]),
        ("see [operations](docs/operations.md#security)", ["docs/operations.md"]),
        ("described in operations.md", ["operations.md"]),
        ("as in vllm/v1/core/not_there.py", ["vllm/v1/core/not_there.py"]),
        ("router/load.py, `vllm_engine/adapter.py` and README.md", []),
        ("vllm/v1/core/sched/scheduler.py", []),
        ("https://example.org/docs/design.md", []),
        ("designed for facts in a house", []),
    ],
)
def test_what_is_caught_as_a_citation_of_a_file_that_is_not_there(text: str, caught: list[str]) -> None:
    assert absent(text, ROOT / "README.md") == caught


@pytest.mark.parametrize("folder", [".", *SOURCES])
def test_nothing_cites_a_file_that_is_not_in_the_repository(folder: str) -> None:
    found = (
        (ROOT / folder).rglob("*")
        if folder != "."
        else [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    )
    pages = [page for page in found if page.suffix in (".py", ".md", ".sh", ".toml", ".yaml", ".yml", "")]
    cited = {
        (page.relative_to(ROOT).as_posix(), name)
        for page in sorted(pages)
        if page.is_file() and page != Path(__file__)
        for text in texts(page)
        for name in absent(text, page)
    }

    assert cited == set()

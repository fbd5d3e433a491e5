"""What docs/ says about the code is what the code says."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from docs import metric_list

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_exist(page: Path) -> None:
    """Paths in backquotes, as `migration/outgoing.py`, and folders, as `router/`."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(r"`((?:pd_serve|migration|router|deploy|loadtests|tests|docs)/[\w/.]*)`", text)

    assert [path for path in named if not (ROOT / path).exists()] == []

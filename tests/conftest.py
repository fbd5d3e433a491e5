"""Hypothesis profiles; the order of tests; and a unit test fails if a task outlives it."""

import asyncio
import logging
import os
from asyncio import runners
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import tests.environment  # noqa: F401  before anything changes the environment

UNIT_TESTS = Path(__file__).parent / "unit"
E2E_TESTS = Path(__file__).parent / "e2e"

settings.register_profile(
    "random", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
#: The suite gives the same answer for the same code; searching is for HYPOTHESIS_PROFILE=random or thorough.
settings.register_profile("repeatable", settings.get_profile("random"), derandomize=True, database=None)
settings.register_profile("thorough", settings.get_profile("random"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the tests.

    In one process, tests of the shared cluster come last, so that the special clusters are gone by then. Two
    processes (`make test`) take files in order: one begins with all files of the shared cluster, the other
    with those that need no cluster, then both take the files that have a cluster of their own.
    """
    is_e2e = {item: E2E_TESTS in item.path.parents for item in items}
    for item in items:
        if is_e2e[item]:
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: (is_e2e[item], _shares_cluster(item.path)))
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        items.sort(key=lambda item: not _shares_cluster(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all files of the shared cluster. Groups of pytest-xdist 3.8 fail with pytest 9.2."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "shared cluster" if _shares_cluster(config.rootpath / file) else file

    return Scheduling(config, log)


@cache
def _shares_cluster(file: Path) -> bool:
    return E2E_TESTS in file.parents and "def server(cluster: ServerProcess)" in file.read_text()


_left_behind: list[str] = []
_cancel_all_tasks = runners._cancel_all_tasks


def _note_and_cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        # The loop itself makes a task of this kind for every generator that is collected unfinished.
        if type(task.get_coro()).__name__ != "async_generator_athrow":
            _left_behind.append(repr(task))
    _cancel_all_tasks(loop)


# What a closing loop has to cancel is what nobody has ended, whichever fixture or runner made the loop.
runners._cancel_all_tasks = _note_and_cancel_all_tasks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[Any]:
    try:
        result = yield
        if UNIT_TESTS in item.path.parents:
            assert not _left_behind, "tasks outlive the test:\n" + "\n".join(_left_behind)
    finally:
        _left_behind.clear()
    return result


@pytest.fixture(autouse=True)
def _our_loggers_speak() -> None:
    """Whatever a library's log configuration did in an earlier test of the same process."""
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] in ("pd_serve", "migration", "router"):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)

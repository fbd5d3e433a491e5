"""Hypothesis profiles; the order of tests; and a unit test fails if a task outlives it."""

import asyncio
import logging
import os
from asyncio import runners
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import tests.environment  # noqa: F401  before anything changes the environment
from tests.shared_servers import E2E_TESTS, group, order

UNIT_TESTS = Path(__file__).parent / "unit"

settings.register_profile(
    "random", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
#: The suite gives the same answer for the same code; searching is for HYPOTHESIS_PROFILE=random or thorough.
settings.register_profile("repeatable", settings.get_profile("random"), derandomize=True, database=None)
settings.register_profile("thorough", settings.get_profile("random"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the tests: end-to-end tests last, and files that share a server together.

    Three processes (`make test`) take files in order: one begins with all files that need plain vLLM, which
    take most of its time, the others with those that need no server.
    """
    is_e2e = {item: E2E_TESTS in item.path.parents for item in items}
    for item in items:
        if is_e2e[item]:
            item.add_marker(pytest.mark.e2e)
    last = {item: item.get_closest_marker("changes_instances") is not None for item in items}
    items.sort(key=lambda item: (is_e2e[item], order(item.path), last[item]))
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        items.sort(key=lambda item: group(item.path) != "reference")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all files that share a server. Groups of pytest-xdist 3.8 fail with pytest 9.2."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return group(config.rootpath / file) or file

    return Scheduling(config, log)


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

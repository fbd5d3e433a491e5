"""Processes that faults affect."""

import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from loadtests.chaos.schedule import Target
from loadtests.chaos.targets import SERVE_RATES, candidates, choose, rates_of
from loadtests.processes import ProcessKind, ServiceProcesses
from loadtests.started_service import ClusterShape, StartedService
from tests.unit.loadtests.chaos.made_run import cluster, instance


class KnownProcesses(ServiceProcesses):
    """All processes are of one kind."""

    def of_kind(self, kind: ProcessKind) -> list[psutil.Process]:
        return self.alive() if kind is ProcessKind.INSTANCE else []


@pytest.fixture
def service() -> Iterator[StartedService]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    shape = ClusterShape({"decode": 1})
    yield StartedService("http://localhost", "", shape, KnownProcesses(process.pid), process.pid)
    process.kill()
    process.wait()


def test_the_manager_of_pd_serve_serve_and_its_raylet_are_never_killed() -> None:
    """Everything ends with them."""
    assert not {Target.MANAGER, Target.RAYLET} & set(SERVE_RATES.kill)


def test_processes_that_a_cluster_does_not_have_are_not_drawn() -> None:
    rates = rates_of(ClusterShape({"neutral": 3}))

    assert set(rates.kill) == {Target.NEUTRAL, Target.SCHEDULER, Target.API_SERVER}
    assert not {Target.PREFILL, Target.DECODE} & set(rates.freeze)


def test_the_numbers_are_those_of_the_cluster() -> None:
    numbers = rates_of(ClusterShape({"prefill": 1, "decode": 3}, api_servers=2)).numbers

    assert (numbers[Target.PREFILL], numbers[Target.DECODE], numbers[Target.API_SERVER]) == (1, 3, 2)
    assert Target.SCHEDULER not in numbers


def test_an_instance_is_chosen_by_its_role(service: StartedService) -> None:
    state = cluster(instance("prefill", pid=1), instance("decode", pid=service.head))

    ((name, process),) = candidates(service, Target.DECODE, state)

    assert (name, process.pid) == ("decode-0", service.head)
    assert candidates(service, Target.PREFILL, state) == []  # process 1 is not one of the service's
    assert candidates(service, Target.SCHEDULER, state) == []


def test_a_starting_instance_and_a_taken_process_are_not_chosen(service: StartedService) -> None:
    dice = random.Random(0)
    starting = cluster(instance("decode", pid=service.head, state="starting"))
    ready = cluster(instance("decode", pid=service.head))

    assert choose(service, Target.DECODE, starting, dice, set()) is None
    assert choose(service, Target.DECODE, ready, dice, {service.head}) is None
    assert choose(service, Target.DECODE, ready, dice, set()) is not None
    assert choose(service, Target.DECODE, {}, dice, set()) is None


def test_an_ended_process_is_not_chosen(service: StartedService) -> None:
    ready = cluster(instance("decode", pid=service.head))
    (_, process), *_ = candidates(service, Target.DECODE, ready)
    service.processes.send(process, signal.SIGKILL)
    while psutil.Process(service.head).status() != psutil.STATUS_ZOMBIE:
        pass

    assert candidates(service, Target.DECODE, ready) == []

"""The load of the simulator benchmark and its compared numbers."""

import pytest

from loadtests.bench import simulator
from loadtests.servers import SharedSettings, script
from pd_serve.simulated_engine.cost_model import LinearCostModel

MODEL = LinearCostModel((3.0, 0.02, 1e-5), (2.0, 0.1, 0.0))


def test_the_moderate_rate_is_slower_on_a_slower_machine() -> None:
    slow = LinearCostModel((6.0, 0.04, 2e-5), (4.0, 0.2, 0.0))

    assert simulator.moderate_rate(MODEL) == pytest.approx(2 * simulator.moderate_rate(slow), rel=0.1)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (8, 2), (64, 16)])
def test_engines_leave_cores_to_the_api_server_and_the_clients(cores: int, expected: int) -> None:
    assert simulator.num_threads(cores) == expected


def test_the_service_is_started_with_its_own_defaults_and_one_api_server() -> None:
    command = SharedSettings("tiny", [], {}).ours({"prefill": 1, "decode": 1}, 1234).command

    address = ["--served-model-name=tiny", "--host=127.0.0.1", "--port=1234"]
    roles = ["--prefill=1", "--decode=1"]
    assert command == [script("pd-serve"), "serve", "tiny", *roles, "--api-servers=1", *address]

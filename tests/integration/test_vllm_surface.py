"""vLLM has what `pd_serve.api.engine_client` and `pd_serve.api.core` rely on."""

import dis
import os

import pytest

# Before vLLM is imported: no plugins, no start-up messages.
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.request import Request

from pd_serve.api.engine_client import ClusterAsyncLLM

pytestmark = pytest.mark.integration

USED = {
    AsyncLLM: (
        *("generate", "add_request", "_add_request", "abort", "check_health"),
        *("_run_output_handler", "errored"),
    ),
    OutputProcessor: ("has_request", "abort_requests", "add_request", "process_outputs"),
    StatLoggerManager: ("record", "log", "log_engine_initialized"),
}

SET_ONLY_WHEN_PROFILING = {"_frontend_profiler_worker_name"}


def attributes_set_by(owner: type) -> set[str]:
    """Names of the attributes that the constructor's own code assigns, read from its byte code."""
    code = owner.__init__.__code__  # type: ignore[misc]
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in USED.items() for name in names]
)
def test_vllm_has_the_methods_that_the_engine_client_uses(owner: type, name: str) -> None:
    assert hasattr(owner, name)


def test_the_output_processor_has_the_attributes_that_the_engine_client_reads() -> None:
    assert {"request_states", "external_req_ids"} <= attributes_set_by(OutputProcessor)


def test_the_engine_client_sets_every_attribute_that_vllms_constructor_sets() -> None:
    missing = attributes_set_by(AsyncLLM) - attributes_set_by(ClusterAsyncLLM)

    assert missing - SET_ONLY_WHEN_PROFILING == set()


def test_vllms_queue_is_in_the_order_of_the_arrivals_that_it_is_given() -> None:
    """By which a deadline goes before requests that have arrived earlier."""
    queue = create_request_queue(SchedulingPolicy.PRIORITY)
    for name, priority, arrival_time in (
        ("late", 0, 30.0),
        ("early", 0, 20.0),
        ("due", 0, 12.5),
        ("low", 1, 0.0),
    ):
        parameters = SamplingParams(max_tokens=1)
        queue.add_request(Request(name, [1], parameters, None, arrival_time=arrival_time, priority=priority))

    assert [queue.pop_request().request_id for _ in range(4)] == ["due", "early", "late", "low"]

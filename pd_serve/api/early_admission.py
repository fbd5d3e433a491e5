"""Admits the requests of `/v1/responses` before their streams begin.

vLLM sends the first events of such a stream, and with them the status 200, before it submits the request to
the engine client. A refusal by the cluster could only break the stream off then.

Source: vllm/entrypoints/openai/responses/serving.py (`responses_stream_generator`).
"""

from typing import Any

from starlette.datastructures import State

from pd_serve.api.engine_client import ClusterAsyncLLM
from pd_serve.api.overload import note_admitted


def admit_early(state: State, client: ClusterAsyncLLM) -> None:
    """Has the first request of each response admitted when vLLM makes its generator, within the handler.

    Args:
        state: Of the application, after vLLM's `init_app_state`.
    """
    if (serving := getattr(state, "openai_serving_responses", None)) is None:
        return
    generate = serving._generate_with_builtin_tools

    def admit_and_generate(*, request_id: str, engine_input: Any, sampling_params: Any, **named: Any) -> Any:
        first = f"{request_id}_0"
        client.admit(engine_input, sampling_params, first, named.get("priority", 0))
        note_admitted(first)
        return generate(
            request_id=request_id, engine_input=engine_input, sampling_params=sampling_params, **named
        )

    serving._generate_with_builtin_tools = admit_and_generate

"""The parts of an engine's outputs that API servers read, the same for every engine."""

from typing import Protocol

from migration.messages import RequestId


class RequestOutput(Protocol):
    """New tokens of one request; vLLM's `EngineCoreOutput`, or a simulated engine's.

    Attributes:
        new_logprobs: One row per token, or None.
        finish_reason: None until the request ends; `str` of it is the reason.
        stop_reason: With "error", a text if the request cannot be served by any engine: why.
    """

    request_id: RequestId
    new_token_ids: list[int]
    new_logprobs: object
    finish_reason: object
    stop_reason: object


class OutputBatch(Protocol):
    """One step's outputs for one API server; vLLM's `EngineCoreOutputs`, or a simulated engine's.

    Attributes:
        scheduler_stats: vLLM's scheduler statistics, or None.
        engine_index: Slot number of the engine, set by the API server.
    """

    outputs: list[RequestOutput]
    scheduler_stats: object
    engine_index: int

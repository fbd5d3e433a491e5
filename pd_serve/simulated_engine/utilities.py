"""Control methods of a simulated engine that vLLM's front end calls by name."""

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.block_pool import BlockPool

#: Answers to calls that do nothing.
ANSWERS: dict[str, object] = {
    "get_supported_tasks": ("generate",),
    "get_weight_version": "default",
    "reset_mm_cache": None,
    "reset_encoder_cache": None,
    "is_sleeping": False,
    "is_scheduler_paused": False,
}


def call_utility(pool: BlockPool, method: str) -> object:
    """Raises: InvalidRequestError: there is no such method."""
    if method == "reset_prefix_cache":
        return pool.empty_cache()
    if method not in ANSWERS:
        raise InvalidRequestError(f"{method} is not a utility of a simulated engine")
    return ANSWERS[method]

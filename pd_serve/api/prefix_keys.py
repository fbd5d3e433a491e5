"""Keys of a request's prompt, as the instances' prefix caches have them.

vLLM's own functions compute the hashes, from the request as it is sent to an instance: adapters, images and
cache salts are in them.
"""

from collections.abc import Callable

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import BlockHash, get_request_block_hasher
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from migration.cached_keys import KeyFormat, key_of
from pd_serve.simulated_engine.cached_keys import ALGORITHM as SIMULATED
from pd_serve.simulated_engine.cached_keys import prompt_keys
from pd_serve.simulated_engine.contents import TokenPrompt

#: Makes the keys of a request.
MakeKeys = Callable[[EngineCoreRequest], tuple[int, ...]]


class PrefixKeys:
    """Makes keys of the format that the instances have."""

    def __init__(self) -> None:
        self._format: KeyFormat | None = None
        self._make: MakeKeys = lambda request: ()

    def of(self, request: EngineCoreRequest, key_format: KeyFormat | None) -> tuple[int, ...]:
        """The keys of the full blocks of a request's prompt; none without a format."""
        if key_format != self._format:
            self._format = key_format
            self._make = _maker(key_format) if key_format is not None else lambda request: ()
        return self._make(request)


def _maker(key_format: KeyFormat) -> MakeKeys:
    if key_format.algorithm == SIMULATED:

        def simulated(request: EngineCoreRequest) -> tuple[int, ...]:
            return tuple(prompt_keys(TokenPrompt(request.prompt_token_ids or ()), key_format.key_tokens))

        return simulated
    # No engine runs in this process: vLLM's module has no value yet, or that of former instances.
    kv_cache_utils.NONE_HASH = BlockHash(bytes.fromhex(key_format.root))
    hasher = get_request_block_hasher(key_format.hash_tokens, get_hash_fn_by_name(key_format.algorithm))
    every = key_format.key_tokens // key_format.hash_tokens

    def make(request: EngineCoreRequest) -> tuple[int, ...]:
        if request.sampling_params is None:
            return ()
        known = Request.from_engine_core_request(request, None)
        if known.skip_reading_prefix_cache:
            return ()
        return tuple(map(key_of, hasher(known)[every - 1 :: every]))

    return make

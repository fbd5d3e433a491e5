"""The engines' ids of requests, from which an instance sees that a request has been sent again."""

import hashlib
from typing import Any
from uuid import uuid4

import msgspec
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from migration.vllm_engine.compatibility import has_only_tokens
from pd_serve.api.identity import MAX_ID_CHARS, client_id, credentials
from pd_serve.errors import InvalidRequestError


def check_id(request_id: str) -> None:
    """Raises: InvalidRequestError: A client has given a longer id in the body."""
    if len(request_id) > MAX_ID_CHARS:
        raise InvalidRequestError(
            f"request_id has {len(request_id)} characters, and may have {MAX_ID_CHARS}."
        )


class StemInputProcessor(InputProcessor):
    """Makes ids NAME.DIGEST-RANDOM. All but the end is the stem; see `migration.messages.stem_of`.

    NAME is vLLM's id of the request, which has the client's `X-Request-Id` in it. Two requests have the same
    stem only if name, prompt, parameters and credentials are the same. A request that another API server
    could not continue, or that has no id of its client, has no digest and thus no stem.
    """

    @staticmethod
    def assign_request_id(request: EngineCoreRequest) -> None:
        """Raises: InvalidRequestError: see `check_id`. Source: vllm/v1/engine/input_processor.py"""
        check_id(request.request_id)
        InputProcessor.assign_request_id(request)
        digest = _digest(request) if client_id() and _can_be_continued(request) else ""
        request.request_id = f"{request.external_req_id}.{digest}-{uuid4().hex[:8]}"


def _can_be_continued(request: EngineCoreRequest) -> bool:
    return (
        has_only_tokens(request.sampling_params)
        and request.prompt_token_ids is not None
        and not request.mm_features
        and request.prompt_embeds is None
        and not request.resumable
    )


def _digest(request: EngineCoreRequest) -> str:
    """Equal for equal requests; "" if the parameters have something that cannot be compared."""
    adapter = request.lora_request
    model = None if adapter is None else (adapter.lora_name, adapter.lora_path)
    prompt: list[Any] = [model, request.prompt_token_ids, request.cache_salt, request.priority]
    parts = [credentials(), *prompt, request.sampling_params]
    try:
        plain = msgspec.to_builtins(parts, str_keys=True, enc_hook=repr)  # `logit_bias` has integers as keys
        encoded = msgspec.json.encode(plain, order="deterministic")
    except (TypeError, ValueError):
        return ""
    return hashlib.sha256(encoded).hexdigest()[:24]

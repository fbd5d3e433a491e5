"""Engines of several kinds, each with its arguments and with requests that only such an engine serves.

All of them have the weights of the tiny model, so that greedy output is varied and depends on all tokens.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import ReasoningConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from pd_serve.models import resolve
from pd_serve.models.lora import adapters
from pd_serve.models.tiny import TINY
from tests.integration.engine_rig import greedy, seeded

#: Token ids of the tiny model's tokenizer.
TOOL, END = 262, 263

PROMPT = [(7 * i) % 200 + 20 for i in range(300)]  # computed in two chunks
REPEATING = (PROMPT[:20] * 15)[:300]  # a draft is found in it


@dataclass(frozen=True)
class Variant:
    """Attributes:
    arguments: Of vLLM's `AsyncEngineArgs`.
    params: Of the request, from its number of tokens.
    fields: Of `EngineCoreRequest`.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    params: Callable[[int], SamplingParams] = greedy
    prompt: list[int] | None = field(default_factory=lambda: PROMPT)
    fields: dict[str, Any] = field(default_factory=dict)


def sliding_window(directory: Path) -> Variant:
    """A Mistral, whose attention has a window of 64 tokens."""
    changes = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 64,
    }
    return Variant({"model": _with_configuration(directory, changes)})


def ngram(directory: Path) -> Variant:
    config = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    return Variant({"speculative_config": config}, prompt=REPEATING)


def lora(directory: Path) -> Variant:
    adapter = LoRARequest("adapter", 7, adapters(1)[0])
    return Variant(LORA_ARGUMENTS, seeded, fields={"lora_request": adapter})


LORA_ARGUMENTS = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}


def prompt_embeddings(directory: Path) -> Variant:
    """A prompt without token ids."""
    embeds = 0.5 * torch.randn(300, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    return Variant({"enable_prompt_embeds": True}, prompt=None, fields={"prompt_embeds": embeds})


def some_embeddings(directory: Path) -> Variant:
    """A prompt of tokens and embeddings."""
    whole = prompt_embeddings(directory)
    are_tokens = [i < 100 for i in range(300)]
    return Variant(whole.arguments, prompt=PROMPT, fields=whole.fields | {"prompt_is_token_ids": are_tokens})


def thinking_budget(directory: Path) -> Variant:
    """A prompt that begins to think, for 30 tokens."""
    config = ReasoningConfig(reasoning_start_str="<|tool|>", reasoning_end_str="<|end|>")
    return Variant(
        {"reasoning_config": config}, lambda n: greedy(n, thinking_token_budget=30), prompt=[*PROMPT, TOOL]
    )


def structured(directory: Path) -> Variant:
    return Variant({}, lambda n: seeded(n, structured_outputs=following(regex=r"([0-9]{3}-[a-z]{2};)*")))


def following(backend: str = "xgrammar", **constraint: Any) -> StructuredOutputsParams:
    """A constraint, and the backend that vLLM's front end has chosen for it."""
    parameters = StructuredOutputsParams(**constraint)
    parameters._backend = backend
    return parameters


def logprobs(directory: Path) -> Variant:
    return Variant({}, lambda n: seeded(n, logprobs=2, prompt_logprobs=1, presence_penalty=0.7))


VARIANTS = {
    of.__name__: of
    for of in (
        sliding_window,
        ngram,
        lora,
        prompt_embeddings,
        some_embeddings,
        thinking_budget,
        structured,
        logprobs,
    )
}


def _with_configuration(directory: Path, changes: dict[str, Any]) -> str:
    """The tiny model's directory, with another configuration."""
    model = Path(resolve("tiny"))
    for file in model.iterdir():
        if file.name != "config.json":
            os.symlink(file, directory / file.name)
    config = json.loads((model / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)

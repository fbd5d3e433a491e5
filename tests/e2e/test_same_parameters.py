"""Everything that steers sampling goes on as if the request had never moved."""

import json
import random

import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.conftest import Reference
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_same_output import assert_same

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{5,20}$"},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 9},
        "kind": {"enum": ["prefill", "decode", "neutral"]},
        "why": {"type": "string", "maxLength": 60},
    },
    "required": ["name", "sizes", "kind", "why"],
    "additionalProperties": False,
}

#: Left alone, the tiny model fills JSON with white space until its tokens run out.
NO_SPACE = {"10": -100, "32": -100}

PARAMETERS: dict[str, Body] = {
    "seeded": {"temperature": 1, "seed": 11},
    "seeded, cut": {"temperature": 0.9, "seed": 12, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    "frequency penalty": {"frequency_penalty": 0.7},
    "presence penalty": {"presence_penalty": 1.1},
    "repetition penalty": {"repetition_penalty": 1.3},
    "penalties, seeded": {"temperature": 1, "seed": 13, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    "min tokens": {"min_tokens": 90, "stop_token_ids": [0x20, ord("e")]},
    "logit bias": {"logit_bias": {"32": -100, "101": -3.5, "122": 4.0}},
    "bad words": {"bad_words": ["e", "ub"]},
    "logprobs": {"logprobs": 5},
    "logprobs, seeded": {"logprobs": 3, "temperature": 1, "seed": 14},
    "prompt logprobs": {"prompt_logprobs": 2, "logprobs": 1},
    "echo": {"echo": True, "logprobs": 2},
    "n = 2": {"n": 2, "temperature": 1, "seed": 15},
    "JSON schema": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 300, "logit_bias": NO_SPACE},
    "JSON schema, seeded": {
        "structured_outputs": {"json": SCHEMA},
        "temperature": 1,
        "seed": 16,
        "max_tokens": 300,
    },
    "regex": {"structured_outputs": {"regex": "([a-f]{3,9}-){12}[0-9]{10,20}"}},
    "choice": {"structured_outputs": {"choice": ["a" * 40 + "b" * 40, "a" * 40 + "c" * 40 + "d"]}},
}


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


@pytest.mark.parametrize("name", PARAMETERS)
async def test_sampling_parameters_survive_migrations(
    client: CompletionClient, reference: Reference, name: str
) -> None:
    body = {"prompt": token_ids(100), "max_tokens": 120, **PARAMETERS[name]}
    expected = await reference(body)
    ask = client.answer if "prompt_logprobs" in body else client.stream  # vLLM does not stream those
    answer = await ask(body, client.wander(random.Random(name)))
    assert_same(answer, expected)
    if body.get("n", 1) == 1:
        assert sum(move.done for move in answer.moves) >= 2
    if "prompt_logprobs" in body:
        assert len(answer.only.prompt_logprobs or ()) == 100
    if "JSON" in name:
        assert json.loads(answer.only.text).keys() == SCHEMA["properties"].keys()

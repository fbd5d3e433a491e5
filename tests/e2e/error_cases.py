"""Requests that a server has to judge before it computes anything: wrong, unusual, or not supported."""

from dataclasses import dataclass
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"

HELLO = [{"role": "user", "content": "hello"}]
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x"}}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One request.

    Attributes:
        body: Sent as JSON; bytes are sent as they are, None is no body.
    """

    path: str
    body: Any = None
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()

    async def ask(self, http: httpx.AsyncClient) -> httpx.Response:
        headers = dict(self.headers)
        if isinstance(self.body, bytes):
            headers = {"Content-Type": "application/json", **headers}
            return await http.request(self.method, self.path, content=self.body, headers=headers)
        if self.body is None:
            return await http.request(self.method, self.path, headers=headers)
        return await http.request(self.method, self.path, json=self.body, headers=headers)


def completion(**fields: Any) -> Scenario:
    return Scenario(COMPLETIONS, {"model": "tiny", "prompt": "x", "max_tokens": 2} | fields)


def chat(**fields: Any) -> Scenario:
    return Scenario(CHAT, {"model": "tiny", "messages": HELLO, "max_tokens": 2} | fields)


def response(**fields: Any) -> Scenario:
    return Scenario(RESPONSES, {"model": "tiny", "input": "x", "max_output_tokens": 16} | fields)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

ERROR_CASES: dict[str, Scenario] = {
    # What is asked for is not there.
    "completions: unknown model": completion(model="other"),
    "chat: unknown model": chat(model="other"),
    "responses: unknown model": response(model="other"),
    "tokenize: unknown model": Scenario("/tokenize", {"model": "other", "prompt": "x"}),
    "models: unknown model": Scenario("/v1/models/other", method="GET"),
    "responses: unknown id": Scenario("/v1/responses/resp_x", method="GET"),
    "responses: cancel unknown id": Scenario("/v1/responses/resp_x/cancel"),
    "unknown route": Scenario("/v1/nothing", method="GET"),
    "unknown route, POST": Scenario("/v1/nothing", {}),
    "root": Scenario("/", method="GET"),
    "path with a slash at the end": Scenario("/v1/completions/", {"model": "tiny", "prompt": "x"}),
    "completions: GET": Scenario(COMPLETIONS, method="GET"),
    "chat: PUT": Scenario(CHAT, {}, method="PUT"),
    "models: POST": Scenario("/v1/models", {}),
    "health: POST": Scenario("/health"),
    "embeddings of a model that has none": Scenario("/v1/embeddings", {"model": "tiny", "input": "x"}),
    "score of a model that has none": Scenario("/score", {"model": "tiny", "text_1": "x", "text_2": "y"}),
    "LoRA is off": Scenario("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}),
    "sleep is for developers": Scenario("/sleep"),
    # What cannot be read.
    "malformed JSON": Scenario(COMPLETIONS, b'{"model": "tiny", '),
    "no JSON at all": Scenario(COMPLETIONS, b"hello"),
    "not UTF-8": Scenario(COMPLETIONS, b'{"model": "\xff"}'),
    "empty body": Scenario(COMPLETIONS, b""),
    "a list": Scenario(COMPLETIONS, [1, 2]),
    "null": Scenario(CHAT, b"null"),
    "a form": Scenario(
        COMPLETIONS, b"model=tiny", headers=(("Content-Type", "application/x-www-form-urlencoded"),)
    ),
    "text": Scenario(CHAT, b"{}", headers=(("Content-Type", "text/plain"),)),
    # Fields that are missing or of another type.
    "completions: no fields": Scenario(COMPLETIONS, {}),
    "chat: no fields": Scenario(CHAT, {}),
    "responses: no fields": Scenario(RESPONSES, {}),
    "completions: no prompt": Scenario(COMPLETIONS, {"model": "tiny"}),
    "completions: prompt null": completion(prompt=None),
    "completions: prompt empty": completion(prompt=""),
    "completions: prompt without tokens": completion(prompt=[]),
    "completions: prompt of no token": completion(prompt=[10**6]),
    "completions: prompt of negative tokens": completion(prompt=[-1]),
    "chat: no messages": chat(messages=[]),
    "chat: messages is text": chat(messages="hello"),
    "chat: unknown role": chat(messages=[{"role": "nobody", "content": "x"}]),
    "chat: message without a role": chat(messages=[{"content": "x"}]),
    "chat: a picture": chat(
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}],
            }
        ]
    ),
    "temperature is text": completion(temperature="hot"),
    "stream is text": completion(stream="maybe"),
    "stop is a number": completion(stop=3),
    "logit_bias is a list": completion(logit_bias=[1]),
    "priority is text": completion(priority="high"),
    "tokenize: no fields": Scenario("/tokenize", {}),
    "detokenize: no token": Scenario("/detokenize", {"model": "tiny", "tokens": [10**9]}),
    "detokenize: text": Scenario("/detokenize", {"model": "tiny", "tokens": "x"}),
    # Values out of range.
    "completions: n = 0": completion(n=0),
    "completions: n negative": completion(n=-1),
    "completions: n too large": completion(n=10**6),
    "chat: n = 0": chat(n=0),
    "greedy with n > 1": completion(n=2, temperature=0),
    "best_of": completion(best_of=2, n=1),
    "best_of below n": completion(best_of=1, n=2),
    "beam search without a width": completion(use_beam_search=True, n=0),
    "max_tokens = 0": completion(max_tokens=0),
    "max_tokens negative": completion(max_tokens=-1),
    "max_tokens too large": completion(max_tokens=10**6),
    "max_completion_tokens negative": chat(max_completion_tokens=-1),
    "max_output_tokens negative": response(max_output_tokens=-1),
    "min_tokens above max_tokens": completion(min_tokens=9),
    "prompt too long": completion(prompt="x" * 20_000),
    "chat: prompt too long": chat(messages=[{"role": "user", "content": "x" * 20_000}]),
    "responses: prompt too long": response(input="x" * 20_000),
    "prompt tokens too long": completion(prompt=[65] * 20_000),
    "truncation negative": completion(truncate_prompt_tokens=-5),
    "truncation too large": completion(truncate_prompt_tokens=10**6),
    "temperature negative": completion(temperature=-1),
    "temperature infinite": Scenario(
        COMPLETIONS, b'{"model": "tiny", "prompt": "x", "temperature": Infinity}'
    ),
    "temperature is no number": Scenario(
        COMPLETIONS, b'{"model": "tiny", "prompt": "x", "temperature": NaN}'
    ),
    "top_p = 0": completion(top_p=0),
    "top_p above 1": completion(top_p=1.5),
    "top_k negative": completion(top_k=-2),
    "min_p above 1": completion(min_p=2),
    "presence_penalty": completion(presence_penalty=3),
    "frequency_penalty": chat(frequency_penalty=-3),
    "repetition_penalty": completion(repetition_penalty=-1),
    "seed too large": completion(seed=2**70),
    "priority too large": completion(priority=2**70),
    "logprobs too many": completion(logprobs=1000),
    "logprobs negative": completion(logprobs=-5),
    "top_logprobs too many": chat(logprobs=True, top_logprobs=1000),
    "top_logprobs negative": chat(logprobs=True, top_logprobs=-3),
    "top_logprobs without logprobs": chat(top_logprobs=2),
    "prompt_logprobs too many": completion(prompt_logprobs=1000),
    "prompt_logprobs in a stream": completion(prompt_logprobs=1, stream=True),
    "logit_bias of no token": completion(logit_bias={"1000000": 1}),
    "logit_bias of a word": completion(logit_bias={"word": 1}),
    "logit_bias too strong": completion(logit_bias={"65": 10**6}),
    "bad_words empty": completion(bad_words=[""]),
    "stop empty": completion(stop=[""]),
    "stop_token_ids of no token": completion(stop_token_ids=["x"]),
    "allowed_token_ids empty": completion(allowed_token_ids=[]),
    "allowed_token_ids of no token": completion(allowed_token_ids=[10**6]),
    "kv_transfer_params is text": completion(kv_transfer_params="x"),
    # What does not go together, or is not supported.
    "stream_options without stream": completion(stream_options={"include_usage": True}),
    "chat: stream_options without stream": chat(stream_options={"include_usage": True}),
    "stream_options is text": completion(stream=True, stream_options="x"),
    "suffix": completion(suffix="y"),
    "echo with a stream and logprobs of a prompt": completion(echo=True, stream=True, prompt_logprobs=1),
    "prompt embeddings are off": completion(prompt=None, prompt_embeds="AAAA"),
    "response_format unknown": chat(response_format={"type": "poem"}),
    "response_format without a schema": chat(response_format={"type": "json_schema"}),
    "response_format without a schema in it": chat(response_format=NO_SCHEMA),
    "regex that is none": completion(structured_outputs={"regex": "("}),
    "grammar that is none": completion(structured_outputs={"grammar": "root ::= ("}),
    "JSON schema that is none": completion(structured_outputs={"json": {"type": "nothing"}}),
    "JSON schema that is no JSON": completion(structured_outputs={"json": "{"}),
    "two constraints": completion(structured_outputs={"regex": "a", "choice": ["a"]}),
    "no constraint": completion(structured_outputs={}),
    "choice of nothing": completion(structured_outputs={"choice": []}),
    "tool_choice auto, not enabled": chat(tools=[TOOL], tool_choice="auto"),
    "tool_choice without tools": chat(tool_choice="required"),
    "tool_choice of another tool": chat(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "other"}}
    ),
    "tool_choice unknown": chat(tools=[TOOL], tool_choice="perhaps"),
    "tools without a name": chat(tools=[{"type": "function", "function": {}}]),
    "tools empty": chat(tools=[]),
    "continue and add a prompt": chat(continue_final_message=True, add_generation_prompt=True),
    "chat template of a client": chat(chat_template="{{ x }}"),
    "thinking budget": chat(thinking_token_budget=-5),
    "responses: previous one": response(previous_response_id="resp_x"),
    "responses: previous id of another form": response(previous_response_id="x"),
    "responses: in the background": response(background=True, store=False),
    "responses: tools of another kind": response(tools=[{"type": "telepathy"}]),
    "LoRA adapter as the model": completion(model="tiny:adapter"),
    # Other APIs of vLLM.
    "messages: no fields": Scenario("/v1/messages", {}),
    "messages: unknown model": Scenario(
        "/v1/messages", {"model": "other", "max_tokens": 2, "messages": HELLO}
    ),
    "messages: too long": Scenario(
        "/v1/messages",
        {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "x" * 20_000}]},
    ),
    "messages: count unknown": Scenario("/v1/messages/count_tokens", {"model": "other", "messages": HELLO}),
    "invocations: no fields": Scenario("/invocations", {}),
    "generate: no fields": Scenario("/inference/v1/generate", {}),
    "generate: no token": Scenario(
        "/inference/v1/generate",
        {"model": "tiny", "token_ids": [10**6], "sampling_params": {"max_tokens": 1}},
    ),
    "transcription": Scenario("/v1/audio/transcriptions", {}),
}

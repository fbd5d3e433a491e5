"""The served model as a load test needs it: its name, context length and tokenizer."""

from dataclasses import dataclass
from typing import Any, Protocol

from loadtests.answer import StreamError
from loadtests.prompts import SAMPLE_TEXT, PromptMaker
from loadtests.workload import PlannedRequest


class JsonClient(Protocol):
    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of the service, with prompts for it.

    Attributes:
        name: Its name in the API.
        max_tokens: Greatest length of prompt and answer together.
    """

    name: str
    max_tokens: int
    prompts: PromptMaker

    @classmethod
    def ask(cls, client: JsonClient, name: str | None, seed: int) -> "ServedModel":
        """Reads a model's data from the service: the named model, or the first that it lists.

        Raises:
            StreamError: The service does not answer, or has no such model.
        """
        cards = client.json("/v1/models")["data"]
        card = next((card for card in cards if name in (None, card["id"])), None)
        if card is None:
            raise StreamError(f"no model {name!r}", f"there are {', '.join(card['id'] for card in cards)}")
        name = card["id"]
        text = {"model": name, "prompt": SAMPLE_TEXT, "add_special_tokens": False}
        token_ids = sorted(set(client.json("/tokenize", text)["tokens"]))
        pieces = [
            client.json("/detokenize", {"model": name, "tokens": [token_id]})["prompt"]
            for token_id in token_ids
        ]
        chat = {"model": name, "messages": [{"role": "user", "content": pieces[-1]}]}
        overhead = client.json("/tokenize", chat)["count"] - 1
        return cls(name, card["max_model_len"], PromptMaker(token_ids, pieces, overhead, seed))

    def body(self, request: PlannedRequest) -> dict[str, Any]:
        """The request body: greedy, streamed, of the planned length, with the token ids that checks need."""
        prompt: dict[str, Any] = (
            {"messages": [{"role": "user", "content": self.prompts.message(request)}]}
            if request.api == "chat"
            else {"prompt": self.prompts.token_ids(request)}
        )
        return {
            "model": self.name,
            **prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "priority": request.priority,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

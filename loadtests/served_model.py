"""What a load test has to know of the service beforehand: the model and its tokenizer."""

from dataclasses import dataclass
from typing import Any, Protocol

from loadtests.arrival_plan import PlannedRequest
from loadtests.prompt_maker import SAMPLE_TEXT, PromptMaker
from loadtests.streamed_answer import StreamError


class Client(Protocol):
    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Attributes:
    name: In the API.
    max_tokens: Longest prompt and answer together.
    """

    name: str
    max_tokens: int
    prompts: PromptMaker

    @classmethod
    def ask(cls, client: Client, name: str | None, seed: int) -> "ServedModel":
        """Asks the service for a model, by name or the first that it has.

        Raises:
            StreamError: It cannot be reached, or has no such model.
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
        """Greedy, streamed, exactly as long as planned, with the token ids that checks need."""
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

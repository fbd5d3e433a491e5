"""One streamed answer: what came and when, and whether it is a whole and well-formed stream."""

from dataclasses import dataclass, field
from typing import Any

from loadtests.arrival_plan import PlannedRequest

DONE = "[DONE]"


class StreamError(Exception):
    """A request failed, or its stream is wrong.

    Attributes:
        kind: Short, the same for all failures of a kind: what tables count by.
        detail: What was seen.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


@dataclass(slots=True)
class Answer:
    """Filled with the chunks of a stream, in order.

    Attributes:
        prompt_token_ids: As the server says.
        token_ids: All tokens so far.
        times_s: When each chunk with tokens came, on one clock.
        finish_reason: None until the stream says that it ends.
        usage: Its token counts, once sent.
        done: The last line of the stream has come.
    """

    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    done: bool = False

    def add(self, chunk: dict[str, Any], now_s: float) -> None:
        """Takes one chunk of `/v1/completions` or `/v1/chat/completions`.

        Raises:
            StreamError: It reports an error, or comes after the end.
        """
        if "error" in chunk:
            raise StreamError("the stream ended with an error", str(chunk["error"]))
        if self.done:
            raise StreamError("the stream went on after its end", str(chunk)[:200])
        self.prompt_token_ids = chunk.get("prompt_token_ids") or self.prompt_token_ids
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
            new = choice.get("token_ids") or []
            if new and self.finish_reason is not None:
                raise StreamError("tokens came after the finish reason", f"{len(new)} tokens")
            self.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self.token_ids += new
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if new:
                self.times_s.append(now_s)


def check_whole(answer: Answer) -> None:
    """Raises: StreamError: The stream stopped before its end."""
    if not answer.done:
        raise StreamError("the stream was cut off", f"after {len(answer.token_ids)} tokens")


def check_counts(answer: Answer, request: PlannedRequest) -> None:
    """Whether it ended as asked for, after so many tokens, and says so.

    Raises:
        StreamError: It did not.
    """
    got, wanted = len(answer.token_ids), request.output_tokens
    if got != wanted:
        raise StreamError("wrong number of tokens", f"{got} instead of {wanted}")
    if answer.finish_reason != "length":
        raise StreamError("wrong finish reason", f"{answer.finish_reason!r} instead of 'length'")
    usage = answer.usage or {}
    if usage.get("completion_tokens") != got:
        raise StreamError("usage counts other tokens", f"{usage.get('completion_tokens')} for {got}")
    # How many tokens a chat has is the server's business: the template is its own.
    if request.api == "completions" and usage.get("prompt_tokens") != request.prompt_tokens:
        raise StreamError(
            "usage counts another prompt", f"{usage.get('prompt_tokens')} for {request.prompt_tokens}"
        )

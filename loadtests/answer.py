"""One streamed answer: its chunks, their arrival times, and the errors of a stream."""

from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"


class StreamError(Exception):
    """A request failed, or its stream is wrong.

    Attributes:
        kind: Short, and the same for all failures of a kind: tables count by it.
        detail: What was received.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail

    @property
    def text(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass(slots=True)
class StreamedAnswer:
    """The chunks of one stream, added in order.

    Attributes:
        prompt_token_ids: The prompt as the server reports it.
        token_ids: All tokens so far.
        times_s: Arrival time of each chunk with tokens, on one clock.
        finish_reason: None until the stream reports its end.
        usage: Token counts, once received.
        done: The last line of the stream was received.
    """

    prompt_token_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    done: bool = False

    def add(self, chunk: dict[str, Any], now_s: float) -> None:
        """Adds one chunk of `/v1/completions` or `/v1/chat/completions`.

        Raises:
            StreamError: The chunk reports an error, or follows the end of the stream.
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

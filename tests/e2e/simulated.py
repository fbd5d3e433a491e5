"""What simulated engines answer: a known function of the prompt, whatever becomes of the request."""

from pd_serve.simulated_engine.contents import TokenPrompt, expected_output
from tests.e2e.completion_client import Answer, Body, Choice

#: The words of the model `tiny` are bytes; simulated engines say its letters.
LETTERS = (ord("a"), 26)

BLOCK_TOKENS = 16  # any size gives the same output


def simulated_answer(body: Body) -> Answer:
    """The answer to a prompt of token ids."""
    prompt = body["prompt"]
    tokens = expected_output(TokenPrompt(prompt), body["max_tokens"], BLOCK_TOKENS, LETTERS)
    usage = {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(tokens),
        "total_tokens": len(prompt) + len(tokens),
    }
    return Answer({0: Choice(tokens, bytes(tokens).decode(), "length")}, usage, "")

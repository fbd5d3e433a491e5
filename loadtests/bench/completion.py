"""One streamed completion, sent by vLLM's own benchmark function."""

from typing import Any

import aiohttp

from loadtests.bench.servers import MODEL


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    prompt: str | list[int],
    *,
    prompt_tokens: int,
    output_tokens: int,
) -> Any:
    """Greedy, to the last of `output_tokens`. Returns vLLM's `RequestFuncOutput`, which says what failed."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

    request = RequestFuncInput(
        prompt=prompt,
        api_url=f"{url}/v1/completions",
        prompt_len=prompt_tokens,
        output_len=output_tokens,
        model=MODEL,
        ignore_eos=True,
        extra_body={"temperature": 0.0},
    )
    return await async_request_openai_completions(request, session)


def fault(output: Any, output_tokens: int) -> str:
    """Why an answer does not count, in one line; empty if it does."""
    if not output.success:
        said: list[str] = output.error.strip().splitlines()
        return said[-1] if said else "no answer"
    if output.output_tokens != output_tokens:
        return f"{output.output_tokens} tokens came instead of {output_tokens}"
    return ""

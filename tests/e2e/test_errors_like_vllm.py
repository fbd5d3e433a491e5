"""What is wrong with a request is said as plain vLLM says it."""

from typing import Any

import httpx
import pytest

from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import Reference
from tests.e2e.error_cases import ERROR_CASES
from tests.e2e.server_process import ServerProcess
from tests.e2e.verdicts import Verdicts

#: Of the answer's headers: those that a client acts upon.
HEADERS = ("allow", "content-type", "location", "retry-after", "www-authenticate")


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


def seen(answer: httpx.Response) -> dict[str, Any]:
    """All that a client can see of a refusal; of an answer that it got one, and in which shape."""
    headers = {name: value for name, value in answer.headers.items() if name in HEADERS}
    headers = {
        name: value.replace(str(answer.url.copy_with(path="/")), "/") for name, value in headers.items()
    }
    try:
        body = answer.json()
    except ValueError:
        body = answer.text
    if answer.is_success:
        body = sorted(body)
    return {"status": answer.status_code, "headers": headers, "body": body}


@pytest.mark.parametrize("name", ERROR_CASES)
async def test_a_refusal_is_the_same_as_plain_vllms(
    client: CompletionClient, reference: Reference, verdicts: Verdicts, name: str
) -> None:
    case = ERROR_CASES[name]
    async with reference.new_client() as http:
        theirs = seen(await case.ask(http))
    ours = seen(await case.ask(client.http))

    assert theirs["status"] < 500
    verdicts.compare("errors", name, theirs, ours)

"""The backend that only streams."""

import json

from starlette.testclient import TestClient

from loadtests.bench.stub_backend import app


def test_the_stub_streams_the_requested_number_of_tokens() -> None:
    with TestClient(app()) as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})

    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert [len(chunk["choices"]) for chunk in chunks] == [1, 1, 1, 0]
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3}

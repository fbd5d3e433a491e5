"""Error responses in OpenAI's format."""

import json

from pd_serve.api.errors import error_body, error_response


def test_the_type_is_the_phrase_of_the_status_and_the_code_its_number() -> None:
    assert error_body(404, "no such model", "model") == {
        "error": {"message": "no such model", "type": "Not Found", "param": "model", "code": 404}
    }


def test_a_reason_is_in_the_body_only_if_there_is_one() -> None:
    assert error_body(409, "refused", reason="no_free_blocks")["error"]["reason"] == "no_free_blocks"
    assert "reason" not in error_body(409, "refused")["error"]


def test_a_response_has_the_status_the_body_and_the_headers() -> None:
    response = error_response(429, "too many requests wait", headers={"Retry-After": "1"})

    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert json.loads(bytes(response.body)) == error_body(429, "too many requests wait")

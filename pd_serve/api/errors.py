"""Error responses in OpenAI's shape, as vLLM fills it in: `type` is the status phrase, `code` the number."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}` for an HTTP status.

    Source: vllm/entrypoints/serve/exception_handling/handlers/http.py
    """
    kind = HTTPStatus(status).phrase
    return {"error": {"message": message, "type": kind, "param": param, "code": int(status)}}


def error_response(
    status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A complete response with that body."""
    return JSONResponse(error_body(status, message, param), status_code=status, headers=headers)

"""Error responses in OpenAI's format; as in vLLM, `type` is the status phrase and `code` its number.

A refusal with a reason of its own has that as its `code`, as OpenAI's have.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse


def error_body(
    status: int,
    message: str,
    param: str | None = None,
    reason: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}` for an HTTP status.

    Args:
        reason: Why a migration was refused (a `RefusalCode`); added to the error if given.
        code: In the place of the number of the status.

    Source: vllm/entrypoints/serve/exception_handling/handlers/http.py
    """
    kind = HTTPStatus(status).phrase
    error = {"message": message, "type": kind, "param": param, "code": code or int(status)}
    return {"error": error | ({"reason": reason} if reason else {})}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    reason: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A complete response with that body."""
    return JSONResponse(error_body(status, message, param, reason, code), status_code=status, headers=headers)

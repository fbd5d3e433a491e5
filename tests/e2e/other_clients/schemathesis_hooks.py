"""Keeps schemathesis from asking for work without end: the same for every server."""

from typing import Any

import schemathesis

#: Fields that decide how much is computed, and how much is enough.
ENOUGH = {"max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8}
CHOICES = 2


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    body = case.body
    if not isinstance(body, dict):
        return
    for name, most in ENOUGH.items():
        asked = body.get(name)
        if asked is None or (isinstance(asked, int) and asked > most):
            body[name] = most
    if isinstance(body.get("n"), int) and body["n"] > CHOICES:
        body["n"] = CHOICES

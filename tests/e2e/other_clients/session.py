"""What every script here does: make some calls, and print what came out as JSON.

The scripts run in an environment of their own (`deploy/setup_compat.sh`): `python litellm_session.py URL`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

MODEL = "tiny"
MAX_TOKENS = 40
LONG_TOKENS = 6000
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
TOO_LONG = "x" * 20_000

#: Of a stream that is left in the middle.
SEEN = 20


def run(package: str, calls: Mapping[str, Callable[[], Any]]) -> None:
    """Prints `{"version": ..., "verdicts": {name: what the call gave}}`.

    A call that raises gives the name of its exception, and what a client can learn from it.
    """
    verdicts: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            verdicts[name] = call()
        except Exception as error:  # which one, is what is compared
            status = getattr(error, "status_code", None)
            verdicts[name] = [type(error).__name__, status, getattr(error, "param", None)]
    json.dump({"version": version(package), "verdicts": verdicts}, sys.stdout)


def address() -> str:
    """Where the server's API is."""
    return f"{sys.argv[1]}/v1"

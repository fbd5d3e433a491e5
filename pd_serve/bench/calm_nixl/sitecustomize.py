"""Python runs this at its start where this folder is on its path: a setting of NIXL that vLLM does not have.

NIXL's agent class fixes the delay of the progress thread at 0, with which that thread polls without end, a
core per engine, busy or idle. With a delay it sleeps until UCX has something for it, as that of
`migration.transport.nixl_agent` does.
"""

from typing import Any

from nixl import _bindings

from migration.transport.nixl_agent import PROGRESS_PERIOD_US

_agent: Any = _bindings.nixlAgent


def _calm(name: str, config: Any) -> Any:
    config.pthrDelay = PROGRESS_PERIOD_US
    return _agent(name, config)


_bindings.nixlAgent = _calm

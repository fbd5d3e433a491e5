"""Messages between `pd-serve serve` and the process of an API server, over a `ChildChannel`.

They are not defined where that process begins: there, the module has another name, and so have its classes.
"""

from dataclasses import dataclass

from pd_serve.comm.wire import CurveKeys
from pd_serve.config import ServeConfig
from pd_serve.launch.preparation import ModelSource
from pd_serve.manager.manager_config import ManagerConfig


@dataclass(frozen=True, slots=True)
class ApiServerSettings:
    """Parent → API server, first of all.

    Attributes:
        name: Its name on the wire, in logs and in `GET /cluster`. No other process ever has it.
        model: As the parent has prepared it.
    """

    name: str
    config: ServeConfig
    model: ModelSource
    keys: CurveKeys


@dataclass(frozen=True, slots=True)
class FlagsParsed:
    """API server → parent: vLLM's flags are valid.

    Attributes:
        manager_config: What follows from them for instances. Its `host` is not known here.
        served_model_name: The one in answers.
        uses_tls: Whether it serves HTTPS.
    """

    manager_config: ManagerConfig
    served_model_name: str
    uses_tls: bool


@dataclass(frozen=True, slots=True)
class JoinCluster:
    """Parent → API server: the manager and the instances are there.

    Attributes:
        host: See `ManagerConfig.host`.
        manager: Address of the manager.
    """

    host: str
    manager: str


@dataclass(frozen=True, slots=True)
class Serving:
    """API server → parent: it accepts connections."""


@dataclass(frozen=True, slots=True)
class ApiServerFailed:
    """API server → parent: it ends, because of this error.

    Attributes:
        is_invalid: The settings are at fault: another try would fail as well.
    """

    text: str
    is_invalid: bool

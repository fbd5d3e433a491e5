"""Membership messages for tests."""

from collections.abc import Sequence

from migration.engine_interface import EngineFacts
from pd_serve.comm.membership import ApiServerInfo, InstanceInfo, Membership

ROLES = {"p": "prefill", "d": "decode", "n": "neutral"}


def instance_info(name: str, *, node: str = "node", pid: int = 1) -> InstanceInfo:
    """An instance; the first letter of its name is that of its role."""
    engine = EngineFacts(
        no_migration=None, max_model_len=512, num_blocks=100, block_tokens=16, supported_tasks=("generate",)
    )
    return InstanceInfo(name, ROLES[name[0]], f"tcp://{name}", node, pid, engine)


def membership(
    *instances: str,
    api_servers: Sequence[str] = (),
    scheduler: str = "",
    starting: dict[str, int] | None = None,
    leaving: Sequence[str] = (),
    term: int = 1,
) -> Membership:
    return Membership(
        term=term,
        address="tcp://manager",
        instances=[instance_info(name) for name in instances],
        leaving=list(leaving),
        starting=starting or {},
        scheduler=scheduler,
        api_servers={name: ApiServerInfo(f"tcp://{name}", f"tcp://{name}/tokens") for name in api_servers},
    )

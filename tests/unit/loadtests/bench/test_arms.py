"""The command lines of all arms."""

import itertools
import json
from pathlib import Path

import pytest

from loadtests.bench.arms import (
    CACHE_AWARE,
    CONDITIONAL,
    DATA_PARALLEL,
    DEFAULTS,
    NIXL,
    PLAIN,
    RAY_LLM,
    TITLES,
    UNMOVED,
    Arm,
    ArmBuilder,
    described,
)
from loadtests.servers import SharedSettings

SETTINGS = SharedSettings(
    "/models/tiny-r1", ["--block-size=32", "--max-num-seqs=64"], {"OMP_NUM_THREADS": "1"}
)


@pytest.fixture
def arms() -> dict[str, Arm]:
    ports = itertools.count(1000)
    builder = ArmBuilder(SETTINGS, Path("/routers"), lambda: next(ports))
    return {arm.name: arm for arm in builder.all_arms(3)}


def test_all_arms_have_equally_many_engines_with_the_same_flags(arms: dict[str, Arm]) -> None:
    assert list(arms) == list(TITLES)
    for name in (PLAIN, CACHE_AWARE, NIXL):
        assert len(arms[name].engines) == 3
    (data_parallel,) = arms[DATA_PARALLEL].engines
    assert "--data-parallel-size=3" in data_parallel.command
    assert data_parallel.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    (ray_llm,) = arms[RAY_LLM].engines
    assert "--decode=2" in ray_llm.command
    for name in (UNMOVED, DEFAULTS, CONDITIONAL):
        (service,) = arms[name].engines
        assert {"--prefill=1", "--decode=2"} <= set(service.command)
    for arm in arms.values():
        for process in arm.engines:
            assert set(SETTINGS.flags) <= set(process.command)


def test_no_two_processes_share_a_port(arms: dict[str, Arm]) -> None:
    processes = [process for arm in arms.values() for process in arm.processes]
    channels = [process.environment.get("VLLM_NIXL_SIDE_CHANNEL_PORT") for process in processes]
    metrics = [part for process in processes for part in process.command if "prometheus-port" in part]
    used = [process.port for process in processes] + [int(port) for port in channels if port is not None]
    used += [int(part.partition("=")[2]) for part in metrics]

    assert len(metrics) == 3
    servers, ray_llm, routers, ours, side_channels = 3 * 3 + 1, 1, 3, 3, 3
    everything = servers + ray_llm + routers + ours + side_channels + len(metrics)
    assert len(used) == len(set(used)) == everything


def test_the_router_knows_all_servers_of_its_arm(arms: dict[str, Arm]) -> None:
    plain, nixl = arms[PLAIN], arms[NIXL]
    assert plain.router is not None
    assert nixl.router is not None

    urls = [server.url for server in plain.engines]
    begin = plain.router.command.index("--worker-urls") + 1
    assert plain.router.command[begin : begin + 3] == urls
    assert "--policy=round_robin" in plain.router.command
    assert "--policy=cache_aware" in getattr(arms[CACHE_AWARE].router, "command", [])
    prefill, *decode = (server.url for server in nixl.engines)
    given = [part for part in nixl.router.command if part.startswith(("--prefill=", "--decode="))]
    assert given == [f"--prefill={prefill}", *(f"--decode={url}" for url in decode)]


def test_disaggregated_servers_have_their_roles_and_a_side_channel_on_loopback(
    arms: dict[str, Arm],
) -> None:
    roles = []
    for server in arms[NIXL].engines:
        flag = next(part for part in server.command if part.startswith("--kv-transfer-config="))
        roles.append(json.loads(flag.partition("=")[2])["kv_role"])
        assert server.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"

    assert roles == ["kv_producer", "kv_consumer", "kv_consumer"]
    assert not any("kv-transfer" in part for server in arms[PLAIN].engines for part in server.command)


def test_only_rescheduling_differs_between_our_two_arms(arms: dict[str, Arm]) -> None:
    unmoved, defaults = (arms[name].engines[0].command for name in (UNMOVED, DEFAULTS))

    def without_port(command: list[str]) -> set[str]:
        return {part for part in command if not part.startswith("--port=")}

    assert without_port(unmoved) - without_port(defaults) == {"--set=rescheduling=none"}


def test_the_report_names_no_path_of_this_machine(arms: dict[str, Arm]) -> None:
    processes = [described(process, SETTINGS) for arm in arms.values() for process in arm.processes]

    assert all(" /" not in str(one["command"]) and "=/" not in str(one["command"]) for one in processes)
    assert str(processes[0]["command"]).startswith(
        "python -m vllm.entrypoints.openai.api_server --model=tiny "
    )
    assert str(processes[3]["command"]).startswith("vllm-router ")

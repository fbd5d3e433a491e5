"""The comparison with peers: command lines, turns, statistics, and clients of a server that fails."""

import itertools
import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from loadtests.bench import compare, compare_tables
from loadtests.bench.arms import DEFAULTS, NIXL, PLAIN, UNMOVED, Arm, Peers, arms, shown
from loadtests.bench.clients import put_load
from loadtests.bench.router_cost import MANY, ONE, OURS, SGLANG_ROUTER, STUB, VLLM_ROUTER, step_table, summary
from loadtests.bench.seen import (
    LONG_PROMPT,
    OUTPUT_TOKENS,
    SHORT_PROMPT,
    Answer,
    Load,
    Round,
    figures,
    ratios,
)
from loadtests.bench.servers import Settings, free_port
from loadtests.bench.stub_backend import app
from pd_serve.errors import PdServeError
from pd_serve.simulated_engine import cost_table

SETTINGS = Settings("/models/tiny-r1", ["--block-size=32", "--max-num-seqs=64"], {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def wanted() -> dict[str, Arm]:
    ports = itertools.count(1000)
    return {arm.name: arm for arm in arms(3, SETTINGS, Peers(Path("/peers"), lambda: next(ports)))}


def test_all_arms_have_equally_many_engines_with_the_same_flags(wanted: dict[str, Arm]) -> None:
    assert list(wanted) == [PLAIN, NIXL, UNMOVED, DEFAULTS]
    for name in (PLAIN, NIXL):
        assert len(wanted[name].engines) == 3
    for name in (UNMOVED, DEFAULTS):
        (service,) = wanted[name].engines
        assert {"--prefill=1", "--decode=2"} <= set(service.command)
    for arm in wanted.values():
        for process in arm.engines:
            assert set(SETTINGS.flags) <= set(process.command)


def test_no_two_processes_share_a_port(wanted: dict[str, Arm]) -> None:
    processes = [process for arm in wanted.values() for process in arm.processes]
    channels = [process.environment.get("VLLM_NIXL_SIDE_CHANNEL_PORT") for process in processes]
    metrics = [part for process in processes for part in process.command if "prometheus-port" in part]
    used = [process.port for process in processes] + [int(port) for port in channels if port is not None]
    used += [int(part.partition("=")[2]) for part in metrics]

    assert len(metrics) == 2
    assert len(used) == len(set(used)) == 3 + 1 + 3 + 1 + 2 + 3 + 2


def test_the_router_knows_all_servers_of_its_arm(wanted: dict[str, Arm]) -> None:
    plain, nixl = wanted[PLAIN], wanted[NIXL]
    assert plain.front is not None
    assert nixl.front is not None

    urls = [server.url for server in plain.engines]
    begin = plain.front.command.index("--worker-urls") + 1
    assert plain.front.command[begin : begin + 3] == urls
    assert "--policy=round_robin" in plain.front.command
    prefill, *decode = (server.url for server in nixl.engines)
    given = [part for part in nixl.front.command if part.startswith(("--prefill=", "--decode="))]
    assert given == [f"--prefill={prefill}", *(f"--decode={url}" for url in decode)]


def test_disaggregated_servers_have_their_roles_and_a_side_channel_on_loopback(
    wanted: dict[str, Arm],
) -> None:
    roles = []
    for server in wanted[NIXL].engines:
        flag = next(part for part in server.command if part.startswith("--kv-transfer-config="))
        roles.append(json.loads(flag.partition("=")[2])["kv_role"])
        assert server.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"

    assert roles == ["kv_producer", "kv_consumer", "kv_consumer"]
    assert not any("kv-transfer" in part for server in wanted[PLAIN].engines for part in server.command)


def test_only_rescheduling_differs_between_our_two(wanted: dict[str, Arm]) -> None:
    unmoved, defaults = (wanted[name].engines[0].command for name in (UNMOVED, DEFAULTS))

    def without_port(command: list[str]) -> set[str]:
        return {part for part in command if not part.startswith("--port=")}

    assert without_port(unmoved) - without_port(defaults) == {"--set=rescheduling=none"}


def test_the_report_names_no_path_of_this_machine(wanted: dict[str, Arm]) -> None:
    told = [shown(process, SETTINGS) for arm in wanted.values() for process in arm.processes]

    assert all(" /" not in str(one["command"]) and "=/" not in str(one["command"]) for one in told)
    assert str(told[0]["command"]).startswith("python -m vllm.entrypoints.openai.api_server --model=tiny ")
    assert str(told[3]["command"]).startswith("vllm-router ")


def test_every_arm_is_first_in_one_of_four_rounds(wanted: dict[str, Arm]) -> None:
    orders = [[arm.name for arm in compare.turns(list(wanted.values()), number)] for number in range(4)]

    assert all(sorted(order) == sorted(wanted) for order in orders)
    assert len({order[0] for order in orders}) == 4


def test_a_load_is_the_same_for_the_same_seed() -> None:
    steady, full = Load("steady", 200, rate=10.0), Load("full", 200, num_clients=4)

    requests = steady.requests(1)

    assert requests == steady.requests(1) != steady.requests(2)
    assert 10 < requests[-1].arrival_s < 30
    assert all(OUTPUT_TOKENS[0] <= one.output_tokens <= OUTPUT_TOKENS[1] for one in requests)
    assert 0 < sum(one.prompt_tokens >= LONG_PROMPT[0] for one in requests) < 60
    assert all(SHORT_PROMPT[0] <= one.prompt_tokens <= LONG_PROMPT[1] for one in requests)
    assert {one.arrival_s for one in full.requests(1)} == {0.0}


def test_figures_are_those_of_the_requests_that_did_not_fail() -> None:
    good = Answer(0.1, (0.01, 0.03), 3)
    slow = Answer(0.3, (0.05,), 2)
    rounds = [Round(2.0, 0.5, 1.0, [good, slow]), Round(1.0, 0.5, 1.0, [good, Answer(error="503")])]

    seen = figures(rounds)

    assert (seen["requests"], seen["failures"]) == (4, 1)
    assert (seen["ttft_p50_ms"], seen["itl_p50_ms"], seen["tpot_p50_ms"]) == (100.0, 30.0, 20.0)
    assert seen["longest_gap_max_ms"] == 50.0
    assert seen["output_tokens_per_s"] == pytest.approx((2.5 + 3) / 2, abs=0.1)
    assert seen["cpu_ms_per_token"] == 125.0


def test_figures_of_failures_only_have_no_times() -> None:
    seen = figures([Round(1.0, 0.1, 1.0, [Answer(error="503")])])

    assert seen == {"requests": 1, "failures": 1, "output_tokens_per_s": 0.0}


def test_ratios_are_medians_over_pairs_of_rounds() -> None:
    def one(ttft_s: float) -> Round:
        return Round(1.0, 0.1, 1.0, [Answer(ttft_s, (0.01,), 2)])

    found = ratios([one(0.2), one(0.9), one(0.1)], [one(0.1), one(0.1), one(0.2)])

    assert found["ttft_p50_ms"] == 2.0
    assert found["output_tokens_per_s"] == 1.0


def test_there_is_no_ratio_to_nothing() -> None:
    one, bunched = (Round(1.0, 0.1, 1.0, [Answer(0.1, (gap_s,), 2)]) for gap_s in (0.01, 0.0))

    assert "itl_p99_ms" not in ratios([one], [bunched])
    assert ratios([bunched], [one])["itl_p99_ms"] == 0.0


def test_routers_are_measured_against_the_stub_and_ours_against_a_step() -> None:
    def rounds(ttft_s: float, cpu_s: float) -> dict[str, list[Round]]:
        one = Round(1.0, cpu_s, 1.0, [Answer(ttft_s, (0.002,), 2)] * 4)
        return {ONE.name: [one], MANY.name: [one]}

    found = summary({STUB: rounds(0.004, 0.4), VLLM_ROUTER: rounds(0.005, 0.004), OURS: rounds(0.007, 0.008)})

    assert "added_ttft_ms" not in found[STUB]
    assert found[VLLM_ROUTER]["added_ttft_ms"] == 1.0
    assert found[VLLM_ROUTER]["requests_per_s_per_core"] == 1000.0
    assert found[OURS]["added_ttft_ms"] == 5.0
    assert SGLANG_ROUTER not in found


def test_the_simulated_engine_is_as_fast_as_the_stub(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(step_table())

    model = cost_table.read(path)

    assert model.decode_s(16, 3000) == pytest.approx(0.002, rel=0.05)
    assert model.prefill_s([(128, 0)]) == pytest.approx(0.002, rel=0.05)


def test_the_stub_streams_what_is_asked_for() -> None:
    with TestClient(app()) as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})

    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert [len(chunk["choices"]) for chunk in chunks] == [1, 1, 1, 0]
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3}


class Idle:
    def cpu_s(self) -> float:
        return 1.0


async def test_a_server_that_is_not_there_is_a_failure_of_each_request() -> None:
    seen = await put_load(f"http://127.0.0.1:{free_port()}", [Idle()], Load("full", 3, num_clients=2), 0)

    assert len(seen.answers) == 3
    assert all(answer.error for answer in seen.answers)
    assert seen.cpu_s == 0.0


def test_engines_that_do_not_fit_are_refused_before_anything_is_started() -> None:
    with pytest.raises(PdServeError, match="--engines 4999"):
        compare.check_memory(5000)


def test_tables_show_a_dash_for_what_was_not_measured() -> None:
    failed = figures([Round(1.0, 0.1, 1.0, [Answer(error="503")])])
    found = {"arms": {PLAIN: {"title": "plain", "figures": {"steady": failed}}}}

    table = compare_tables.arms(2, found)

    assert table.row_count == 1
    assert next(iter(table.columns[2].cells)) == "– / –"

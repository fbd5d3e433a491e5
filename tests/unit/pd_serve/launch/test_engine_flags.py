"""vLLM's flags for all roles and for one, and one clear line for everything that is wrong with them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from pd_serve.errors import InvalidRequestError
from pd_serve.launch.engine_flags import CHANGED_DEFAULTS, ROLES, ParsedFlags, parse
from pd_serve.models import resolve

MODEL = str(Path(__file__).parent)
"""Any directory: vLLM looks a name up on the hub, or in its cache, when it makes `EngineArgs`."""


def read(*args: str, **defaults: object) -> ParsedFlags:
    return parse(list(args), {"model": MODEL, **defaults})


def by_role(flags: ParsedFlags, name: str) -> list[object]:
    """The setting for prefill, decode and neutral; None where it is vLLM's default."""
    return [flags.engine(role).get(name) for role in ROLES]


def complaint(*args: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read(*args)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_importing_costs_no_vllm() -> None:
    modules = (
        "pd_serve.launch.engine_flags, pd_serve.api.server, pd_serve.api.overload, pd_serve.api.cluster_view"
    )
    check = f"import sys, {modules}; assert not {{'vllm', 'torch', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


class TestDefaults:
    def test_nothing_given(self) -> None:
        flags = read()
        assert {name: getattr(flags.server, name) for name in CHANGED_DEFAULTS} == CHANGED_DEFAULTS
        for role in ROLES:
            defaults = {"model": MODEL, "scheduling_policy": "priority"}
            assert flags.engine(role) == defaults | {"mm_processor_cache_gb": 0.0}

    def test_command_line_before_caller_before_ours(self) -> None:
        assert by_role(read(max_num_seqs=4), "max_num_seqs") == [4, 4, 4]
        assert by_role(read("--max-num-seqs", "5", max_num_seqs=4), "max_num_seqs") == [5, 5, 5]
        # fcfs is vLLM's default, so it is not among what differs from it.
        assert by_role(read(scheduling_policy="fcfs"), "scheduling_policy") == [None] * 3
        assert by_role(read("--scheduling-policy=fcfs"), "scheduling_policy") == [None] * 3

    def test_of_one_role_come_after_everything_on_the_command_line(self) -> None:
        own = {"prefill": {"max_num_seqs": 2}}
        for args, expected in [
            ([], [2, 4, 4]),
            (["--max-num-seqs=8"], [8, 8, 8]),
            (["--prefill-max-num-seqs=8"], [8, 4, 4]),
            (["--decode-max-num-seqs=8"], [2, 8, 4]),
        ]:
            assert by_role(parse(args, {"model": MODEL, "max_num_seqs": 4}, own), "max_num_seqs") == expected

    def test_caller_must_name_settings_that_exist(self) -> None:
        with pytest.raises(ValueError, match=r"max_num_seq$"):
            read(max_num_seq=4)

    def test_engine_args_are_vllms(self) -> None:
        args = read("--prefill-max-num-seqs=8").engine_args("prefill")
        assert (args.model, args.max_num_seqs, args.scheduling_policy) == (MODEL, 8, "priority")

    def test_settings_can_travel_to_another_process(self) -> None:
        settings = read("--compilation-config.mode", "0", "--seed", "3").engine("decode")
        assert pickle.loads(pickle.dumps(settings))["seed"] == 3


class TestWorkers:
    @pytest.mark.parametrize(
        ("args", "workers", "executor"),
        [
            ([], 1, "uni"),
            (["--tensor-parallel-size", "2"], 2, "mp"),
            (["-tp", "2", "--pipeline-parallel-size", "3"], 6, "mp"),
            (["-pp", "2", "--distributed-executor-backend", "uni"], 2, "mp"),
            (["--distributed-executor-backend", "mp"], 1, "mp"),
        ],
    )
    def test_several_are_processes_of_their_instance(
        self, args: list[str], workers: int, executor: str
    ) -> None:
        flags = read(*args, distributed_executor_backend="uni")
        assert by_role(flags, "distributed_executor_backend") == [executor] * 3
        assert [flags.workers(role) for role in ROLES] == [workers] * 3

    @pytest.mark.parametrize("executor", ["ray", "external_launcher"])
    def test_those_of_another_process_are_refused(self, executor: str) -> None:
        assert "its child processes (mp)" in complaint("--distributed-executor-backend", executor)


class TestForms:
    @pytest.mark.parametrize(
        ("args", "name", "value"),
        [
            (["--max-num-seqs", "4"], "max_num_seqs", 4),
            (["--max-num-seqs=4"], "max_num_seqs", 4),
            (["--max_num_seqs=4"], "max_num_seqs", 4),
            (["--max-num-seqs", "4", "--max-num-seqs=5"], "max_num_seqs", 5),
            (["--max-model-len", "8k"], "max_model_len", 8000),
            (["--seed", "-1"], "seed", -1),
            (["-tp", "2"], "tensor_parallel_size", 2),
            (["--enforce-eager"], "enforce_eager", True),
            (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
            (["--no-enable-prefix-caching", "--enable-prefix-caching"], "enable_prefix_caching", True),
            (["--hf-overrides", '{"a": 1}'], "hf_overrides", {"a": 1}),
            (["--hf-overrides.a", "1", "--hf-overrides.b.c=x"], "hf_overrides", {"a": 1, "b": {"c": "x"}}),
            (["-O2"], "optimization_level", "2"),
            (["-O", "1"], "optimization_level", "1"),
        ],
    )
    def test_for_all_roles(self, args: list[str], name: str, value: object) -> None:
        flags = read(*args)
        assert getattr(flags.server, name) == value
        if name != "enable_prefix_caching" or value is False:
            assert by_role(flags, name) == [value] * 3

    def test_lists_and_repeats_of_the_server(self) -> None:
        flags = read("--api-key", "a", "b", "--middleware", "os.path.join", "--allowed-origins", '["*"]')
        assert (flags.server.api_key, flags.server.middleware) == (["a", "b"], ["os.path.join"])
        assert flags.server.allowed_origins == ["*"]

    def test_config_file_comes_before_the_command_line(self, tmp_path: Path) -> None:
        file = tmp_path / "serve.yaml"
        file.write_text("max-num-seqs: 4\nseed: 9\nenforce-eager: true\nprefill-max-num-batched-tokens: 8\n")
        flags = read("--seed=3", "--config", str(file))
        assert by_role(flags, "max_num_seqs") == [4, 4, 4]
        assert by_role(flags, "seed") == [3, 3, 3]
        assert by_role(flags, "enforce_eager") == [True] * 3
        assert by_role(flags, "max_num_batched_tokens") == [8, None, None]


class TestRoles:
    @pytest.mark.parametrize("flag", ["--prefill-max-num-seqs=8", "--prefill_max_num_seqs=8"])
    def test_one_role(self, flag: str) -> None:
        flags = read("--max-num-seqs", "4", flag, "--neutral-max-num-seqs", "2")
        assert by_role(flags, "max_num_seqs") == [8, 4, 2]
        assert flags.server.max_num_seqs == 4

    @pytest.mark.parametrize("position", [0, 2])
    def test_order_does_not_matter(self, position: int) -> None:
        args = ["--max-num-seqs", "4"]
        args.insert(position, "--decode-max-num-seqs=9")
        assert by_role(read(*args), "max_num_seqs") == [4, 9, 4]

    def test_switches(self) -> None:
        flags = read("--decode-no-enforce-eager", "--prefill-no-enable-prefix-caching", enforce_eager=True)
        assert by_role(flags, "enforce_eager") == [True, None, True]
        assert by_role(flags, "enable_prefix_caching") == [False, None, None]

    def test_keys_of_one_setting_are_merged(self) -> None:
        flags = read("--additional-config.a", "1", "--decode-additional-config.b", "2")
        assert by_role(flags, "additional_config") == [{"a": 1}, {"a": 1, "b": 2}, {"a": 1}]

    @pytest.mark.parametrize(
        "name", ["prefill-context-parallel-size", "decode-context-parallel-size", "prefill-schedule-interval"]
    )
    def test_vllms_own_names_stay_vllms(self, name: str) -> None:
        assert getattr(read(f"--{name}", "1").server, name.replace("-", "_")) == 1

    def test_a_role_of_such_a_name(self) -> None:
        flags = read("--prefill-prefill-schedule-interval=2")
        assert by_role(flags, "prefill_schedule_interval") == [2, None, None]


class TestComplaints:
    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["--max-num-seq", "4"], "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
            (
                ["--prefill-max-num-batch-tokens=4"],
                "unknown flag --prefill-max-num-batch-tokens; did you mean --prefill-max-num-batched-tokens?",
            ),
            (["--xyzzy"], "unknown flag --xyzzy"),
            (["-z"], "unknown flag -z"),
            (["--help"], "unknown flag --help"),
            (["some/model"], "unexpected argument 'some/model'"),
            (["--enforce-eager", "yes"], "unexpected argument 'yes'"),
            (["--max-num-seqs", "4", "5"], "unexpected argument '5'"),
            (["--enforce-eager=yes"], "--enforce-eager takes no value, and was given 'yes'"),
            (["--max-num-seqs"], "--max-num-seqs: expected one argument"),
            (["--max-num-seqs", "x"], "--max-num-seqs: invalid int value: 'x'"),
            (["--decode-max-num-seqs", "x"], "--decode-max-num-seqs: invalid int value: 'x'"),
            (["--config", "nowhere.yaml"], "--config: no such file: nowhere.yaml"),
            (["--config", ""], "--config: no such file: none given"),
            (
                ["--prefill-port", "1"],
                "--prefill-port: --port is a flag of the API server, not of the instances",
            ),
            (
                ["--prefill-dtype=float16"],
                "--prefill-dtype: must be the same on all instances; use --dtype",
            ),
            (["--model", "x"], "--model: name the model as an argument without a flag"),
            (["--port=1"], "--port: is a flag of pd-serve itself and cannot stand in a --config file"),
            (
                ["--lora-modules", "a=/x"],
                "--lora-modules: LoRA adapters need --enable-lora",
            ),
            (
                ["--enable-lora", "--lora-modules", "a=/x", "b=/x", "a=/y"],
                "--lora-modules: the name a is given twice",
            ),
            (
                ["--served-model-name", "a", "b", "--enable-lora", "--lora-modules", "b=/x"],
                "--lora-modules: the name b is given twice",
            ),
            (["--headless"], "--headless is not a flag of pd-serve, which does this in its own way"),
        ],
    )
    def test_says(self, args: list[str], says: str) -> None:
        assert complaint(*args) == says

    @pytest.mark.parametrize(
        ("args", "mentions"),
        [
            (["--dtype", "float7"], "--dtype: invalid choice: 'float7'"),
            (["--kv-transfer-config", "{bad"], "--kv-transfer-config"),
            (["--enable-auto-tool-choice"], "--tool-call-parser"),
            (["--enable-auto-tool-choice", "--tool-call-parser", "nope"], "invalid tool call parser: nope"),
            (["--chat-template", "/no/such.jinja"], "/no/such.jinja"),
        ],
    )
    def test_of_vllm_come_in_one_line(self, args: list[str], mentions: str) -> None:
        assert mentions in complaint(*args)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("prefill: 2", "--prefill is a flag of pd-serve itself and cannot stand among vLLM's flags"),
            ("api-key: sk-a", "--api-key is a flag of pd-serve itself"),
            ("max-num-seq: 4", "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
            ("seed: [1", "serve.yaml: must be YAML with one setting a line"),
            ("- seed", "serve.yaml: must be YAML with one setting a line"),
            ("", "serve.yaml: must be YAML with one setting a line"),
        ],
    )
    def test_of_a_config_file_come_in_one_line(self, tmp_path: Path, content: str, says: str) -> None:
        file = tmp_path / "serve.yaml"
        file.write_text(content)
        assert says in complaint("--config", str(file))

    @pytest.mark.parametrize(
        "name",
        ["model", "tokenizer", "block-size", "kv-cache-dtype", "max-model-len", "pipeline-parallel-size"],
    )
    def test_what_must_be_the_same_everywhere(self, name: str) -> None:
        assert complaint(f"--decode-{name}", "1").endswith(f"use --{name}")

    @pytest.mark.parametrize(
        "name", ["api-server-count", "data-parallel-size", "uds", "nnodes", "scheduler-cls"]
    )
    def test_what_pd_serve_does_itself(self, name: str) -> None:
        assert complaint(f"--{name}", "1").startswith(f"--{name} is not a flag of pd-serve")

    def test_a_model_that_is_none(self) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            read().engine_config("decode")
        assert "\n" not in str(caught.value)

    def test_what_does_not_go_together(self) -> None:
        flags = parse(["--gpu-memory-utilization", "3"], {"model": resolve("tiny")})
        with pytest.raises(InvalidRequestError) as caught:
            flags.engine_config("decode")
        assert str(caught.value) == "--gpu-memory-utilization: Input should be less than or equal to 1"

    def test_nothing_is_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        read()
        capfd.readouterr()
        complaint("--max-num-seqs", "x")
        complaint("--nope")
        complaint("--config", "nowhere.yaml")
        assert capfd.readouterr() == ("", "")

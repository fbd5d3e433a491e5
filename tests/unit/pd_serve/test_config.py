"""The settings of a service: where values come from, what they become together, and what is refused."""

import os
import pickle

import pytest

from pd_serve.config import ENVIRONMENT_PREFIX, GROUPS, ServeConfig
from pd_serve.errors import InvalidRequestError
from router.scaling import PoolBounds


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


# ---- numbers of instances


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({}, (1, 2, 0)),
        ({"prefill": 2}, (2, 2, 0)),
        ({"neutral": 0}, (1, 2, 0)),
        ({"neutral": 3}, (0, 0, 3)),
        ({"prefill": 1, "decode": 1, "neutral": 3}, (1, 1, 3)),
        ({"prefill": 1, "decode": 0, "neutral": 3}, (1, 0, 3)),
        ({"autoscale_decode": "1:4"}, (1, 2, 0)),
        ({"autoscale_decode": "3:4"}, (1, 3, 0)),
        ({"autoscale_decode": "1:1", "autoscale_prefill": "2:3"}, (2, 1, 0)),
        ({"autoscale": "2:5"}, (0, 0, 2)),
        ({"autoscale": "2:5", "neutral": 4}, (0, 0, 4)),
    ],
)
def test_numbers_that_are_not_given_follow_from_the_others(
    given: dict[str, object], numbers: tuple[int, ...]
) -> None:
    config = ServeConfig(**given)

    assert tuple(config.instances.values()) == numbers
    assert len(config.instance_roles) == config.num_instances == sum(numbers)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"decode": 5, "autoscale_decode": "1:4"}, "5 decode instances at the start are not within 1:4"),
        ({"prefill": 0, "decode": 2}, "give --prefill"),
        ({"prefill": 1, "decode": 0}, "give --decode"),
        ({"prefill": 0, "decode": 0, "neutral": 0}, "give --prefill or --neutral"),
        ({"prefill": -1}, "--prefill: Input should be greater than or equal to 0"),
        ({"prefill": "two"}, "--prefill: Input should be a valid integer"),
        ({"autoscale_decode": "3:1"}, "--autoscale-decode: 3:1: must be 1 <= MIN <= MAX"),
        ({"decode_resources": '{"GPU": 1}'}, "--decode-resources: GPU must be a custom resource"),
        ({"autoscale_decode": 64}, "--autoscale-decode: takes MIN:MAX, such as 1:4 (in YAML in quotes"),
        ({"autoscale_decode": [4, 1]}, "--autoscale-decode: takes MIN:MAX"),
        ({"autoscale_decode": "1:99999999999"}, "must be 1 <= MIN <= MAX <= 10000"),
        ({"decode": 99_999_999_999}, "100000000000 instances are more than 10000"),
        ({"decode_resources": {"GPU": 1}}, "--decode-resources: GPU must be a custom resource"),
        ({"decode_resources": {"fast": -1}}, "fast must be a custom resource of Ray, with an amount above 0"),
        ({"key_limits": {"rpm": -60}}, "must be such as rpm=60"),
        ({"slo": {"ttft_s": -3}}, "must be such as ttft=500ms"),
        ({"set": {"max_moves": 2}}, "--set: takes a text, or a list of texts"),
        ({"served_model_name": [""]}, "--served-model-name: a name is empty"),
        ({"instances_per_process": 2}, "only simulated instances share a process"),
        ({"instances_per_process": 0, "engine": "simulated"}, "--instances-per-process: Input should be"),
        (
            {"instances_per_process": 2, "engine": "simulated", "accelerator_type": "A10G"},
            "instances that share a process have no resources of their own",
        ),
        (
            {"instances_per_process": 2, "engine": "simulated", "decode_resources": '{"fast": 1}'},
            "instances that share a process have no resources of their own",
        ),
        ({"engine": "sglang"}, "--engine: Input should be 'vllm' or 'simulated'"),
        ({"engine": "simulated", "cost_model": "fast"}, "cost model 'fast': neither known nor a file"),
        ({"policy": "lumnix"}, "no policy 'lumnix'; there are"),
        ({"set": "moves=2"}, "no setting 'moves'; there are"),
        ({"set": "max_moves=many"}, "max_moves"),
        ({"set": "max_moves"}, "--set max_moves: must be KEY=VALUE"),
        ({"modle": "tiny"}, "unknown setting 'modle'"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(given: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ServeConfig(**given)

    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_many_instances_are_possible_as_the_bounds_allow() -> None:
    config = ServeConfig(prefill=2, decode=1, neutral=3, autoscale_decode="1:4")

    assert config.max_instances == 9
    assert config.pool_bounds == {"decode": PoolBounds(1, 4)}


# ---- where values come from


def test_the_environment_gives_what_the_caller_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_SERVE_MAX_BODY_BYTES", "2048")
    monkeypatch.setenv("PD_SERVE_DECODE_RESOURCES", '{"node_a": 1}')
    monkeypatch.setenv("PD_SERVE_SET", "max_moves=2 headroom=1")
    monkeypatch.setenv("PD_SERVE_HOST", "::1")

    config = ServeConfig(host="0.0.0.0")

    assert (config.max_body_bytes, config.host) == (2048, "0.0.0.0")
    assert config.resources["decode"] == {"node_a": 1.0}
    assert (config.policies.max_moves, config.policies.headroom) == (2, 1)


def test_a_wrong_value_in_the_environment_names_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_SERVE_MAX_CONNECTIONS", "0")

    with pytest.raises(InvalidRequestError, match="--max-connections: Input should be greater"):
        ServeConfig()


def test_a_misspelt_variable_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_SERVE_MAX_BODY_BYTE", "2048")

    with pytest.raises(InvalidRequestError, match="did you mean PD_SERVE_MAX_BODY_BYTES"):
        ServeConfig()


def test_variables_of_kubernetes_and_of_other_commands_are_no_misspelt_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP_PORT", "API_SERVICE_PORT", "CACHE", "TRACES"):
        monkeypatch.setenv(f"PD_SERVE_{name}", "8000")

    assert ServeConfig().port == 8000


def test_the_port_that_kubernetes_sets_beside_a_service_of_our_name_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PD_SERVE_PORT", "tcp://10.0.0.1:8000")

    assert ServeConfig().port == 8000


def test_keys_come_from_vllms_variable_and_empty_variables_count_as_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-'it")
    monkeypatch.setenv("PD_SERVE_ADMIN_KEY", "")

    assert ServeConfig().api_key == ("sk-'it",)
    assert ServeConfig().admin_key is None
    assert ServeConfig(api_key=["a", "b"]).api_key == ("a", "b")


def test_settings_travel_to_a_process_with_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_SERVE_PORT", "1234")
    sent = pickle.dumps(ServeConfig(model="tiny"))
    monkeypatch.setenv("PD_SERVE_PORT", "4321")

    assert pickle.loads(sent).port == 1234


def test_settings_do_not_show_secrets() -> None:
    config = ServeConfig(api_key=["sk-alice"], admin_key="sk-admin", cluster_secret=b"0123456789abcdef")

    assert not [secret for secret in ("sk-alice", "sk-admin", "0123456789") if secret in repr(config)]


# ---- arguments of Ray Serve


def test_arguments_of_ray_serve_are_the_flags_without_dashes() -> None:
    config = ServeConfig.of_ray_serve(
        {
            "model": "tiny",
            "prefill": "1",
            "decode": 2,
            "autoscale_decode": "1:3",
            "set": "scale_interval_s=1 drain_after_s=2",
            "flags": "--max-model-len 512 --served-model-name 'a b'",
            "decode_resources": {"node_b": 1},
            "replace": "false",
        }
    )

    assert config.instances == {"prefill": 1, "decode": 2, "neutral": 0}
    assert (config.policies.scale_interval_s, config.policies.drain_after_s) == (1, 2)
    assert config.flags == ("--max-model-len", "512", "--served-model-name", "a b")
    assert config.resources["decode"] == {"node_b": 1}
    assert (config.replace, config.ray_address) == (False, "auto")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("prefil", "did you mean prefill"),
        ("port", "'port'"),
        ("cluster_secret", "did you mean cluster_secret_file"),
    ],
)
def test_an_argument_that_ray_serve_does_not_have_is_refused(name: str, hint: str) -> None:
    with pytest.raises(InvalidRequestError, match=hint):
        ServeConfig.of_ray_serve({name: 1})


def test_every_flag_has_a_group_and_a_help_text() -> None:
    for name, setting in ServeConfig.model_fields.items():
        if isinstance(setting.json_schema_extra, dict):
            assert setting.json_schema_extra["group"] in GROUPS, name
            assert (setting.description or "").endswith("."), name


@pytest.mark.parametrize(
    ("given", "cores", "number"), [(None, 2, 1), (None, 15, 1), (None, 16, 2), (None, 256, 8), (3, 2, 3)]
)
def test_the_number_of_api_servers_follows_from_the_cores(given: int | None, cores: int, number: int) -> None:
    assert ServeConfig(api_servers=given).num_api_servers(cores) == number

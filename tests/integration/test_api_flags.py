"""Every flag of vLLM's API server does here what it does in vLLM, or is refused.

The tables name each setting of vLLM's front end. A later vLLM with another one fails the first test until a
table says what becomes of it.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import pytest_asyncio
from fastapi import FastAPI

os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import (
    FrontendArgs,
    make_arg_parser,
    propagate_flash_late_interaction,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pd_serve.api.server import _config
from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.launch import engine_flags, preparation, server_flags
from pd_serve.launch.vllm_parser import parser
from tests.integration.flag_servers import DEFAULTS, PROBES, ours, plain

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
PLUGINS = str(HERE / "plugins_of_a_user.py")
THINKING = "Here is my thought process: one and one Here is my response: two"
CALL = '[weather(city="Oslo")]'
TEMPLATE = (
    "{{ '<|user|>' }}{{ messages[0].content is string }}{{ mood }}"
    "{{ reasoning_effort }}{{ tools is defined }}"
)
THINKS = {
    "chat": '"reasoning":" one and one ',
    "chat streamed": '"reasoning":" one',
    "chat batch": '"reasoning":" one and one ',
    "sagemaker": '"reasoning":" one and one ',
    "response": '"type":"reasoning"',
    "response streamed": '"type":"reasoning"',
    "message": '"type":"thinking"',
    "message streamed": '"type":"thinking"',
}

#: What the model answers; settings with their flags; what these change: by probe, a part of the answer.
Effects = dict[str, str]
Group = tuple[str, dict[str, tuple[list[str], Effects]]]

EFFECTIVE: dict[str, Group] = {
    "answers": (
        "hello",
        {
            "response_role": (["--response-role", "robot"], {"chat": '"role":"robot"'}),
            "return_tokens_as_token_ids": (
                ["--return-tokens-as-token-ids"],
                dict.fromkeys(("completion logprobs", "chat logprobs"), "token_id:104"),
            ),
            "enable_prompt_tokens_details": (
                ["--enable-prompt-tokens-details"],
                {"chat": '"prompt_tokens_details":{'},
            ),
            "enable_per_request_metrics": (["--enable-per-request-metrics"], {"chat": '"metrics":{'}),
            "enable_force_include_usage": (
                ["--enable-force-include-usage"],
                dict.fromkeys(("completion streamed", "chat streamed"), '"completion_tokens":'),
            ),
            "trust_request_chat_template": (
                ["--trust-request-chat-template"],
                {"chat with a template": '"content":"hello"'},
            ),
            "trust_request_mm_kwargs": (
                ["--trust-request-mm-kwargs"],
                {"chat with media settings": '"content":"hello"'},
            ),
            "enable_tokenizer_info_endpoint": (
                ["--enable-tokenizer-info-endpoint"],
                {"tokenizer": "<|bos|>"},
            ),
            "enable_scale_out": (["--enable-scale-out"], {"tokens": '"token_ids":[104,'}),
            "disable_fastapi_docs": (["--disable-fastapi-docs"], {"docs": "Not Found"}),
            "fingerprint_mode": (["--fingerprint-mode", "custom"], {"chat": '"system_fingerprint":"mine"'}),
            "fingerprint_value": (
                ["--fingerprint-value", "mine"],
                {"completion": '"system_fingerprint":"mine"'},
            ),
            "served_model_name": (["--served-model-name", "first", "tiny"], {"models": '"id":"first"'}),
            "middleware": (
                ["--middleware", "tests.integration.flag_servers.stamp"],
                {"version": "x-stamp: seen"},
            ),
            "allowed_origins": (
                ["--allowed-origins", '["http://page"]'],
                {"preflight": "access-control-allow-origin: http://page"},
            ),
            "allow_credentials": (
                ["--allow-credentials"],
                {"preflight": "access-control-allow-credentials: true"},
            ),
            "allowed_methods": (["--allowed-methods", '["PUT"]'], {"preflight": "allow-methods: PUT"}),
            "allowed_headers": (
                ["--allowed-headers", '["x-mine"]'],
                {"preflight": "allow-headers: Accept, "},
            ),
        },
    ),
    "prompts": (
        "hello",
        {
            "chat_template": (["--chat-template", TEMPLATE], {"prompt": '["<|user|>"'}),
            "chat_template_content_format": (
                ["--chat-template-content-format", "openai"],
                {"prompt": '"F","a","l","s","e","g"'},
            ),
            "default_chat_template_kwargs": (
                ["--default-chat-template-kwargs", '{"mood": "glad"}'],
                {"prompt": '"g","l","a","d"'},
            ),
            # In the length of the prompt of a message without thinking.
            "anthropic_disabled_thinking_effort": (["--anthropic-disabled-thinking-effort", "low"], {}),
            "enable_scale_out": (["--enable-scale-out"], {"tokens": '"token_ids":[104,'}),
            "root_path": (["--root-path", "/llm"], {}),
            "enable_offline_docs": (["--enable-offline-docs"], {"docs": "/static/"}),
            "enable_server_load_tracking": (["--no-enable-server-load-tracking"], {}),
            "enable_request_id_headers": (["--no-enable-request-id-headers"], {}),
        },
    ),
    "thinking": (
        THINKING,
        {"reasoning_parser": (["--reasoning-parser", "granite"], THINKS)},
    ),
    "calls": (
        CALL,
        {
            "enable_auto_tool_choice": (
                ["--enable-auto-tool-choice"],
                {"chat with tools": '"tool_calls":[{'},
            ),
            "tool_call_parser": (
                ["--tool-call-parser", "pythonic"],
                dict.fromkeys(("chat with tools streamed", "message with tools"), '"weather"'),
            ),
            "exclude_tools_when_tool_choice_none": (["--exclude-tools-when-tool-choice-none"], {}),
            "tool_strict_level": (["--tool-strict-level", "function"], {}),
        },
    ),
    "plugins": (
        THINKING,
        {
            "reasoning_parser_plugin": (
                ["--reasoning-parser-plugin", PLUGINS, "--reasoning-parser", "users_thinking"],
                THINKS,
            ),
            "tool_parser_plugin": (
                ["--tool-parser-plugin", PLUGINS, "--tool-call-parser", "users_calls"],
                {},
            ),
        },
    ),
    "tokens": (
        "hello",
        {"tokens_only": (["--tokens-only"], {"tokens": '"token_ids":[104,'})},
    ),
}

#: Settings that no answer shows: the serving layer, or uvicorn, reads them from the same namespace.
SILENT: dict[str, list[str]] = {
    "host": [],
    "port": [],
    "tool_server": ["--tool-server", "localhost:1"],
    "max_log_len": ["--max-log-len", "9"],
    "sse_keep_alive_interval": ["--sse-keep-alive-interval", "9"],
    "enable_log_outputs": ["--enable-log-outputs", "--enable-log-requests"],
    "enable_log_deltas": ["--no-enable-log-deltas"],
    "log_error_stack": ["--log-error-stack"],
    "cohere_is_reasoning_model": ["--no-cohere-is-reasoning-model"],
    "cohere_format": ["--cohere-format", "cmd3"],
    "api_key": ["--api-key", "one", "two"],
    "uvicorn_log_level": ["--uvicorn-log-level", "debug"],
    "disable_uvicorn_access_log": ["--no-disable-uvicorn-access-log"],
    "disable_access_log_for_endpoints": ["--disable-access-log-for-endpoints", "/health"],
    "h11_max_incomplete_event_size": ["--h11-max-incomplete-event-size", "9"],
    "h11_max_header_count": ["--h11-max-header-count", "9"],
    "ssl_keyfile": ["--ssl-keyfile", "key"],
    "ssl_certfile": ["--ssl-certfile", "certificate"],
    "ssl_ca_certs": ["--ssl-ca-certs", "certificates"],
    "ssl_cert_reqs": ["--ssl-cert-reqs", "2"],
    "ssl_ciphers": ["--ssl-ciphers", "AES"],
    "enable_flash_late_interaction": ["--no-enable-flash-late-interaction"],
    "enable_log_requests": ["--enable-log-requests"],
    "disable_log_stats": ["--disable-log-stats"],
    "lora_modules": ["--enable-lora", "--lora-modules", "a=b"],  # see test_api_lora.py
}

#: Settings of what pd-serve does in another way, or not at all.
REFUSED: dict[str, list[str]] = {
    "headless": ["--headless"],
    "api_server_count": ["--api-server-count", "2"],
    "grpc": ["--grpc"],
    "grpc_port": ["--grpc-port", "1"],
    "uds": ["--uds", "socket"],
    "data_parallel_supervisor_port": ["--data-parallel-supervisor-port", "1"],
    "dp_supervisor_probe_interval_s": ["--dp-supervisor-probe-interval-s", "1"],
    "dp_supervisor_probe_timeout_s": ["--dp-supervisor-probe-timeout-s", "1"],
    "dp_supervisor_probe_failure_threshold": ["--dp-supervisor-probe-failure-threshold", "1"],
    "enable_ssl_refresh": ["--enable-ssl-refresh"],
}

#: Read before vLLM's parser is asked: see `tests/unit/pd_serve/launch/test_engine_flags.py`.
BEFORE: set[str] = {"config", "model_tag"}


def test_every_setting_of_vllms_front_end_is_in_a_table() -> None:
    effective = {name for _, rows in EFFECTIVE.values() for name in rows}
    of_engines = {item.name for item in fields(AsyncEngineArgs)}
    front_end = {action.dest for action in parser()._actions} - of_engines
    front_end |= {item.name for item in fields(FrontendArgs)}
    assert front_end - effective - SILENT.keys() - REFUSED.keys() - BEFORE == set()
    assert engine_flags.CHANGED_DEFAULTS.keys() - {"scheduling_policy"} <= effective | SILENT.keys()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def unchanged() -> dict[str, dict[str, str]]:
    """The answers of vLLM's server without any flag, by the model's text."""
    found = {}
    for text in {text for text, _ in EFFECTIVE.values()}:
        async with plain([], text) as server:
            found[text] = await server.ask(PROBES)
    return found


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("group", EFFECTIVE)
async def test_every_route_answers_as_vllms_does_with_a_flag(
    group: str, unchanged: dict[str, dict[str, str]]
) -> None:
    text, rows = EFFECTIVE[group]
    flags = [part for row, _ in rows.values() for part in row]
    async with plain(flags, text) as server:
        expected = await server.ask(PROBES)
        args = server.args
    async with ours(flags, text) as server:
        answers = await server.ask(PROBES)
    for name in PROBES:
        assert (name, answers[name]) == (name, expected[name])
    for setting, (_, effects) in rows.items():
        assert getattr(server.args, setting) == getattr(args, setting), setting
        for probe, part in effects.items():
            assert part in expected[probe], (setting, probe, expected[probe])
            assert part not in unchanged[text][probe], (setting, probe)


@pytest.mark.parametrize("setting", SILENT)
def test_a_flag_that_no_answer_shows_reaches_the_server(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_flags, "check_tls", lambda server: None)  # there are no such files
    flags = SILENT[setting]
    base = argparse.Namespace(**engine_flags.CHANGED_DEFAULTS, **DEFAULTS)
    theirs = make_arg_parser(FlexibleArgumentParser()).parse_args(flags, base)
    propagate_flash_late_interaction(theirs, theirs)
    parsed = engine_flags.parse(flags, DEFAULTS)
    assert getattr(parsed.server, setting) == getattr(theirs, setting)
    assert parsed.server.pooler_config == theirs.pooler_config == parsed.engine("decode").get("pooler_config")
    if flags:
        assert getattr(theirs, setting) != getattr(engine_flags.parse([], DEFAULTS).server, setting)


def test_flags_of_the_http_server_reach_uvicorn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_flags, "check_tls", lambda server: None)
    log_config = tmp_path / "log.json"
    log_config.write_text('{"version": 1, "disable_existing_loggers": false}')
    named = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
    flags = [
        part for name in (*named, "uvicorn_log_level", "disable_uvicorn_access_log") for part in SILENT[name]
    ]
    parsed = engine_flags.parse([*flags, "--logging-config.pylogging_config_file", str(log_config)], DEFAULTS)
    parsed.server_config()
    args = parsed.server
    config = _config(FastAPI(), args, 9)
    assert {name: getattr(config, name) for name in named} == {name: getattr(args, name) for name in named}
    assert (config.log_level, config.access_log) == ("debug", True)
    assert config.log_config == {"version": 1, "disable_existing_loggers": False}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_flag_for_what_pd_serve_does_not_do_is_refused(setting: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine_flags.parse(REFUSED[setting], DEFAULTS)
    assert str(caught.value).startswith(REFUSED[setting][0])


@pytest.fixture
def _environment_stays() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_environment_stays")
def test_the_service_resolves_what_its_serving_layer_reads() -> None:
    config = ServeConfig(model="tiny", flags=("--reasoning-parser", "granite"))
    prepared = preparation.parse(config, preparation.find_model(config))
    assert prepared.flags.server.structured_outputs_config.reasoning_parser == "granite"
    assert prepared.flags.server.structured_outputs_config is prepared.engine_config.structured_outputs_config
    again = engine_flags.parse([], DEFAULTS)
    assert again.server.structured_outputs_config.reasoning_parser == ""  # in no other namespace


@pytest.mark.usefixtures("_environment_stays")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--reasoning-parser", "nope"], "Reasoning parser 'nope' not found"),
        (["--reasoning-parser-plugin", "/no/plugin.py"], "/no/plugin.py"),
        (["--tool-parser-plugin", "/no/plugin.py"], "/no/plugin.py"),
        (["--prefill-gpu-memory-utilization", "3"], "prefill instances: --gpu-memory-utilization"),
    ],
)
def test_what_an_instance_could_not_start_with_is_refused_before(flags: list[str], says: str) -> None:
    config = ServeConfig(model="tiny", flags=tuple(flags))
    model = preparation.find_model(config)
    with pytest.raises(InvalidRequestError) as caught:
        preparation.parse(config, model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_instance_imports_the_users_reasoning_parser_before_it_asks_for_it() -> None:
    """In a process of its own, as an instance is one."""
    flags = engine_flags.parse(EFFECTIVE["plugins"][1]["reasoning_parser_plugin"][0], DEFAULTS)
    arguments = json.dumps({**flags.engine("decode"), "enforce_eager": True})
    code = (
        "import json; from pd_serve.instance.engine_factory import vllm_config;"
        f"print(vllm_config(json.loads({arguments!r})).structured_outputs_config.reasoning_parser)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split()[-1:] == ["users_thinking"], ran.stderr

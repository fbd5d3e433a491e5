"""`pd-serve serve`: its help, and what the settings become that a command line gives."""

import os
import re
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

import pytest
from typer.testing import CliRunner

from pd_serve.cli import main
from pd_serve.config import GROUPS, ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.launch import serve


def help_of(*command: str) -> str:
    done = CliRunner().invoke(main.app, [*command, "-h"], env={"COLUMNS": "80"}, terminal_width=80)
    assert done.exit_code == 0
    return done.output


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """Configurations that would have been served."""
    found: list[ServeConfig] = []

    def run(config: ServeConfig, console: object) -> None:
        found.append(config)

    def nothing(work: Coroutine[Any, Any, None], process: str) -> None:
        pass

    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(main, "_run", nothing)
    return found


def run(*args: str) -> None:
    CliRunner().invoke(main.app, ["serve", *args], catch_exceptions=False)


def test_the_help_shows_every_flag_in_full_in_80_columns() -> None:
    shown = help_of("serve")

    assert max(map(len, shown.splitlines())) <= 80
    flags = set(re.findall(r"--[a-z-]+(?<!-)", shown))
    for name, setting in ServeConfig.model_fields.items():
        if setting.json_schema_extra is not None:
            assert f"--{name.replace('_', '-')}" in flags


def test_the_help_has_groups_defaults_and_the_model_in_the_usage_line() -> None:
    shown = help_of("serve")

    assert "serve [MODEL] [OPTIONS] [VLLM OPTIONS]" in shown.splitlines()[0]
    headings = [line.rstrip(":") for line in shown.splitlines() if re.fullmatch(r"\w+:", line)]
    assert headings == ["Arguments", *GROUPS, "Options"]
    for default in ("Decode instances. [default: 2]", "[default: 512]", "[default: on]", "[default: 8000]"):
        assert default in " ".join(shown.split())


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("status",),
        ("drain",),
        ("scale",),
        ("restart",),
        ("migrate",),
        ("integrity",),
        ("bench", "profile"),
        ("simulate", "run"),
    ],
)
def test_the_help_of_each_command_fits_80_columns_and_cuts_no_name(command: tuple[str, ...]) -> None:
    shown = help_of(*command)

    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"--[a-z-]*…", shown)


def test_the_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"pd-serve \d+\.\d+\.\d+\n", CliRunner().invoke(main.app, ["--version"]).output)


def test_settings_model_and_vllms_flags_are_told_apart(served: list[ServeConfig]) -> None:
    settings = ["--set", "max_moves=2", "--set", "headroom=1"]
    run("--max-model-len", "1024", "--decode", "3", "tiny", *settings, "--no-replace")

    (config,) = served
    assert (config.model, config.decode, config.replace) == ("tiny", 3, False)
    assert config.flags == ("--max-model-len", "1024")
    assert (config.policies.max_moves, config.policies.headroom) == (2, 1)


def test_the_model_may_have_several_names(served: list[ServeConfig]) -> None:
    run(*["tiny", "--served-model-name", "chat", "small", "--port", "0"])

    assert served[0].served_model_name == ("chat", "small")


def test_without_a_model_the_default_one_is_served(served: list[ServeConfig]) -> None:
    run("--enforce-eager")

    assert served[0].model == "smollm2"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tiny other", "unexpected argument 'other'; MODEL is 'tiny' already"),
        ("tiny --prefil 2", "unknown flag --prefil; did you mean --prefill?"),
        ("tiny --policy fastest", "no policy 'fastest'; there are"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    served: list[ServeConfig], line: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(says)):
        run(*line.split())

    assert not served


def test_the_shell_completes_our_flags() -> None:
    words = {"COMP_WORDS": "pd-serve serve --pre", "COMP_CWORD": "2"}
    environment = os.environ | words | {"_PD_SERVE_COMPLETE": "complete_bash"}
    code = "from pd_serve.cli.main import app; app(prog_name='pd-serve')"

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )

    assert done.stdout.split() == ["--prefill", "--prefill-resources"]

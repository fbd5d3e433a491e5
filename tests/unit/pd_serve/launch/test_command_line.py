"""A command line is cut into MODEL, our flags and vLLM's, without importing vLLM."""

import subprocess
import sys

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.launch.command_line import CommandLine, cut

OWN = {"--prefill": 1, "--replace": 0, "--no-replace": 0, "--served-model-name": "+", "--max-body-bytes": 1}


def complaint(*args: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        cut(args, OWN)
    return str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "serve-me --max-model-len 1024 --prefill 2",
        "--max-model-len 1024 serve-me --prefill=2",
        "--max-model-len=1024 --prefill 2 serve-me",
        "--prefill 2 --max-model-len 1024 -- serve-me",
    ],
)
def test_the_model_may_stand_anywhere(line: str) -> None:
    found = cut(line.split(), OWN)

    assert found.positionals == ["serve-me"]
    assert found.own == ["--prefill=2"]
    assert found.engine_args in (["--max-model-len", "1024"], ["--max-model-len=1024"])


@pytest.mark.parametrize(
    ("line", "positionals", "engine_args"),
    [
        ("--enforce-eager tiny", ["tiny"], ["--enforce-eager"]),
        ("--no-enable-prefix-caching tiny", ["tiny"], ["--no-enable-prefix-caching"]),
        ("--lora-modules a=b c=d -- tiny", ["tiny"], ["--lora-modules", "a=b", "c=d"]),
        ("--lora-modules a=b c=d --seed 1 tiny", ["tiny"], ["--lora-modules", "a=b", "c=d", "--seed", "1"]),
        ("tiny --seed -1", ["tiny"], ["--seed", "-1"]),
        ("-tp 2 tiny -O2", ["tiny"], ["-tp", "2", "-O2"]),
        ("--hf-overrides.a 1 tiny", ["tiny"], ["--hf-overrides.a", "1"]),
        ("--hf-token tiny", [], ["--hf-token", "tiny"]),
        ("--decode_max_num_seqs 3 tiny", ["tiny"], ["--decode_max_num_seqs", "3"]),
        ("", [], []),
    ],
)
def test_vllms_flags_take_as_many_values_as_vllm_takes(
    line: str, positionals: list[str], engine_args: list[str]
) -> None:
    found = cut(line.split(), OWN)

    assert (found.positionals, found.engine_args) == (positionals, engine_args)


def test_a_role_is_told_from_a_name_of_vllm() -> None:
    flags = cut(["--prefill-max-num-seqs=8", "--prefill-schedule-interval=2"]).engine

    assert [(flag.role, flag.tokens) for flag in flags] == [
        ("prefill", ["--max-num-seqs=8"]),
        (None, ["--prefill-schedule-interval=2"]),
    ]


def test_our_flags_may_have_underscores_and_several_values() -> None:
    found = cut(["--max_body_bytes", "5", "--no-replace", "--served-model-name", "a", "b"], OWN)

    names = ["--served-model-name=a", "--served-model-name=b"]
    assert found.own == ["--max-body-bytes=5", "--no-replace", *names]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--max-modl-len 5", "unknown flag --max-modl-len; did you mean --max-model-len?"),
        ("--max_modl_len 5", "unknown flag --max-modl-len; did you mean --max-model-len?"),
        ("--decode-max-num-seq 5", "unknown flag --decode-max-num-seq; did you mean --decode-max-num-seqs?"),
        ("--prefil 5", "unknown flag --prefil; did you mean --prefill?"),
        ("--xyzzy", "unknown flag --xyzzy"),
        ("--prefill", "--prefill: expected one argument"),
        ("--lora-modules", "--lora-modules: expected at least one argument"),
        ("--enforce-eager=1", "--enforce-eager takes no value, and was given '1'"),
        ("--nnodes 2", "--nnodes is not a flag of pd-serve, which does this in its own way"),
        ("--decode-dtype half", "--decode-dtype: must be the same on all instances; use --dtype"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(line: str, says: str) -> None:
    assert complaint(*line.split()) == says


def test_a_flag_that_is_one_of_ours_is_not_looked_up_in_vllms() -> None:
    assert cut(["--prefill", "1"], OWN) == CommandLine(own=["--prefill=1"])


def test_an_unknown_flag_is_refused_without_importing_what_takes_seconds() -> None:
    code = (
        "import sys\nfrom pd_serve.cli.main import app\n"
        "try: app(['serve', 'tiny', '--max-modl-len', '5'], standalone_mode=False)\n"
        "except Exception as error: print(error)\n"
        "print(sorted({'vllm', 'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["unknown flag --max-modl-len; did you mean --max-model-len?", "[]"]

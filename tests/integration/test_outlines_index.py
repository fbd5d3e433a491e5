"""Regexes that outlines compiles in processes of their own."""

import outlines_core as oc
import pytest

from migration.vllm_engine import outlines_index
from migration.vllm_engine.outlines_index import compile_index

pytestmark = pytest.mark.integration

VOCABULARY = oc.Vocabulary(2, {"a": [0], "b": [1]})
LARGE = "a{1,1000000}b{1,1000000}"


def test_the_index_is_the_one_that_outlines_makes_itself() -> None:
    assert compile_index("a+b", VOCABULARY, 0) == oc.Index("a+b", VOCABULARY)


def test_a_regex_that_is_none_has_the_reason_of_outlines() -> None:
    with pytest.raises(ValueError, match="Failed to build DFA"):
        compile_index("(", VOCABULARY, 0)


def test_a_regex_that_takes_too_long_ends_with_its_process() -> None:
    """`subprocess.run` has waited for the process when it returns."""
    with pytest.raises(ValueError, match=r"does not compile within 0\.5 s"):
        compile_index(LARGE, VOCABULARY, 0.5)


def test_a_regex_that_takes_too_much_ends_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlines_index.subprocess, "run", _killed)
    with pytest.raises(ValueError, match="takes more than 2048 MiB to compile"):
        compile_index(LARGE, VOCABULARY, 0)


def _killed(command: list[str], **options: object) -> object:
    return outlines_index.subprocess.CompletedProcess(command, -6, b"", b"")

"""Policies by name, with settings of their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from router import plugins
from router.plugins import PolicyChoice, PolicyError, PolicyKind, Setting


class First:
    """The first one."""

    def choose(self) -> str:
        return "first"


@dataclass
class Largest:
    """The largest one, above a bound."""

    bound: Annotated[int, Meta(ge=1, description="Smaller ones are left out.")] = 4
    strict: bool = False

    def choose(self) -> str:
        return f"above {self.bound}" + (" strictly" if self.strict else "")


class NoMethod:
    pass


@dataclass
class NoDefault:
    bound: int

    def choose(self) -> str:
        return ""


class Fails:
    def __init__(self) -> None:
        raise OSError("no file")

    def choose(self) -> str:
        return ""


KIND: PolicyKind[First | Largest] = PolicyKind("test", "choose", {"first": First})

INSTALLED = {
    "largest": "Largest",
    "first": "Largest",
    "no-method": "NoMethod",
    "no-default": "NoDefault",
    "fails": "Fails",
    "gone": "Gone",
}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    found = [EntryPoint(name, f"{__name__}:{attr}", "pd_serve.test") for name, attr in INSTALLED.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found if group == "pd_serve.test" else [])
    plugins.installed.cache_clear()
    yield
    plugins.installed.cache_clear()


def test_names_are_the_built_in_ones_and_then_the_installed_ones() -> None:
    assert KIND.names() == ["first", "largest", "no-method", "no-default", "fails", "gone"]


def test_a_built_in_name_cannot_be_taken() -> None:
    assert KIND.load("first") is First


def test_a_policy_is_made_with_its_settings_and_the_defaults_of_the_others() -> None:
    assert KIND.make(PolicyChoice("largest")).choose() == "above 4"
    assert (
        KIND.make(PolicyChoice("largest", (("bound", "7"), ("strict", "1")))).choose() == "above 7 strictly"
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (PolicyChoice("other"), "no test policy 'other'; there are first, largest, "),
        (PolicyChoice("gone"), "test policy 'gone' cannot be loaded from .*Gone"),
        (PolicyChoice("no-method"), "'no-method' is not a class with a method 'choose'"),
        (PolicyChoice("no-default"), "the setting 'bound' of .* needs a type and a default"),
        (PolicyChoice("fails"), "'fails' cannot be made: OSError"),
        (PolicyChoice("first", (("bound", 1),)), "'first' has no setting 'bound'; there are none"),
        (PolicyChoice("largest", (("bond", 1),)), "'largest' has no setting 'bond'; there are bound, strict"),
        (PolicyChoice("largest", (("bound", 0),)), "bound must be an integer >= 1, not 0"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused_with_the_reason(choice: PolicyChoice, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        KIND.make(choice)


def test_a_setting_has_the_default_the_limits_and_the_meaning_of_its_parameter() -> None:
    bound, strict = KIND.settings(Largest).values()

    assert (bound.name, bound.default, bound.allowed) == ("bound", 4, "an integer >= 1")
    assert bound.meaning == "Smaller ones are left out."
    assert (strict.name, strict.default, strict.allowed, strict.meaning) == (
        "strict",
        False,
        "true or false",
        "",
    )


def test_a_setting_may_have_a_list_of_values() -> None:
    mode = Setting("mode", Literal["fast", "even"], "fast")

    assert mode.convert("even") == "even"
    with pytest.raises(PolicyError, match="mode must be even or fast, not 'slow'"):
        mode.convert("slow")


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), float("-inf"), "much", "", None])
def test_a_value_that_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(PolicyError, match="share must be a number >= 0 and < 1, not "):
        Setting("share", Annotated[float, Meta(ge=0, lt=1)], 0.0).convert(value)

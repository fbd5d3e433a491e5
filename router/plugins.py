"""Policies by name: the built-in ones, and those of installed packages, found by their entry points.

A policy is a class with the method of its kind. The parameters of its constructor are its settings: each has
a type and a default, and limits and a meaning as `Annotated[int, msgspec.Meta(ge=0, description="...")]`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Meta
from msgspec.inspect import BoolType, FloatType, IntType, LiteralType, Metadata, type_info

P = TypeVar("P")
Value = bool | int | float | str


class PolicyError(ValueError):
    """A policy that cannot be used, or a setting with an unknown name or a wrong value."""


class PolicyChoice(msgspec.Struct, frozen=True):
    """A policy by name, and those of its own settings that are not at their defaults."""

    name: str
    settings: tuple[tuple[str, Value], ...] = ()


class Setting(NamedTuple):
    """One setting of a policy or a policy set. `type` may be annotated with a `msgspec.Meta`."""

    name: str
    type: Any
    default: Any

    @property
    def meaning(self) -> str:
        metas = [meta for meta in getattr(self.type, "__metadata__", ()) if isinstance(meta, Meta)]
        return next((meta.description for meta in metas if meta.description), "")

    @property
    def allowed(self) -> str:
        """The allowed values in words, such as "a number >= 0"."""
        kind = type_info(self.type)
        kind = kind.type if isinstance(kind, Metadata) else kind
        if isinstance(kind, BoolType):
            return "true or false"
        if isinstance(kind, LiteralType):
            return " or ".join(map(str, kind.values))
        if not isinstance(kind, IntType | FloatType):
            return "text"
        limits = ((">=", kind.ge), (">", kind.gt), ("<=", kind.le), ("<", kind.lt))
        words = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)
        return " ".join(["an integer" if isinstance(kind, IntType) else "a number", words]).rstrip()

    def convert(self, value: object) -> Any:
        """The value in the setting's type; numbers may come as text. Raises: PolicyError."""
        try:
            converted = msgspec.convert(value, self.type, strict=False)
        except msgspec.ValidationError:
            converted = math.nan
        if isinstance(converted, float) and not math.isfinite(converted):
            raise PolicyError(f"{self.name} must be {self.allowed}, not {value!r}")
        return converted


@dataclass(frozen=True, eq=False)
class PolicyKind(Generic[P]):
    """All policies that decide the same thing.

    Attributes:
        name: The entry point group of own policies is `pd_serve.<name>`.
        method: What a policy of this kind has to have.
        built_in: Classes by name. Own policies cannot take these names.
    """

    name: str
    method: str
    built_in: Mapping[str, Callable[..., P]]

    @property
    def group(self) -> str:
        return f"pd_serve.{self.name}"

    def names(self) -> list[str]:
        return [*self.built_in, *(name for name in installed(self.group) if name not in self.built_in)]

    def load(self, name: str) -> Callable[..., P]:
        """The policy's class. Raises: PolicyError: unknown, or not usable in this process."""
        if name in self.built_in:
            return self.built_in[name]
        policy = load_installed(self.group, name, f"{self.name} policy", self.names())
        if not isinstance(policy, type) or not callable(getattr(policy, self.method, None)):
            raise PolicyError(f"{name!r} is not a class with a method {self.method!r}")
        self.settings(policy)
        return policy

    def settings(self, policy: Callable[..., P]) -> dict[str, Setting]:
        """The policy's own settings by name. Raises: PolicyError: one lacks a type or a default."""
        return _settings(policy)

    def make(self, choice: PolicyChoice) -> P:
        """A new policy with its settings. Raises: PolicyError."""
        policy = self.load(choice.name)
        known = self.settings(policy)
        for name, _ in choice.settings:
            if name not in known:
                there_are = ", ".join(known) or "none"
                raise PolicyError(f"{choice.name!r} has no setting {name!r}; there are {there_are}")
        settings = {name: known[name].convert(value) for name, value in choice.settings}
        try:
            return policy(**settings)
        except Exception as error:  # of an own policy
            raise PolicyError(f"{choice.name!r} cannot be made: {error!r}") from error


@functools.cache
def _settings(policy: Callable[..., object]) -> dict[str, Setting]:
    found = {}
    for name, parameter in inspect.signature(policy, eval_str=True).parameters.items():
        if parameter.empty in (parameter.annotation, parameter.default):
            raise PolicyError(f"the setting {name!r} of {policy!r} needs a type and a default")
        found[name] = Setting(name, parameter.annotation, parameter.default)
    return found


@functools.cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of all installed packages, by name."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_installed(group: str, name: str, what: str, names: list[str]) -> object:
    """What an entry point stands for. Raises: PolicyError: none of that name, or it cannot be imported."""
    entry = installed(group).get(name)
    if entry is None:
        raise PolicyError(f"no {what} {name!r}; there are {', '.join(names)}")
    try:
        return entry.load()
    except Exception as error:  # whatever the package does when it is imported
        raise PolicyError(f"{what} {name!r} cannot be loaded from {entry.value}: {error!r}") from error

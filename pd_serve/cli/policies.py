"""`pd-serve policies`: policy sets, policies and settings, those of installed packages included."""

import inspect
from typing import Annotated, Any

import rich.console
import typer
from rich.table import Table

from pd_serve.config import DEFAULT_POLICY
from pd_serve.errors import InvalidRequestError
from router.plugins import PolicyError, PolicyKind
from router.policies import POLICY_KINDS, SETTINGS, PolicySet, policy_set, policy_set_names


def policies(
    policy: Annotated[str, typer.Argument(help="Policy set whose values are shown.")] = DEFAULT_POLICY,
) -> None:
    """List the policy sets, the policies of each kind, and every setting with its value and meaning."""
    console = rich.console.Console(highlight=False, markup=False)
    try:
        chosen = policy_set(policy)
    except PolicyError as error:
        raise InvalidRequestError(str(error)) from error
    console.print(_sets())
    for kind in dict.fromkeys(POLICY_KINDS.values()):
        console.print(_policies_of(kind))
    console.print(_settings(chosen))


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    return table


def _sets() -> Table:
    table = _table("\nPolicy sets: --policy NAME", "name", "differs from the defaults in")
    defaults = PolicySet("")
    for name in policy_set_names():
        try:
            found = policy_set(name)
        except PolicyError as error:
            table.add_row(name, f"cannot be used: {error}")
            continue
        values = {setting: getattr(found, setting) for setting in SETTINGS} | found.options
        changed = [f"{key}={value}" for key, value in values.items() if value != getattr(defaults, key, None)]
        table.add_row(name, " ".join(changed) or "nothing")
    return table


def _policies_of(kind: PolicyKind[Any]) -> Table:
    settings = ", ".join(setting for setting, its_kind in POLICY_KINDS.items() if its_kind is kind)
    table = _table(f"\nPolicies for the settings: {settings}", "name", "what it does")
    for name in kind.names():
        try:
            policy = kind.load(name)
        except PolicyError as error:
            table.add_row(name, f"cannot be used: {error}")
            continue
        table.add_row(name, (inspect.getdoc(policy) or "").partition("\n\n")[0].replace("\n", " "))
        for setting in kind.settings(policy).values():
            table.add_row("", f".{setting.name}={setting.default}: {setting.meaning} ({setting.allowed})")
    return table


def _settings(chosen: PolicySet) -> Table:
    table = _table("\nSettings: --set NAME=VALUE", "name", "default", chosen.name, "meaning")
    for setting in SETTINGS.values():
        value = getattr(chosen, setting.name)
        allowed = "a policy" if setting.name in POLICY_KINDS else setting.allowed
        shown = "" if value == setting.default else str(value)
        table.add_row(setting.name, str(setting.default), shown, f"{setting.meaning} ({allowed})")
    return table

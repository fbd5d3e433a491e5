"""`pd-serve policies`, and the policy of docs/own-policies.md, installed as a user would."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from router.policies import POLICY_KINDS, SETTINGS, policy_set_names

ROOT = Path(__file__).parents[4]

#: Runs the command line and then prints how often the example's policy has chosen.
RUN = """
import atexit, os, sys
import most_free
from pd_serve.cli import main
choices = []
choose = most_free.MostFree.choose
def counted(self, *arguments):
    choices.append(self.max_queue)
    return choose(self, *arguments)
most_free.MostFree.choose = counted
os._exit = sys.exit
try:
    main.main()
finally:
    print("choices:", len(choices), "max_queue:", *sorted(set(choices)))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds the example, with the metadata that an installer writes."""
    page = (ROOT / "docs" / "own-policies.md").read_text(encoding="utf-8")
    [project] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    [module] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    declared = tomllib.loads(project)["project"]
    site = tmp_path_factory.mktemp("site")
    (site / "most_free.py").write_text(module, encoding="utf-8")
    info = site / f"{declared['name'].replace('-', '_')}-{declared['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {declared['name']}\nVersion: {declared['version']}\n", encoding="utf-8"
    )
    groups = declared["entry-points"] | {"pd_serve.selection": {"broken": "no_such_module:Policy"}}
    (info / "entry_points.txt").write_text(
        "\n".join(
            line
            for group, names in groups.items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in names.items()))
        ),
        encoding="utf-8",
    )
    return site


def run(site: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = RUN if site else "from pd_serve.cli.main import main; main()"
    path = os.pathsep.join([str(ROOT), *([str(site)] if site else [])])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def simulate(site: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    fixed = ("simulate", "run", "--trace", "s-s", "--rate", "5", "--requests", "20", "--instances", "2")
    return run(site, *fixed, *arguments)


def test_every_set_every_policy_and_every_setting_is_listed() -> None:
    shown = run(None, "policies").stdout

    names = {name for kind in POLICY_KINDS.values() for name in kind.built_in}
    for name in names | set(policy_set_names()) | set(SETTINGS):
        assert re.search(rf"^{re.escape(name)} ", shown, re.MULTILINE), name
    assert all(setting.meaning in shown for setting in SETTINGS.values())
    assert re.search(r"^max_moves +1 +4 +Migrations .*\(an integer >= 1\)", shown, re.MULTILINE)


def test_the_values_of_another_set_are_shown() -> None:
    assert re.search(r"^headroom +0.0 +1.0 ", run(None, "policies", "llumnix-paper").stdout, re.MULTILINE)


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    done = run(None, "policies", "best")

    assert done.returncode == 2
    assert "no policy 'best'; there are round-robin, " in done.stderr


def test_the_example_of_the_docs_is_listed_with_its_setting(site: Path) -> None:
    shown = run(site, "policies").stdout

    assert "most-free    The instance with the most free KV blocks, among those with a short queue." in shown
    assert ".max_queue=2: Queued requests of an instance with a short queue. (an integer >= 0)" in shown


def test_a_policy_that_cannot_be_imported_is_listed_as_such(site: Path) -> None:
    assert "cannot be used: selection policy 'broken' cannot be loaded" in run(site, "policies").stdout


def test_a_simulation_uses_the_example_of_the_docs(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    own = ("--set", "dispatch=most-free", "--set", "dispatch.max_queue=4", "--set", "late_binding=0")
    done = simulate(site, *own, "--json", str(file))

    assert done.returncode == 0, done.stderr
    assert "choices: 20 max_queue: 4" in done.stdout
    summary = json.loads(file.read_text(encoding="utf-8"))
    assert (summary["requests"], summary["failed"], summary["integrity"]) == (20, 0, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dispatch=most-fre"], "no dispatch policy 'most-fre'; there are round-robin, .*, most-free"),
        (["dispatch=most-free", "dispatch.max_queue=-1"], "max_queue must be an integer >= 0, not -1"),
        (["dispatch=most-free", "dispatch.queue=1"], "no setting 'queue'; there are max_queue"),
        (["selection=broken"], "selection policy 'broken' cannot be loaded"),
    ],
)
def test_a_setting_that_the_example_does_not_allow_is_refused_at_start(
    site: Path, settings: list[str], message: str
) -> None:
    done = simulate(site, *(argument for setting in settings for argument in ("--set", setting)))

    assert done.returncode == 2
    assert re.search(message, " ".join(done.stderr.split()))

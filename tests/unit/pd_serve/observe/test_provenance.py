"""What is written beside results: command, machine and versions."""

import json
import platform
from pathlib import Path

import pytest

from pd_serve.observe.provenance import provenance, write


def test_it_names_the_command_without_its_folder_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/folder/pd-serve", "simulate", "--seed", "1"])

    found = provenance()

    assert found["command"] == "pd-serve simulate --seed 1"
    assert found["versions"]["python"] == platform.python_version()
    assert "torch" in found["versions"]
    assert found["machine"]["cores"] >= 1


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_serve.observe.provenance.PACKAGES", ("no-such-package-of-this-name",))

    assert provenance()["versions"].keys() == {"python"}


def test_a_result_is_written_as_json_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"

    write(path, {"provenance": provenance()})

    assert json.loads(path.read_text())["provenance"]["machine"]["cores"] >= 1

"""Keys and the cluster's secret: where they come from, and that they show nowhere."""

import os
from pathlib import Path

import pytest

from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.launch.credentials import (
    ADMIN_VARIABLE,
    SECRET_VARIABLE,
    checked_key,
    read_admin_key,
    read_api_keys,
    read_cluster_secret,
)

SECRET = "0123456789abcdef" * 2


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def no_secret_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    monkeypatch.delenv(ADMIN_VARIABLE, raising=False)


# ---- API keys


def test_keys_of_the_command_line_and_of_a_file(tmp_path: Path, warnings: list[str]) -> None:
    path = private(tmp_path / "keys", "# ours\n\nsk-alice  # until May\n  sk-bob\n#sk-eve\n")

    assert read_api_keys(["sk-root"], path, warnings.append) == ("sk-root", "sk-alice", "sk-bob")
    assert warnings == []


def test_without_keys_there_are_none(warnings: list[str]) -> None:
    assert read_api_keys([], None, warnings.append) == ()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_that_others_can_read_is_warned_about(tmp_path: Path, warnings: list[str], mode: int) -> None:
    path = private(tmp_path / "keys", "sk-alice")
    path.chmod(mode)

    assert read_api_keys([], path, warnings.append) == ("sk-alice",)
    assert warnings == [f"--api-key-file: others can read {path}; chmod 600 it"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "there is no key in"),
        ("# nothing\n\n", "there is no key in"),
        ("sk alice", "printable ASCII characters without spaces"),
        ("clé", "printable ASCII characters without spaces"),
    ],
)
def test_a_file_without_usable_keys(tmp_path: Path, warnings: list[str], content: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        read_api_keys([], private(tmp_path / "keys", content), warnings.append)


def test_a_key_that_is_refused_is_not_told() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked_key("sk secret")

    assert "secret" not in str(caught.value)


def test_the_admin_key_of_a_file_goes_before_others(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = private(tmp_path / "key", "sk-from-file\n")
    monkeypatch.setenv(ADMIN_VARIABLE, "sk-from-environment")

    assert read_admin_key("sk-given", path, warnings.append) == "sk-from-file"
    assert read_admin_key("sk-given", None, warnings.append) == "sk-given"
    assert read_admin_key(None, None, warnings.append) == "sk-from-environment"
    monkeypatch.setenv(ADMIN_VARIABLE, "")
    assert read_admin_key(None, None, warnings.append) is None
    monkeypatch.delenv(ADMIN_VARIABLE)
    assert read_admin_key(None, None, warnings.append) is None
    with pytest.raises(InvalidRequestError, match="printable ASCII characters"):
        read_admin_key("", None, warnings.append)
    with pytest.raises(InvalidRequestError, match="--admin-key-file: there are 2 keys in"):
        read_admin_key(None, private(tmp_path / "two", "sk-a\nsk-b\n"), warnings.append)


def test_no_such_file_is_one_line(tmp_path: Path, warnings: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match=r"--api-key-file: .*/none cannot be read: No such file"):
        read_api_keys([], tmp_path / "none", warnings.append)


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)

    with pytest.raises(InvalidRequestError, match="cannot be read: it is no text"):
        read_api_keys([], path, warnings.append)


# ---- the cluster's secret


def test_a_secret_from_a_file(tmp_path: Path, warnings: list[str]) -> None:
    path = private(tmp_path / "secret", f"{SECRET}\n")

    assert read_cluster_secret(path, warnings.append) == SECRET.encode()


def test_a_secret_from_the_environment_is_not_left_there(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)

    assert read_cluster_secret(None, warnings.append) == SECRET.encode()
    assert SECRET_VARIABLE not in os.environ


def test_the_file_comes_before_the_environment(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "x" * 32)

    assert read_cluster_secret(private(tmp_path / "s", SECRET), warnings.append) == SECRET.encode()
    assert SECRET_VARIABLE not in os.environ


def test_no_secret_is_given(warnings: list[str]) -> None:
    assert read_cluster_secret(None, warnings.append) is None


@pytest.mark.parametrize("content", ["", "\n", "x" * 31])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path: Path, warnings: list[str], content: str) -> None:
    with pytest.raises(InvalidRequestError, match="too short: 32 characters at least"):
        read_cluster_secret(private(tmp_path / "secret", content), warnings.append)


def test_a_configuration_does_not_show_them() -> None:
    config = ServeConfig(
        "tiny",
        {"prefill": 0, "decode": 0, "neutral": 1},
        api_keys=("sk-alice",),
        admin_key="sk-admin",
        cluster_secret=SECRET.encode(),
    )

    assert not [secret for secret in ("sk-alice", "sk-admin", SECRET) if secret in repr(config)]

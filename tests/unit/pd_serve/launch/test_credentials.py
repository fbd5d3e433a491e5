"""Keys and the cluster's secret: their sources, and what is refused."""

import hashlib
import os
from pathlib import Path

import pytest

from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.launch.credentials import ADMIN_VARIABLE, SECRET_VARIABLE, checked_key, with_credentials
from router.rate_limits import KeyLimits

SECRET = "0123456789abcdef" * 2


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def _no_credentials_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SECRET_VARIABLE, ADMIN_VARIABLE, "VLLM_API_KEY", "PD_SERVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


# ---- API keys


def test_keys_of_the_command_line_come_before_those_of_a_file(tmp_path: Path, warnings: list[str]) -> None:
    path = private(tmp_path / "keys", "# ours\n\nsk-alice  # until May\n  sk-bob\n#sk-eve\n")

    config = with_credentials(ServeConfig(api_key=["sk-root"], api_key_file=path), warnings.append)

    assert config.api_key == ("sk-root", "sk-alice", "sk-bob")
    assert warnings == []


def test_without_credentials_there_are_none(warnings: list[str]) -> None:
    config = with_credentials(ServeConfig(), warnings.append)

    assert (config.api_key, config.admin_key, config.cluster_secret) == ((), None, None)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_that_others_can_read_is_warned_about(tmp_path: Path, warnings: list[str], mode: int) -> None:
    path = private(tmp_path / "keys", "sk-alice")
    path.chmod(mode)

    assert with_credentials(ServeConfig(api_key_file=path), warnings.append).api_key == ("sk-alice",)
    assert warnings == [f"--api-key-file: other users can read {path}; chmod 600 it"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "there is no key in"),
        ("# nothing\n\n", "there is no key in"),
        ("sk alice", "behind a key there may be a name and limits, such as name=alice,rpm=60,tpm=100000"),
        ("clé", "printable ASCII characters without spaces"),
        ("\nsk-alice,rpm=5", "line 2: a space has to stand between a key and its settings"),
        ("sk-alice\n# again\nsk-alice rpm=5", "lines 1 and 3 have the same key"),
    ],
)
def test_a_file_without_usable_keys_is_refused(
    tmp_path: Path, warnings: list[str], content: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        with_credentials(ServeConfig(api_key_file=private(tmp_path / "keys", content)), warnings.append)
    assert "alice" not in str(refused.value).partition("such as")[0]


def test_a_key_may_have_a_number_sign_and_stand_on_the_command_line_too(
    tmp_path: Path, warnings: list[str]
) -> None:
    path = private(tmp_path / "keys", "sk#bob rpm=5 # until May\n\t# none\n")

    config = with_credentials(ServeConfig(api_key=["sk#bob"], api_key_file=path), warnings.append)

    assert config.api_key == ("sk#bob",)
    assert config.limits_of_accounts == [KeyLimits(5)]


def test_the_message_about_a_refused_key_omits_the_key() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked_key("sk secret")

    assert "secret" not in str(caught.value)


def test_the_admin_key_of_a_file_comes_before_the_flag_and_that_before_the_environment(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = private(tmp_path / "key", "sk-from-file\n")
    monkeypatch.setenv(ADMIN_VARIABLE, "sk-from-environment")

    def admin_key(**given: object) -> str | None:
        return with_credentials(ServeConfig(**given), warnings.append).admin_key

    assert admin_key(admin_key="sk-given", admin_key_file=path) == "sk-from-file"
    assert admin_key(admin_key="sk-given") == "sk-given"
    assert admin_key() == "sk-from-environment"
    with pytest.raises(InvalidRequestError, match="printable ASCII characters"):
        admin_key(admin_key="")
    with pytest.raises(InvalidRequestError, match=r"--admin-key-file: .*/two holds 2 keys instead of one"):
        admin_key(admin_key_file=private(tmp_path / "two", "sk-a\nsk-b\n"))


def test_a_missing_file_is_one_line(tmp_path: Path, warnings: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match=r"--api-key-file: .*/none cannot be read: No such file"):
        with_credentials(ServeConfig(api_key_file=tmp_path / "none"), warnings.append)


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)

    with pytest.raises(InvalidRequestError, match="cannot be read: not a text file"):
        with_credentials(ServeConfig(api_key_file=path), warnings.append)


# ---- the cluster's secret


def test_the_secret_of_a_file_comes_before_the_environment_which_keeps_none(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "x" * 32)

    config = ServeConfig(cluster_secret_file=private(tmp_path / "s", f"{SECRET}\n"))

    assert with_credentials(config, warnings.append).cluster_secret == SECRET.encode()
    assert SECRET_VARIABLE not in os.environ


def test_a_secret_from_the_environment_does_not_stay_there(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)

    assert with_credentials(ServeConfig(), warnings.append).cluster_secret == SECRET.encode()
    assert SECRET_VARIABLE not in os.environ


@pytest.mark.parametrize("content", ["", "\n", "x" * 31])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path: Path, warnings: list[str], content: str) -> None:
    config = ServeConfig(cluster_secret_file=private(tmp_path / "secret", content))

    with pytest.raises(InvalidRequestError, match="too short: 32 characters at least"):
        with_credentials(config, warnings.append)


# ---- limits of keys


def test_a_key_of_a_file_may_have_limits_of_its_own(tmp_path: Path, warnings: list[str]) -> None:
    text = "sk-alice rpm=5,tpm=1000  # a trial\nsk-bob\nsk-carol \t rpm=7\n"
    path = private(tmp_path / "keys", text)

    config = with_credentials(
        ServeConfig(api_key=["sk-root"], api_key_file=path, key_limits="rpm=60"), warnings.append
    )

    assert config.api_key == ("sk-root", "sk-alice", "sk-bob", "sk-carol")
    assert config.limits_of_accounts == [KeyLimits(60), KeyLimits(5, 1000), KeyLimits(60), KeyLimits(7)]
    assert "sk-" not in repr(config)


def test_without_keys_all_clients_share_the_limit(warnings: list[str]) -> None:
    config = with_credentials(ServeConfig(key_limits="tpm=50"), warnings.append)

    assert config.limits_of_accounts == [KeyLimits(tpm=50)]


def test_metrics_name_a_key_by_its_name_or_the_beginning_of_its_hash(
    tmp_path: Path, warnings: list[str]
) -> None:
    path = private(tmp_path / "keys", "sk-alice name=alice,rpm=5\nsk-bob name=bob  # new\nsk-carol rpm=7\n")

    config = with_credentials(ServeConfig(api_key=["sk-root"], api_key_file=path), warnings.append)

    first, *names = config.account_names
    assert first == hashlib.sha256(b"sk-root").hexdigest()[:8]
    assert names == ["alice", "bob", hashlib.sha256(b"sk-carol").hexdigest()[:8]]
    assert config.limits_of_accounts == [KeyLimits(), KeyLimits(5), KeyLimits(), KeyLimits(7)]
    assert "sk-" not in repr(config)


NONSENSE = ["rpm", "limits", "rpm=5 tpm=6", "rpm=0", "name=", "name=a b", "name=a,name=b", "name=x-sk-alice"]


@pytest.mark.parametrize("own", NONSENSE)
def test_limits_that_are_nonsense_are_refused_without_the_key(
    tmp_path: Path, warnings: list[str], own: str
) -> None:
    path = private(tmp_path / "keys", f"sk-alice {own}")

    with pytest.raises(InvalidRequestError, match="behind a key there may be a name and limits") as refused:
        with_credentials(ServeConfig(api_key_file=path), warnings.append)

    assert "sk-alice" not in str(refused.value)


def test_limits_of_keys_are_no_argument_of_an_application() -> None:
    for name in ("limits_by_key", "names_by_key"):
        with pytest.raises(InvalidRequestError, match=f"no argument '{name}'"):
            ServeConfig.of_ray_serve({name: {}})

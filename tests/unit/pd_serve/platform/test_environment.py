"""Environment of the service's processes: what the operator has set stays, and Ray's is apart."""

from pathlib import Path

import pytest

from pd_serve.platform.environment import LOOPBACK, engine_environment, ray_environment


def test_variables_that_are_set_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    assert engine_environment(1, "org/model")["OMP_NUM_THREADS"] == "7"


def test_plugins_of_vllm_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert engine_environment(1, "org/model")["VLLM_PLUGINS"] == ""
    assert "VLLM_PLUGINS" not in engine_environment(1, "org/model", vllm_plugins=True)

    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert engine_environment(1, "org/model")["VLLM_PLUGINS"] == "lora_filesystem_resolver"


def test_a_directory_is_not_looked_up_on_a_hub(tmp_path: Path) -> None:
    assert engine_environment(1, str(tmp_path))["HF_HUB_OFFLINE"] == "1"


def test_instances_have_nothing_that_ray_reads_in_their_environment() -> None:
    assert not [name for name in engine_environment(1, "org/model") if name.startswith("RAY_")]


def test_a_local_cluster_stays_on_loopback_and_has_a_token_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [*LOOPBACK, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"]:
        monkeypatch.delenv(name, raising=False)
    one, other = ray_environment(None), ray_environment(None)

    assert LOOPBACK.items() <= one.items()
    assert one["RAY_AUTH_MODE"] == "token"
    assert one["RAY_AUTH_TOKEN"] != other["RAY_AUTH_TOKEN"]

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "token_of_the_operator")
    assert "RAY_AUTH_TOKEN" not in ray_environment(None)


def test_ray_uses_its_token_in_a_cluster_that_is_joined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert "RAY_AUTH_MODE" not in ray_environment("auto")

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert ray_environment("auto")["RAY_AUTH_MODE"] == "token"

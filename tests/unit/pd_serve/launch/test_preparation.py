"""What instances ask of their machines, and the environment that a model needs."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pd_serve.config import ServeConfig
from pd_serve.errors import InvalidRequestError
from pd_serve.launch import preparation
from pd_serve.launch.preparation import check_handoffs, find_model, placements
from router.load import ROLES


@pytest.fixture(autouse=True)
def _environment_of_the_process_stays() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_on_gpus_an_instance_takes_one_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "is_cpu_build", lambda: False)
    config = ServeConfig(decode_resources='{"node_b": 1}', accelerator_type="A10G")

    found = placements(config, {"prefill": 2, "decode": 4, "neutral": 2})

    assert found["prefill"].bundle() == {"GPU": 2.0, "accelerator_type:A10G": 0.001}
    assert found["decode"].bundle() == {"GPU": 4.0, "node_b": 1.0, "accelerator_type:A10G": 0.001}


@pytest.mark.parametrize(("cpu_build", "engine"), [(True, "vllm"), (False, "simulated")])
def test_without_gpus_any_machine_will_do(
    monkeypatch: pytest.MonkeyPatch, cpu_build: bool, engine: str
) -> None:
    monkeypatch.setattr(preparation, "is_cpu_build", lambda: cpu_build)

    assert placements(ServeConfig(engine=engine), dict.fromkeys(ROLES, 2))["decode"].bundle() == {}


def test_the_environment_of_the_engines_is_set_in_this_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    source = find_model(ServeConfig(model="org/model", neutral=2))

    assert source.path == "org/model"
    assert source.environment["OMP_NUM_THREADS"] == "4"
    assert source.environment.items() <= os.environ.items()


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({}, True),
        ({"neutral": 2}, False),
        ({"allow_no_migration": True}, False),
        ({"engine": "simulated"}, False),
    ],
)
def test_disaggregation_is_refused_before_the_start_if_requests_cannot_move(
    settings: dict[str, Any], is_refused: bool
) -> None:
    engine: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    config = ServeConfig(**settings)

    if is_refused:
        with pytest.raises(
            InvalidRequestError,
            match=r"a KV connector.*start with --neutral.*--allow-no-migration",
        ):
            check_handoffs(config, [engine])
    else:
        check_handoffs(config, [engine])


@pytest.mark.parametrize(
    ("sizes", "more", "why"),
    [
        ((1, 2), {}, None),
        ((2, 2), {"is_hybrid": True}, None),
        ((1, 2), {"is_hybrid": True}, "several tensor parallel sizes, although states of linear attention"),
        ((1, 2), {"is_attention_free": True}, "although states of linear attention"),
        ((1, 2), {"pipeline_parallel_size": 2}, "although pipeline stages divide the layers"),
    ],
)
def test_disaggregation_over_several_widths_is_refused_where_blocks_are_not_divided_by_heads(
    sizes: tuple[int, int], more: dict[str, Any], why: str | None
) -> None:
    settings = {
        "is_hybrid": False,
        "is_attention_free": False,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    engines: list[Any] = [
        SimpleNamespace(
            kv_transfer_config=None,
            model_config=SimpleNamespace(**settings | more),
            parallel_config=SimpleNamespace(**settings | more | {"tensor_parallel_size": size}),
        )
        for size in sizes
    ]

    if why is None:
        check_handoffs(ServeConfig(), engines)
        return
    with pytest.raises(InvalidRequestError, match=why):
        check_handoffs(ServeConfig(), engines)
    check_handoffs(ServeConfig(allow_no_migration=True), engines)

"""How many workers an engine has."""

import pytest

from pd_serve.platform.placement import num_workers


@pytest.mark.parametrize(
    ("engine_args", "expected"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 4}, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 3}, 6),
        ({"prefill_context_parallel_size": 2, "pipeline_parallel_size": None}, 2),
    ],
)
def test_an_engine_has_a_worker_for_each_part_of_its_model(
    engine_args: dict[str, int | None], expected: int
) -> None:
    assert num_workers(engine_args) == expected

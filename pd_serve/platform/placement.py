"""Requirements of an instance on the machine that it runs on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

#: vLLM's settings whose product is the number of an engine's workers.
_DEGREES = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")

#: Ray's options of an actor without requirements. If no strategy were given, Ray would place it in the
#: placement group of the actor that makes it, and end it with that one: Serve's `placement_group_bundles`.
ANYWHERE: Mapping[str, Any] = {"num_cpus": 0, "scheduling_strategy": "DEFAULT"}


def num_workers(engine_args: Mapping[str, Any]) -> int:
    """Workers of an engine: processes that each compute a part of every step, on GPUs with one GPU each.

    Args:
        engine_args: Arguments of vLLM's `AsyncEngineArgs`.
    """
    return prod(int(engine_args.get(name) or 1) for name in _DEGREES)


@dataclass(frozen=True, slots=True)
class Placement:
    """Requirements of an instance on its machine.

    Attributes:
        num_gpus: GPUs of all its workers, which share a machine.
        resources: Custom resources of Ray, by name.
        accelerator_type: Ray's name of the accelerator (`ray.util.accelerators`), such as "A10G".
    """

    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None

    def bundle(self) -> dict[str, float]:
        """The only bundle of a placement group; empty if any machine fits."""
        bundle = {"GPU": self.num_gpus, **self.resources}
        if self.accelerator_type is not None:
            bundle[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: amount for name, amount in bundle.items() if amount}

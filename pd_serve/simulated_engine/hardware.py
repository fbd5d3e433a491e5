"""What `--cost-model` names: all that an engine's speed and size follow from."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine import cost_table
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.roofline import NUMBER_BYTES, data, kv_bytes_per_token, roofline
from pd_serve.simulated_engine.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class Hardware:
    """One instance: a model on its GPUs, their links and how long it takes to start.

    The defaults are the paper's. Its link was fitted to its blocking copies.

    Attributes:
        engine: Durations of steps, KV blocks and their size, batch limit and chunks.
        kv_bytes_per_s: Bandwidth of the instance's link in each direction, for KV blocks.
        kv_latency_s: Latency of a copy.
        start_s: Time until a new instance serves.
        num_gpus: GPUs of an instance.
        unknown: What a file of measured steps does not say; its defaults are the paper's.
    """

    engine: EngineSettings
    kv_bytes_per_s: float = 2.48e9
    kv_latency_s: float = 0.010
    start_s: float = 10.0
    num_gpus: int = 1
    unknown: tuple[str, ...] = ()


#: Widths of tensor parallelism that `known_names` lists; others can be named as well.
WIDTHS = {"llama-3.1-8b": dict.fromkeys(data()["gpu"], 1)}
WIDTHS["llama-3.1-70b"] = {"a10": 8, "a100": 4, "h100": 4, "h200": 2, "b200": 2}

#: KV bytes per token, GPUs and KV blocks of OPT in 16 bits on A100 80GB, at 90 % of the memory.
_OPT_SIZES = {
    "a100-opt-13b": (800 * 1024, 1, 3500),
    "4xa100-opt-66b": (2304 * 1024, 4, 4000),
}


def known_names() -> list[str]:
    """Names that `hardware` accepts."""
    return [
        *COST_MODELS,
        *(_name(gpu, width, model) for model, by in WIDTHS.items() for gpu, width in by.items()),
    ]


def hardware(name: str) -> Hardware:
    """The hardware of that name, such as "h100x4-llama-3.1-70b", or that of a CSV file of measured steps.

    Raises:
        InvalidRequestError: It is neither, or the GPUs have no room for the model.
    """
    if name in COST_MODELS:
        return _of_paper(name)
    parts = re.fullmatch(r"([a-z0-9]+?)(?:x(\d+))?-(.+)", name)
    if parts and parts[1] in data()["gpu"] and parts[3] in data()["model"]:
        return _of_datasheet(parts[1], int(parts[2] or 1), parts[3])
    if not Path(name).is_file():
        raise InvalidRequestError(
            f"cost model {name!r}: neither known nor a file; known: {', '.join(known_names())}"
        )
    return _of_file(Path(name))


def _name(gpu: str, width: int, model: str) -> str:
    return f"{gpu}{f'x{width}' if width > 1 else ''}-{model}"


def _of_paper(name: str) -> Hardware:
    engine = EngineSettings(COST_MODELS[name])
    if name not in _OPT_SIZES:
        return Hardware(engine)
    kv_bytes, num_gpus, blocks = _OPT_SIZES[name]
    engine = replace(engine, kv_bytes_per_token=kv_bytes, num_blocks=blocks)
    a100, limits = data()["gpu"]["a100"], data()["engine"]
    return Hardware(
        engine,
        kv_bytes_per_s=num_gpus * a100["link_bytes_per_s"] * limits["link_share"],
        kv_latency_s=limits["link_latency_s"],
        start_s=limits["start_s"],
        num_gpus=num_gpus,
    )


def _of_datasheet(gpu: str, width: int, model: str) -> Hardware:
    limits, device, net = data()["engine"], data()["gpu"][gpu], data()["model"][model]
    if not 1 <= width <= net["kv_heads"]:
        raise InvalidRequestError(
            f"{_name(gpu, width, model)}: from 1 to {net['kv_heads']} GPUs can share it"
        )
    weights = net["parameters"] * NUMBER_BYTES
    room = width * device["memory_bytes"] * limits["memory_share"] - weights
    blocks = int(room / (kv_bytes_per_token(model) * limits["block_tokens"]))
    if blocks < 1:
        raise InvalidRequestError(
            f"{_name(gpu, width, model)}: weights of {weights / 1e9:.0f} GB have no room in "
            f"{width} x {device['memory_bytes'] / 1e9:.0f} GB: name more GPUs, as in "
            f"{_name(gpu, WIDTHS[model][gpu], model)}"
        )
    return Hardware(
        EngineSettings(
            roofline(gpu, width, model),
            num_blocks=blocks,
            block_tokens=limits["block_tokens"],
            max_num_seqs=device["max_num_seqs"],
            chunk_tokens=device["chunk_tokens"],
            kv_bytes_per_token=kv_bytes_per_token(model),
        ),
        kv_bytes_per_s=width * device["link_bytes_per_s"] * limits["link_share"],
        kv_latency_s=limits["link_latency_s"],
        start_s=limits["start_s"] + weights / limits["disk_bytes_per_s"],
        num_gpus=width,
    )


def _of_file(path: Path) -> Hardware:
    steps, sizes = cost_table.read(path), cost_table.read_sizes(path)
    of_engine: dict[str, Any] = {}
    of_links: dict[str, Any] = {}
    for name, value in sizes.items():
        if name in cost_table.ENGINE_SIZES:
            of_engine[name] = int(value)
        else:
            of_links[name] = int(value) if name == "num_gpus" else value
    unknown = tuple(name for name in cost_table.SIZES if name not in sizes)
    found = Hardware(EngineSettings(steps, **of_engine), unknown=unknown)
    return replace(found, **of_links)

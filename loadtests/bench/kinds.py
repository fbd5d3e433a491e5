"""`bench kinds`: the gap of a live migration against ITL, for every kind of engine.

For each kind, and for two tensor-parallel workers, a service of two neutral instances starts, one after the
other, and a request of each length moves to and fro. The models of tests have four layers: a step takes
milliseconds, and messages and visits to the engines as many. So each kind is measured a second time with as
many layers as small models have that people serve. All weights are vLLM's dummies: what a move costs does not
depend on them.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import rich.console
from rich.table import Table

from loadtests.bench.in_process import InProcessService
from loadtests.bench.migration import LengthSamples, MigrationBenchmark
from loadtests.bench.report import BenchmarkReport
from loadtests.terminal import numbers_table
from pd_serve.config import ServeConfig
from pd_serve.errors import PdServeError
from pd_serve.models.cache import cached_directory
from pd_serve.models.catalog import default_dtype, resolve
from pd_serve.models.kinds import KINDS

LENGTHS = (1024, 4096)
MAX_MODEL_LEN = 6144

#: Moves of a request in one round.
MOVES = 8

#: How many times the layers of the models of tests are measured: as they are, and 16 to 24 of them.
DEPTHS = (1, 4)

#: Entries of a configuration with a value for each layer.
PER_LAYER = ("layer_types", "no_rope_layers")


@dataclass(frozen=True)
class EngineKind:
    """A service to measure."""

    model: str
    workers: int = 1
    depth: int = 1

    @property
    def name(self) -> str:
        return self.model if self.workers == 1 else f"{self.model}, {self.workers} workers"

    @property
    def layers(self) -> int:
        return int(self._model_config["num_hidden_layers"]) * self.depth

    @property
    def _model_config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(Path(resolve(self.model), "config.json").read_text())
        return config

    @property
    def config(self) -> ServeConfig:
        flags = [
            "--max-num-seqs=4",
            f"--max-model-len={MAX_MODEL_LEN}",
            f"--max-num-batched-tokens={MAX_MODEL_LEN}",
            f"--kv-cache-memory-bytes={self.depth * 2**28}",
            f"--tensor-parallel-size={self.workers}",
            f"--dtype={default_dtype(self.model)}",
            # So that all blocks are copied. Where it changes how states are kept, as people serve it.
            "--no-enable-prefix-caching",
            "--load-format=dummy",
        ]
        if self.model in KINDS and "attention_backend" in (told := KINDS[self.model].engine_arguments):
            flags.append(f"--attention-backend={told['attention_backend']}")
        name = f"bench-{Path(resolve(self.model)).name}-{self.depth}-{MAX_MODEL_LEN}"
        return ServeConfig(model=str(cached_directory(name, self._write)), neutral=2, flags=tuple(flags))

    def _write(self, directory: Path) -> None:
        """Writes the model without its weights, for longer prompts, with the layers that are measured."""
        for file in Path(resolve(self.model)).iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, directory)
        config = self._model_config
        changes = {name: config[name] * self.depth for name in PER_LAYER if name in config}
        if "max_position_embeddings" in config:
            changes["max_position_embeddings"] = MAX_MODEL_LEN
        if "moe_layers" in config:
            changes["moe_layers"] = list(range(self.layers))
        config |= changes | {"num_hidden_layers": self.layers}
        (directory / "config.json").write_text(json.dumps(config))


def engine_kinds(names: list[str]) -> list[EngineKind]:
    """All services, or those of these models. Raises: PdServeError: an unknown name."""
    every = [
        EngineKind(model, workers, depth)
        for depth in DEPTHS
        for model, workers in (("tiny", 1), ("tiny", 2), *((name, 1) for name in KINDS))
    ]
    if unknown := set(names) - {kind.model for kind in every}:
        raise PdServeError(f"no such kind: {', '.join(sorted(unknown))}")
    return [kind for kind in every if not names or kind.model in names]


async def run(report: BenchmarkReport, names: list[str], rounds: int) -> None:
    """Measures one kind after the other, and writes after each. Takes a minute for each.

    Raises:
        PdServeError: A service did not start, or violates an invariant at the end.
    """
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"rows": rows, "verdict": {}}
    for kind in engine_kinds(names):
        service = InProcessService(kind.config)
        try:
            await service.start()
            rows += await _measure(service, kind, rounds, report.console)
        finally:
            await service.stop()
        result["verdict"] = _verdict(rows)
        report.write(result)
    report.show(_table(result))


async def _measure(
    service: InProcessService, kind: EngineKind, rounds: int, console: rich.console.Console
) -> list[dict[str, Any]]:
    bench = MigrationBenchmark(service, ("neutral-0", "neutral-1"))
    results = {length: LengthSamples() for length in LENGTHS}
    copied = dict.fromkeys(LENGTHS, 0.0)
    await bench.moves(LENGTHS[0], ["live"] * 4, LengthSamples())  # warm-up
    for _ in range(rounds):
        for length, samples in results.items():
            before = await _bytes_copied(service)
            await bench.moves(length, ["live"] * MOVES, samples)
            copied[length] += await _bytes_copied(service) - before
    problems = await service.api.frontend.check_integrity()
    if problems:
        raise PdServeError(f"{kind.name} violates an invariant after the benchmark: {problems}")
    rows = [
        _row(kind, length, samples, copied[length] / (rounds * MOVES)) for length, samples in results.items()
    ]
    for row in rows:
        console.print(row)
    return rows


async def _bytes_copied(service: InProcessService) -> float:
    """By all migrations so far."""
    import httpx

    transport = httpx.ASGITransport(app=service.api.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://bench") as client:
        text = (await client.get("/metrics")).text
    return sum(float(v) for v in re.findall(r"^pd_serve_migrated_bytes_total\{.*\} (\S+)$", text, re.M))


def _row(kind: EngineKind, length: int, samples: LengthSamples, copied: float) -> dict[str, Any]:
    itl, live = median(samples.normal), median(samples.gaps["live"])
    return {
        "kind": kind.name,
        "groups": KINDS[kind.model].groups if kind.model in KINDS else "full attention",
        "layers": kind.layers,
        "tokens": length,
        "itl_ms": round(itl, 3),
        "live_ms": round(live, 3),
        "live_over_itl": round(live / itl, 2),
        "source_step_ratio": round(median(samples.during) / itl, 3) if samples.during else None,
        "kib_copied": round(copied / 1024),
        "gaps_ms": [round(gap, 2) for gap in samples.gaps["live"]],
    }


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that have targets; see docs/benchmarks.md."""
    ratios = [row["source_step_ratio"] for row in rows if row["source_step_ratio"] is not None]
    live = {(row["kind"], row["layers"], row["tokens"]): row["live_ms"] for row in rows}
    workers = {
        f"two_workers_over_one_{layers}_layers_{length}": round(live_ms / live["tiny", layers, length], 2)
        for (kind, layers, length), live_ms in live.items()
        if kind == "tiny, 2 workers"
    }
    return {
        "worst_live_over_itl": max(row["live_over_itl"] for row in rows),
        "over_2": [
            f"{row['kind']}, {row['layers']} layers, {row['tokens']}"
            for row in rows
            if row["live_over_itl"] > 2
        ],
        "source_step_ratio": round(median(ratios), 3) if ratios else None,
    } | workers


def _table(result: dict[str, Any]) -> Table:
    columns = ("kind", "layers", "tokens", "ITL", "live", "live ÷ ITL", "source step ratio", "KiB copied")
    table = numbers_table("gap between two tokens of a moved request, ms (median)", *columns, labels=1)
    keys = (
        "kind",
        "layers",
        "tokens",
        "itl_ms",
        "live_ms",
        "live_over_itl",
        "source_step_ratio",
        "kib_copied",
    )
    for row in result["rows"]:
        table.add_row(*[str(row[key]) for key in keys])
    table.caption = "\n".join(f"{name}: {value}" for name, value in result["verdict"].items())
    return table

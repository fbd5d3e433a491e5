"""The benchmark of the data plane: its summary, and a run over small caches."""

import json
import sys
from pathlib import Path

import pytest

from loadtests.bench import busy_steps, links
from loadtests.bench.link_arms import MEMCPY, NIXL, OURS, PACED, NixlAlone
from loadtests.bench.link_memory import CacheLayout
from loadtests.bench.links import BUSY, REST, LinkTurn, summary
from loadtests.bench.report import BenchmarkReport
from pd_serve.errors import PdServeError

SMALL = CacheLayout("small", regions=2, row_bytes=64 << 10, blocks=16)


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_steps, "PRODUCTS_S", 0.001)
    monkeypatch.setattr(busy_steps, "PYTHON_S", 0.001)


def turns(*gb_per_s: float, steps_ms: tuple[float, ...] = ()) -> list[LinkTurn]:
    return [LinkTurn(one, list(steps_ms)) for one in gb_per_s]


def test_ratios_are_medians_over_the_rounds_of_the_ratios_of_a_round() -> None:
    busy = {
        MEMCPY: turns(8, 8, 8),
        NIXL: turns(4, 5, 1, steps_ms=(10, 20, 90)),
        OURS: turns(3, 5, 0.9, steps_ms=(30,)),
        PACED: turns(0.4, 0.4, 0.4),
    }

    of = summary({BUSY: busy})[BUSY]

    assert (of["gb_per_s"][NIXL], of["gb_per_s"][OURS]) == (4, 3)
    assert of["ratio_to_nixl"][OURS] == 0.9, "and not 3 ÷ 4"
    assert of["ratio_to_memcpy"][OURS] == 0.375
    assert of["samples"][OURS] == [3, 5, 0.9]
    assert of["step_ms"] == {MEMCPY: None, NIXL: 20, OURS: 30, PACED: None}


async def test_a_run_measures_every_way_at_rest_and_beside_steps(tmp_path: Path) -> None:
    file, interval = tmp_path / "links.json", sys.getswitchinterval()

    await links.run(BenchmarkReport(file), 2, layouts=[SMALL], sizes_mib=(1,), turn_s=0.0)

    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert (row["layout"], row["mib"], row["regions"], row["row_bytes"]) == ("small", 1, 2, 64 << 10)
    for when in (REST, BUSY):
        samples = row[when]["samples"]
        assert {arm: len(of) for arm, of in samples.items()} == dict.fromkeys((MEMCPY, NIXL, OURS, PACED), 2)
        assert all(one > 0 for of in samples.values() for one in of)
    assert sys.getswitchinterval() == interval


async def test_a_copy_that_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(self: NixlAlone) -> None:
        pass

    monkeypatch.setattr(NixlAlone, "read", read)

    with pytest.raises(PdServeError, match="NIXL alone: the blocks are not those"):
        await links.run(BenchmarkReport(None), 1, layouts=[SMALL], sizes_mib=(1,), turn_s=0.0)

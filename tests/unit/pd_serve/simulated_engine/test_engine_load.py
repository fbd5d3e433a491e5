"""The load report of a simulated engine."""

from migration.messages import RequestId
from pd_serve.simulated_engine.batcher import Batcher
from pd_serve.simulated_engine.contents import TokenPrompt
from pd_serve.simulated_engine.engine_load import read_load
from pd_serve.simulated_engine.migrations import SequenceMigrations
from pd_serve.simulated_engine.sequence import Sequence
from pd_serve.simulated_engine.settings import EngineSettings
from tests.unit.migration.migrating_cluster import ConstantSteps


def test_a_load_counts_running_waiting_suspended_and_arriving_requests() -> None:
    settings = EngineSettings(ConstantSteps(), num_blocks=64, block_tokens=4, max_num_seqs=1)
    batcher = Batcher(settings, lambda sequences: None)
    migrations = SequenceMigrations(batcher, {}, lambda sequence: False)
    for number in range(2):
        batcher.enqueue(Sequence(RequestId(str(number)), TokenPrompt([7] * 8), 10, -number, number, []))
    batcher.schedule(0.0)
    arriving = Sequence(RequestId("arriving"), TokenPrompt([7] * 8), 10, 0, 0.0, [])
    arriving.blocks = batcher.pool.allocate(5)
    migrations.arriving["m"] = arriving
    migrations.suspended["s"] = arriving

    load = read_load(batcher, migrations)

    assert (load.running, load.suspended, load.waiting) == (2, 1, 1)
    assert (load.waiting_tokens, load.waiting_blocks, load.head_of_line_blocks) == (8, 2, 2)
    assert (load.reserved_blocks, load.free_blocks, load.total_blocks) == (5, 64 - 2 - 5, 64)
    assert load.high_priority == 1

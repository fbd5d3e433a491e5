"""The engine that an instance gets."""

from migration.engine_interface import EngineEvents
from pd_serve.instance.engine_factory import create_engine
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine


async def test_simulated_settings_create_a_simulated_engine() -> None:
    settings = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=100)
    events = EngineEvents(
        on_prefill_started=lambda request_ids: None,
        on_requests_ended=lambda request_ids: None,
        on_load=lambda load: None,
        on_death=lambda error: None,
    )

    engine = create_engine({}, settings, lambda client, outputs, spans: None, events)

    assert isinstance(engine, SimulatedEngine)
    assert engine.facts.supported_tasks == ("generate",)
    await engine.stop()

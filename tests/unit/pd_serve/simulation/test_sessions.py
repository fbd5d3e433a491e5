"""Sessions: their requests, and their simulation with prefix caches."""

from dataclasses import replace

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import SimulationConfig, TraceRequest
from pd_serve.simulation.sessions import make_sessions, turns_of
from pd_serve.simulation.simulate import simulate
from pd_serve.simulation.workloads import TraceSpec, fitting, make_requests

ENGINE = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=400, prefix_caching=True)


def test_the_name_has_the_number_of_turns() -> None:
    names = ("sessions", "Sessions:7", "100:10+20:5", "s-s", "sessions:0", "100:10", "100:10+", "100:10+0:5")

    assert [len(turns_of(name)) for name in names] == [4, 7, 2, 0, 0, 0, 0, 0]


def test_a_turn_begins_with_the_last_prompt_and_its_answer() -> None:
    requests = make_requests(TraceSpec("sessions:3", 2.0, 12))

    assert len(requests) == 12
    for number, request in enumerate(requests):
        if request.turn_of is None:
            assert number % 3 == 0
        else:
            assert request.turn_of == number - 1
            before = requests[number - 1]
            assert request.prompt_tokens > before.prompt_tokens + before.output_tokens


def test_sessions_start_at_their_share_of_the_rate() -> None:
    requests = make_sessions(turns_of("sessions:4"), 4000, 8.0, None, seed=0)
    starts = [request.arrival_s for request in requests if request.turn_of is None]

    assert len(starts) / starts[-1] == pytest.approx(2.0, rel=0.1)


def test_turns_of_fixed_lengths_grow_by_answer_and_new_text() -> None:
    requests = make_requests(TraceSpec("2000:256+64:128", 2.0, 4))

    lengths = [(request.prompt_tokens, request.output_tokens) for request in requests]
    assert lengths == [(2000, 256), (2320, 128)] * 2
    assert [request.turn_of for request in requests] == [None, 0, None, 2]


def test_sessions_without_a_rate_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="a rate is needed"):
        make_requests(TraceSpec("sessions"))


def test_turns_after_one_that_does_not_fit_are_left_out() -> None:
    requests = [
        TraceRequest(0, 900, 50),
        TraceRequest(1, 1000, 50, turn_of=0),
        TraceRequest(1, 1100, 50, turn_of=1),
        TraceRequest(2, 100, 50),
        TraceRequest(1, 200, 50, turn_of=3),
    ]

    kept = fitting(requests, 1000)

    assert [(r.prompt_tokens, r.turn_of) for r in kept] == [(900, None), (100, None), (200, 1)]


@pytest.mark.parametrize("instances", [{"neutral": 1}, {"prefill": 1, "decode": 1}], ids=["neutral", "pd"])
def test_later_turns_arrive_after_the_answer_and_every_token_is_right(instances: dict[str, int]) -> None:
    requests = fitting(make_requests(TraceSpec("sessions:3", 2.0, 24, seed=1)), 6000)

    result = simulate(SimulationConfig(requests, instances, "llumnix", {"neutral": ENGINE}))

    assert not any(record.failed or record.lost or record.wrong for record in result.records)
    assert (result.leaked_blocks, result.integrity) == (0, [])
    for number, request in enumerate(requests):
        if request.turn_of is not None:
            before = result.records[request.turn_of]
            arrived = result.records[number].request.arrival_s
            assert arrived == pytest.approx(before.last_token_s + request.arrival_s)


def test_outputs_enter_the_prefix_cache_of_the_next_turn() -> None:
    """2,000 tokens of prompt and answer are cached; only the new text is computed."""
    requests = [TraceRequest(0, 1000, 1000), TraceRequest(1.0, 2100, 2, turn_of=0)]

    seconds = []
    for caching in (True, False):
        engine = replace(ENGINE, prefix_caching=caching)
        result = simulate(SimulationConfig(requests, {"neutral": 1}, "llumnix", {"neutral": engine}))
        seconds.append(result.records[1].prefill_s)

    model = COST_MODELS["a10-llama-7b"]
    assert seconds[0] == pytest.approx(model.prefill_s([(2100 - 1984, 1984)]), abs=0.02)
    assert seconds[1] == pytest.approx(model.prefill_s([(2100, 0)]), abs=0.02)

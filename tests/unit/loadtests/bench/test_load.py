"""Requests and prompts of a round."""

import random

from loadtests.bench.load import Lengths, Load

LENGTHS = Lengths((64, 512), (16, 224), long_prompt=(1024, 1792), long_share=0.1)


def test_a_load_has_the_same_requests_for_the_same_seed() -> None:
    steady, full = Load("steady", 200, LENGTHS, rate=10.0), Load("full", 200, LENGTHS, num_clients=4)

    requests = steady.requests(1)

    assert requests == steady.requests(1) != steady.requests(2)
    assert 10 < requests[-1].arrival_s < 30
    assert all(16 <= one.output_tokens <= 224 for one in requests)
    assert 0 < sum(one.prompt_tokens >= 1024 for one in requests) < 60
    assert all(64 <= one.prompt_tokens <= 1792 for one in requests)
    assert {one.arrival_s for one in full.requests(1)} == {0.0}


def test_prompts_have_the_lengths_of_the_requests_as_token_ids_or_text() -> None:
    as_ids, as_text = (Load("l", 20, LENGTHS, num_clients=2, as_text=as_text) for as_text in (False, True))
    lengths = [request.prompt_tokens for request in as_ids.requests(1)]

    assert [len(prompt) for prompt in as_ids.prompts(1)] == lengths
    assert as_text.prompts(1) == [bytes(prompt).decode() for prompt in as_ids.prompts(1)]
    assert as_ids.prompts(1) == as_ids.prompts(1) != as_ids.prompts(2)


def test_the_turns_of_a_session_follow_each_other_and_bring_new_text_only() -> None:
    load = Load("turns", 5, Lengths((10, 20), (3, 5)), num_clients=2, as_text=True, turns=3)

    requests, prompts = load.requests(1), load.prompts(1)

    assert [request.turn_of for request in requests] == [None, 0, 1, None, 3, 4]
    assert all(10 <= len(prompt) <= 20 for prompt in prompts)
    for number, request in enumerate(requests):
        known = 0
        if request.turn_of is not None:
            known = requests[number - 1].prompt_tokens + requests[number - 1].output_tokens
        assert request.prompt_tokens == known + len(prompts[number])


def test_a_share_of_the_answers_is_long() -> None:
    requests = Load("skewed", 200, Lengths((5, 9), (1, 2), long_share=0.1, long_output=(600, 700))).requests(
        1
    )

    outputs = [request.output_tokens for request in requests]
    assert 5 < sum(output >= 600 for output in outputs) < 40
    assert {output for output in outputs if output < 600} == {1, 2}
    assert all(5 <= request.prompt_tokens <= 9 for request in requests)


def test_equal_lengths_do_not_vary() -> None:
    assert {Lengths.equal(128, 32).draw(random.Random(n)) for n in range(20)} == {(128, 32)}

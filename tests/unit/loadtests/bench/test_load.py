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


def test_equal_lengths_do_not_vary() -> None:
    assert {Lengths.equal(128, 32).draw(random.Random(n)) for n in range(20)} == {(128, 32)}

"""The numbers of `bench multi-turn`, from what vLLM's script writes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from loadtests.bench import multi_turn
from loadtests.bench.arms import PLAIN, Arm, ArmBuilder
from loadtests.servers import SharedSettings


def request(turn: int, ttft_ms: float, conversation: str = "a") -> dict[str, Any]:
    times = {"ttft_ms": ttft_ms, "tpot_ms": 5.0, "latency_ms": 500.0}
    return {"input_num_turns": turn, "conversation_id": conversation, **times}


def one_round(first_ms: float, later_ms: float, answer: str) -> dict[str, Any]:
    answers = [
        {"id": "b", "messages": ["?", answer]},
        {"id": "a", "messages": ["?", "same", "??", "too"]},
        {"id": "left", "messages": ["?", "made", "??", answer]},
    ]
    requests = [request(1, first_ms, "b"), *[request(3, later_ms)] * 2, request(3, later_ms, "left")]
    return {"requests": requests, "answers": answers}


def test_first_and_later_turns_are_told_apart() -> None:
    found = multi_turn.figures([request(1, 100.0), request(3, 10.0), request(5, 30.0)])

    assert found["first_ttft_p50_ms"] == 100.0
    assert found["later_ttft_p50_ms"] == 20.0
    assert found["requests"] == 3


def test_ratios_are_medians_over_rounds_and_conversations_are_compared_by_name() -> None:
    plain = [one_round(100, 50, "x"), one_round(100, 50, "y"), one_round(100, 50, "z")]
    ours = [one_round(100, 25, "x"), one_round(200, 10, "other"), one_round(50, 5, "z")]
    ours[0]["answers"].reverse()

    found = multi_turn.summary(ours, plain)

    assert found["ratio_to_round_robin"]["later_ttft_p50_ms"] == 0.2
    assert found["ratio_to_round_robin"]["first_ttft_p50_ms"] == 1.0
    assert found["equal_conversations"] == [5, 6]


def test_an_arm_that_lost_a_conversation_is_not_compared() -> None:
    short = one_round(1, 1, "x")
    short["answers"].pop()

    with pytest.raises(ValueError, match="lost a conversation"):
        multi_turn.summary([short], [one_round(1, 1, "x")])


def test_conversations_that_one_of_two_arms_has_not_ended_are_not_compared() -> None:
    short = one_round(1, 1, "other")
    short["requests"] = [one for one in short["requests"] if one["conversation_id"] != "b"]
    short["requests"].append(request(1, 1, "left"))

    assert multi_turn.summary([short], [one_round(1, 1, "x")])["equal_conversations"] == [1, 1]


def test_rounds_have_texts_of_their_own_and_fit_the_model(tmp_path: Path) -> None:
    loads = [json.loads(multi_turn._write_load(tmp_path, number, 6).read_text()) for number in (0, 1)]
    texts = [Path(load["text_files"][0]).read_text() for load in loads]

    prompt, output = loads[0]["prompt_input"], loads[0]["prompt_output"]
    pairs = prompt["num_turns"]["max"] // 2
    most = prompt["common_prefix_num_tokens"]["value"] + prompt["prefix_num_tokens"]["max"]
    most += pairs * (prompt["num_tokens"]["max"] + output["num_tokens"]["max"])
    assert texts[0] != texts[1]
    assert most < 0.9 * multi_turn.ENGINE["max_model_len"]


def test_every_arm_is_one_of_the_comparison() -> None:
    settings = SharedSettings("model", [], {})
    ports = random.Random(1)
    arms: list[Arm] = ArmBuilder(settings, Path(), lambda: ports.randint(1024, 65535)).all_arms(3)

    assert set(multi_turn.ARMS) <= {arm.name for arm in arms}
    assert PLAIN in multi_turn.ARMS

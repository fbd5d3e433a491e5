"""Prefix-aware dispatch."""

import random

from router.dispatch.prefix import LongestPrefix
from router.load import InstanceLoad
from router.request import PREFIX_TOKENS, NewRequest
from tests.unit.router.made_loads import prefill

RNG = random.Random(0)


def prompt(*keys: int) -> NewRequest:
    return NewRequest((len(keys) + 1) * PREFIX_TOKENS, prefix_keys=keys)


def pool(*backlogs: int) -> list[InstanceLoad]:
    return [prefill(f"p{number}", tokens) for number, tokens in enumerate(backlogs)]


def chosen_by(policy: LongestPrefix, loads: list[InstanceLoad], request: NewRequest) -> str | None:
    chosen = policy.choose(loads, request, RNG)
    return chosen and chosen.instance_id


def test_the_instance_with_the_longest_prefix_is_preferred() -> None:
    policy = LongestPrefix()
    assert chosen_by(policy, pool(0, 1), prompt(1)) == "p0"
    assert chosen_by(policy, pool(1, 0), prompt(1, 2)) == "p0"
    assert chosen_by(policy, pool(1000, 0), prompt(1, 2, 3)) == "p1"  # not at any price

    assert chosen_by(policy, pool(1, 0), prompt(1, 2)) == "p1"
    assert chosen_by(policy, pool(128, 0), prompt(1, 9)) == "p1"
    assert chosen_by(policy, pool(0, 128), prompt(1, 2, 3)) == "p0"  # the saving just equals the backlog
    assert chosen_by(policy, pool(0, 127), prompt(5)) == "p0"  # an unknown prompt


def test_only_a_common_beginning_needs_no_computing() -> None:
    policy = LongestPrefix()
    chosen_by(policy, pool(0, 1), prompt(1, 2))

    assert policy.work(prefill("p0"), prompt(7, 8)) == 3 * PREFIX_TOKENS
    assert policy.work(prefill("p0"), prompt(1, 7)) == 2 * PREFIX_TOKENS
    assert policy.work(prefill("p0"), prompt(1, 2)) == PREFIX_TOKENS


def test_prefixes_that_no_longer_fit_the_blocks_are_forgotten_from_their_end() -> None:
    policy = LongestPrefix()
    (load,) = pool(0)  # 100 blocks of 16 tokens hold 12 prefixes
    chosen_by(policy, [load], prompt(*range(10)))
    chosen_by(policy, [load], prompt(*range(100, 110)))

    assert policy.work(load, prompt(*range(100, 110))) == PREFIX_TOKENS
    assert policy.work(load, prompt(*range(10))) == (11 - 2) * PREFIX_TOKENS


def test_instances_that_are_gone_are_forgotten() -> None:
    policy = LongestPrefix()
    for number in range(10):
        chosen_by(policy, [prefill(f"p{number}")], prompt(number))

    assert len(policy._held) <= 2

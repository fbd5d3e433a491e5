"""Which instance changes sides."""

from collections.abc import Mapping

from msgspec.structs import replace

from router.load import InstanceLoad
from router.policies import policy_set
from router.scaling import Drain, PoolBounds
from router.scaling.role_switch import RoleSwitch, SwitchRole


class Roles:
    """Looked at once per second."""

    def __init__(self, bounds: Mapping[str, PoolBounds] | None = None) -> None:
        self.roles = RoleSwitch(policy_set("llumnix", roles=1), bounds or {})
        self.now = 0.0

    def look(self, *loads: InstanceLoad, seconds: int = 1) -> list[SwitchRole | Drain]:
        decisions: list[SwitchRole | Drain] = []
        for _ in range(seconds):
            self.now += 1.0
            decisions += self.roles.decide(loads, self.now)
        return decisions


def prefill(name: str, waiting_tokens: int = 0, free: int = 851, **other: int) -> InstanceLoad:
    waiting = int(waiting_tokens > 0)
    return InstanceLoad(
        name,
        "prefill",
        total_blocks=851,
        free_blocks=free,
        waiting=waiting,
        waiting_tokens=waiting_tokens,
        **other,
    )


def decode(name: str, free: int = 851, running: int = 0, **other: int) -> InstanceLoad:
    return InstanceLoad(name, "decode", total_blocks=851, free_blocks=free, running=running, **other)


BEHIND = prefill("p0", 50_000)
FULL = decode("d0", 0, 90)


def said(decisions: list[SwitchRole | Drain]) -> list[tuple[str, object]]:
    return [(d.instance_id, d.role if isinstance(d, SwitchRole) else d.draining) for d in decisions]


def test_an_idle_decode_instance_helps_to_prefill() -> None:
    roles = Roles()

    assert roles.look(BEHIND, decode("d0", 800, 1), decode("d1"), seconds=10) == []
    (exchange,) = roles.look(BEHIND, decode("d0", 800, 1), decode("d1"))
    assert exchange == SwitchRole("d1", "prefill", exchange.reason)
    assert "50000 prompt tokens wait" in exchange.reason


def test_an_idle_prefill_instance_helps_to_decode() -> None:
    assert said(Roles().look(FULL, prefill("p0"), prefill("p1"), seconds=11)) == [("p0", "decode")]


def test_requests_that_prefill_instances_are_left_with_are_load_of_the_decode_pool() -> None:
    half = decode("d0", 500, 20)

    assert Roles().look(half, prefill("p0", running=1), prefill("p1"), seconds=11) == []
    holding = prefill("p0", free=451, running=20)
    assert said(Roles().look(half, holding, prefill("p1"), seconds=11)) == [("p1", "decode")]


def test_a_short_wave_switches_no_role() -> None:
    """Short gaps do not make a long wave short."""
    roles = Roles()
    decodes = decode("d0"), decode("d1")
    roles.look(BEHIND, *decodes, seconds=5)
    assert roles.look(prefill("p0"), *decodes, seconds=12) == []
    assert roles.look(BEHIND, *decodes, seconds=9) == []
    assert roles.look(prefill("p0"), *decodes) == []
    assert said(roles.look(BEHIND, *decodes)) == [("d0", "prefill")]


def test_a_pool_is_never_emptied() -> None:
    assert Roles().look(BEHIND, decode("d0"), seconds=60) == []
    assert Roles().look(prefill("p0"), FULL, seconds=60) == []
    assert Roles().look(decode("d0"), decode("d1"), seconds=60) == []
    assert Roles().look(BEHIND, decode("d0"), replace(decode("d1"), draining=True), seconds=60) == []


def test_a_switch_keeps_the_bounds_of_both_pools() -> None:
    loads = BEHIND, decode("d0"), decode("d1")

    assert Roles({"decode": PoolBounds(2, 4)}).look(*loads, seconds=60) == []
    assert Roles({"prefill": PoolBounds(1, 1)}).look(*loads, seconds=60) == []
    assert Roles({"decode": PoolBounds(1, 4), "prefill": PoolBounds(1, 2)}).look(*loads, seconds=11)


def test_two_short_or_two_ample_pools_switch_no_role() -> None:
    assert Roles().look(BEHIND, FULL, decode("d1", 0, 90), seconds=60) == []
    assert Roles().look(prefill("p0"), prefill("p1"), decode("d0"), decode("d1"), seconds=60) == []


def test_if_no_instance_is_idle_one_is_drained_first() -> None:
    roles = Roles()
    d0, d1 = decode("d0", 820, 2), decode("d1", 830, 1)
    assert said(roles.look(BEHIND, d0, d1, seconds=11)) == [("d1", True)]

    draining = replace(d1, draining=True)
    assert roles.look(BEHIND, d0, draining, seconds=20) == []
    empty = replace(draining, free_blocks=851, running=0)
    assert said(roles.look(BEHIND, d0, empty)) == [("d1", "prefill"), ("d1", False)]


def test_an_instance_drained_to_switch_is_used_again_when_the_wave_is_over() -> None:
    roles = Roles()
    d0, d1 = decode("d0", 820, 2), decode("d1", 830, 1)
    roles.look(BEHIND, d0, d1, seconds=11)
    draining = replace(d1, draining=True)

    assert roles.look(prefill("p0"), d0, draining, seconds=9) == []
    assert said(roles.look(prefill("p0"), d0, draining, seconds=2)) == [("d1", False)]
    assert roles.look(prefill("p0"), d0, draining, seconds=30) == []


def test_an_instance_that_an_operator_drains_is_not_switched() -> None:
    loads = BEHIND, decode("d0", 700, 1), replace(decode("d1"), draining=True), decode("d2", 700, 1)

    assert Roles().look(*loads, seconds=30) == []
    scaled = Roles({"decode": PoolBounds(1, 4)})
    assert said(scaled.look(*loads, seconds=11)) == [("d1", "prefill"), ("d1", False)]


def test_a_switched_instance_is_not_switched_back_under_the_same_load() -> None:
    """After the exchange, with the same work, no pool asks for the instance back."""
    roles = Roles()
    loads = [prefill("p0", 30_000), decode("d0", 700, 2), decode("d1")]
    assert said(roles.look(*loads, seconds=11)) == [("d1", "prefill")]

    after = [prefill("p0", 15_000), prefill("d1", 15_000), decode("d0", 700, 2)]
    assert roles.look(*after, seconds=60) == []
    assert roles.look(prefill("p0"), prefill("d1"), decode("d0", 700, 2), seconds=60) == []

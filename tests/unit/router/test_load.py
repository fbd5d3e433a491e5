"""What a load says, and how requests change it."""

from msgspec.structs import replace

from router.freeness import freeness
from router.load import InstanceLoad
from tests.unit.router.made_loads import decode, neutral

LOAD = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=60, running=4)


def test_the_mean_size_of_requests_is_rounded_up() -> None:
    assert neutral("i0", 40, 4).mean_blocks == 15
    assert decode("i0", 100, 0).mean_blocks == 0


def test_a_departure_undoes_an_arrival() -> None:
    taken = replace(LOAD, free_blocks=40, running=5)

    assert freeness(taken.with_departures(20)) == freeness(LOAD)


def test_an_instance_is_empty_without_requests_and_migrations() -> None:
    idle = decode("d0", running=0)

    assert idle.is_empty
    for busy in ({"running": 1}, {"waiting": 1}, {"migrating_in": 1}, {"migrating_out": 1}):
        assert not replace(idle, **busy).is_empty

"""Loads for tests: by role, and at random."""

from hypothesis import strategies as st
from msgspec.structs import replace

from router.load import InstanceLoad

ROLES = ("prefill", "decode", "neutral")


def neutral(name: str, free: int = 100, running: int = 1, *, total: int = 100, **other: int) -> InstanceLoad:
    return InstanceLoad(name, "neutral", total_blocks=total, free_blocks=free, running=running, **other)


def prefill(
    name: str, waiting_tokens: int = 0, *, total: int = 100, free: int = 100, **other: int | bool
) -> InstanceLoad:
    return InstanceLoad(
        name, "prefill", total_blocks=total, free_blocks=free, waiting_tokens=waiting_tokens, **other
    )


def decode(name: str, free: int = 100, running: int = 1, *, total: int = 100, **other: int) -> InstanceLoad:
    return InstanceLoad(name, "decode", total_blocks=total, free_blocks=free, running=running, **other)


@st.composite
def loads(draw: st.DrawFn, name: str = "i0", role: str | None = None) -> InstanceLoad:
    """One that adds up: what is queued behind the head of the line is part of what is queued."""
    total = draw(st.integers(1, 1000))
    waiting = draw(st.integers(0, 8))
    head = draw(st.integers(1, total)) if waiting else 0
    return InstanceLoad(
        name,
        role or draw(st.sampled_from(ROLES)),
        total_blocks=total,
        free_blocks=draw(st.integers(0, total)),
        running=draw(st.integers(0, 16)),
        waiting=waiting,
        waiting_tokens=draw(st.integers(0, 1000)) if waiting else 0,
        head_of_line_blocks=head,
        draining=draw(st.booleans()),
        requests_added=draw(st.integers(0, 100)),
        waiting_blocks=head + draw(st.integers(0, 100)) if waiting > 1 else head,
        watermark_blocks=total // 100,
    )


@st.composite
def clusters(draw: st.DrawFn, role: str | None = None, least: int = 0) -> list[InstanceLoad]:
    return [draw(loads(f"i{number}", role)) for number in range(draw(st.integers(least, 6)))]


def scaled(load: InstanceLoad, factor: int) -> InstanceLoad:
    """The same instance with everything that is counted in blocks or tokens that much larger."""
    return replace(
        load,
        total_blocks=load.total_blocks * factor,
        free_blocks=load.free_blocks * factor,
        head_of_line_blocks=load.head_of_line_blocks * factor,
        waiting_blocks=load.waiting_blocks * factor,
        waiting_tokens=load.waiting_tokens * factor,
        watermark_blocks=load.watermark_blocks * factor,
        expected_blocks=load.expected_blocks * factor,
    )

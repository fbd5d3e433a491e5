"""The operator is told when Ray's head is absent, and when it is back; a service ends with its own Ray."""

import asyncio
from collections.abc import Callable

import pytest

from pd_serve.errors import PdServeError
from pd_serve.manager.ray_head import ABSENT, ABSENT_S, ASK_INTERVAL_S, end_with_ray, watch_head
from tests.virtual_time import in_virtual_time


class Notices:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def warn(self, text: str) -> None:
        self.seen.append(text)

    def step(self, text: str) -> None:
        self.seen.append(text)


class Head:
    """Answers, refuses, or does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.present = asyncio.Event()
        self.present.set()
        self.refuses = False
        monkeypatch.setattr(asyncio, "to_thread", self._in_thread)

    def ask(self) -> None:
        if self.refuses:
            raise RuntimeError("failed to connect to all addresses")

    async def _in_thread(self, call: Callable[[], None]) -> None:
        await self.present.wait()
        call()


@in_virtual_time
async def test_an_absent_head_is_shown_once_and_its_return_too() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        head, notices = Head(monkeypatch), Notices()
        watch = asyncio.ensure_future(watch_head(notices, head.ask))
        await asyncio.sleep(10 * ASK_INTERVAL_S)
        assert notices.seen == []

        head.present.clear()
        await asyncio.sleep(10 * ABSENT_S)
        assert notices.seen == [ABSENT]

        head.refuses = True
        head.present.set()
        await asyncio.sleep(10 * ASK_INTERVAL_S)
        assert notices.seen == [ABSENT]

        head.refuses = False
        await asyncio.sleep(2 * ASK_INTERVAL_S)
        assert notices.seen == [ABSENT, "Ray's head answers again"]
        watch.cancel()
        await asyncio.wait([watch])


@in_virtual_time
async def test_a_service_ends_when_its_ray_and_all_instances_have() -> None:
    instances, lives = ["decode-0"], True
    ending = asyncio.ensure_future(end_with_ray(lambda: len(instances), lambda: lives))

    await asyncio.sleep(10 * ASK_INTERVAL_S)
    instances.clear()  # all have died, and others start
    await asyncio.sleep(10 * ASK_INTERVAL_S)
    instances.append("decode-1")
    lives = False  # its streams go on
    await asyncio.sleep(10 * ASK_INTERVAL_S)
    assert not ending.done()

    instances.clear()
    with pytest.raises(PdServeError, match="Ray has ended"):
        await asyncio.wait_for(ending, 2 * ASK_INTERVAL_S)

"""Load reports of several instances come over connections of their own."""

import asyncio
from random import Random

from loadtests.bench.report_senders import ReportSenders
from loadtests.bench.scale import busy_loads
from pd_serve.comm.messages import LoadReport, ToApiServer
from pd_serve.comm.wire import CurveKeys, Wire


async def test_every_instance_reports_again_and_again() -> None:
    keys, loads = CurveKeys.generate(), busy_loads(4, Random(0))
    received: list[tuple[str, object]] = []
    wire = Wire("api", "127.0.0.1", keys)
    address = wire.listen(ToApiServer, lambda sender, message, payload: received.append((sender, message)))

    async with ReportSenders(keys, loads, interval_s=0.05) as senders:
        await senders.begin(address)
        async with asyncio.timeout(30):
            while len(received) < 4 * 4:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await senders.end() >= 4
    await wire.close()

    assert {sender for sender, _ in received} == {load.instance_id for load in loads}
    reported = {sender: message.load for sender, message in received if isinstance(message, LoadReport)}
    assert reported == {load.instance_id: load for load in loads}

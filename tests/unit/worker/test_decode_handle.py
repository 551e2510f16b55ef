"""The time that a decoder has for a track."""

import asyncio

from worker.decode.handle import _Clock


async def test_time_that_a_decoder_has_used_stays_used_whenever_it_waits() -> None:
    over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    clock = _Clock(1.0, 30.0, over.set_result)
    for _ in range(2):
        clock.run()
        await asyncio.sleep(0.3)
        clock.stop()
        await asyncio.sleep(0.5)
        assert not over.done()

    clock.run()
    async with asyncio.timeout(0.8):
        stalled = await over
    assert not stalled

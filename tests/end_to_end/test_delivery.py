"""Nothing is lost: the quick form of the faults in `tests/faults`, each on real parts.

`make faults` runs the long form of these and the others.
"""

import asyncio

import pytest

from tests.faults import delivery, growth, services, stages
from tests.faults.scenarios import Run, named
from tests.faults.stand import Failed, Stand

FAULTS: list[Run] = [
    delivery.kill9,
    delivery.redelivery,
    delivery.rebalance,
    delivery.freeze,
    delivery.sigterm,
    services.broker_restart,
    services.redis_stopped,
    services.result_too_large,
    stages.hang_fetch,
    stages.hang_decode,
    stages.hang_device,
    stages.hang_redis,
    stages.hang_produce,
    stages.device_failing,
    stages.device_lost,
    stages.decoder_killed,
    stages.corrupt_bundle,
    growth.long_track,
]


@pytest.mark.parametrize("fault", FAULTS, ids=named)
async def test_every_event_ends_in_tags_or_a_dead_letter(stand: Stand, fault: Run) -> None:
    outcome = await fault(stand, True)

    assert outcome.verdict.lost == 0
    assert outcome.verdict.differing == 0
    assert outcome.verdict.tags + outcome.verdict.dead_letters <= outcome.verdict.events


async def test_a_fault_that_fails_with_its_service_down_says_why_and_leaves_it_to_the_next(
    stand: Stand,
) -> None:
    async def fail() -> None:
        async with stand.lane("failing"):
            await asyncio.to_thread(stand.redis.stop)
            raise Failed("tags flow without it")

    with pytest.raises(Failed, match="tags flow"):
        await fail()

    assert stand.redis.running

import asyncio

import pytest

from worker.kafka.place import Place, Places


def place_of(places: Places, earlier: "asyncio.Task[None] | None" = None) -> Place:
    return Place(places, earlier, progressed=lambda: None)


async def test_an_event_that_rests_lends_its_place_and_takes_it_again() -> None:
    places = Places(1)
    await places.free.acquire()
    place = place_of(places)
    resting = asyncio.create_task(place.rest(0.05))
    await asyncio.sleep(0)
    assert place.resting
    async with asyncio.timeout(1):
        await places.free.acquire()
    await asyncio.sleep(0.1)
    assert not resting.done(), "another has the place"
    places.free.release()
    await resting
    assert places.free.locked()


async def test_a_rest_that_a_deadline_ends_leaves_without_a_place_until_it_is_taken() -> None:
    places = Places(1)
    await places.free.acquire()
    place = place_of(places)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await place.rest(10)
    assert not places.free.locked()
    await place.take()
    assert places.free.locked()
    place.leave()
    place.leave()
    assert not places.free.locked()


async def test_its_turn_comes_once_the_earlier_event_of_its_key_has_ended() -> None:
    places, go = Places(1), asyncio.Event()
    await places.free.acquire()

    async def work() -> None:
        await go.wait()

    earlier = asyncio.create_task(work())
    place = place_of(places, earlier)
    turn = asyncio.create_task(place.turn())
    await asyncio.sleep(0.01)
    assert not turn.done()
    assert not places.free.locked(), "others have the place meanwhile"
    go.set()
    await turn
    assert places.free.locked()

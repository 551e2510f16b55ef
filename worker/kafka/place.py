"""Places in flight: how many events are worked on at once, and who waits without holding one.

An event that only waits (between two attempts, or for an earlier one of its key) lends its place to
others, so that few slow servers don't take them all.
"""

import asyncio
from collections.abc import Awaitable, Callable

MAX_RESTING = 512  # their messages are in memory


class Places:
    """The places in flight of one topic that are free, and how many more may rest without one."""

    def __init__(self, count: int) -> None:
        self.free = asyncio.Semaphore(count)
        self.may_rest = asyncio.Semaphore(MAX_RESTING)


class Place:
    """An event's place in flight, as its handler knows it; already taken by whoever makes this.

    `earlier` works on the event before it of the same key.
    """

    def __init__(
        self, places: Places, earlier: "asyncio.Task[None] | None", progressed: Callable[[], None]
    ) -> None:
        self._places = places
        self._earlier = earlier
        self._progressed = progressed
        self._held = True
        self.resting = False

    async def turn(self) -> None:
        """Wait until no earlier event of the same key is in flight: a track's results are published
        in the order of its events, so that the last is the newest. Others have the place meanwhile.
        """
        if self._earlier is not None and not self._earlier.done():
            await self._lend(self.earlier_ended())

    async def earlier_ended(self) -> None:
        """Wait until no earlier event of the same key is in flight."""
        if self._earlier is not None:
            await asyncio.wait({self._earlier})

    async def rest(self, duration_s: float) -> None:
        """Sleep between two attempts; that the one has ended is progress."""
        self._progressed()
        await self.wait(duration_s)

    async def wait(self, duration_s: float) -> None:
        """Sleep, and let others have the place for that long, unless too many rest already."""
        if not self._places.may_rest.locked():
            async with self._places.may_rest:
                await self._lend(asyncio.sleep(duration_s))
            return
        self.resting = True
        await asyncio.sleep(duration_s)
        await self.take()

    async def _lend(self, wait: Awaitable[object]) -> None:
        self.resting = True
        self.leave()
        await wait
        await self.take()

    async def take(self) -> None:
        """Take the place again, if it is not held: a deadline may have ended a rest without it."""
        if not self._held:
            await self._places.free.acquire()
            self._held = True
        self.resting = False

    def leave(self) -> None:
        """Give the place back, if it is held."""
        if self._held:
            self._held = False
            self._places.free.release()

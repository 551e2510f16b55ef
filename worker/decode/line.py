"""The line for decoder processes: whose track is decoded next."""

import asyncio
from collections import deque

from schemas.events import Priority
from worker.decode.handle import DecoderProcess

# While both wait, one track in so many is backfill, as one window in so many is in a batch.
BACKFILL_TURN = 10


class Line:
    """Tracks that wait for a decoder, and decoders that wait for a track.

    Uploads come before backfill, each in their own order. Backfill holds at most `most_backfill`
    decoders, so that an upload never waits for one of its long tracks, and has a turn now and then,
    so that uploads without end don't starve it.
    """

    def __init__(self, most_backfill: int) -> None:
        self._most_backfill = most_backfill
        self._waiting: dict[Priority, deque[asyncio.Future[DecoderProcess]]] = {
            "upload": deque(),
            "backfill": deque(),
        }
        self._idle: deque[DecoderProcess] = deque()
        self._backfill_held = 0
        self._uploads_in_a_row = 0

    @property
    def waiting(self) -> bool:
        """Whether a track waits that might be given a decoder."""
        return self._next() is not None

    async def take(self, priority: Priority) -> DecoderProcess:
        """Wait for a decoder; `leave` gives up the right to it."""
        future: asyncio.Future[DecoderProcess] = asyncio.get_running_loop().create_future()
        self._waiting[priority].append(future)
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():  # it was served in the same moment
                self.leave(priority)
                self.give(future.result())
            raise

    def leave(self, priority: Priority) -> None:
        """The track is done with its decoder, which may or may not be given to others."""
        if priority == "backfill":
            self._backfill_held -= 1
        self._serve()

    def give(self, process: DecoderProcess) -> None:
        """A decoder that is free; a spare that nobody waits for ends."""
        if process.spare and not self.waiting:
            process.kill()
            return
        self._idle.append(process)
        self._serve()

    def _serve(self) -> None:
        while (priority := self._next()) and (process := self._free()):
            self._waiting[priority].popleft().set_result(process)
            if priority == "backfill":
                self._backfill_held += 1
                self._uploads_in_a_row = 0
            else:
                self._uploads_in_a_row += 1

    def _next(self) -> Priority | None:
        for futures in self._waiting.values():
            while futures and futures[0].cancelled():
                futures.popleft()
        backfill = self._waiting["backfill"] and self._backfill_held < self._most_backfill
        if backfill and (
            not self._waiting["upload"] or self._uploads_in_a_row >= BACKFILL_TURN - 1
        ):
            return "backfill"
        return "upload" if self._waiting["upload"] else None

    def _free(self) -> DecoderProcess | None:
        while self._idle:
            process = self._idle.popleft()
            if not process.ended.is_set():  # else it died while idle, and another is started
                return process
        return None

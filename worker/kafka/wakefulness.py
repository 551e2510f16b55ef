"""Whether this process stood still, as one that is stopped (SIGSTOP) or swapped out does."""

import asyncio
import time

LOOK_EVERY_S = 0.5


class Wakefulness:
    """Notes when the process woke after standing still for more than `lapse_s`."""

    def __init__(self, lapse_s: float) -> None:
        self._lapse_s = lapse_s
        self._seen_s = self._woken_s = time.monotonic()

    def lapsed(self, since_s: float) -> bool:
        """Whether it stood still for so long at some time since then (`time.monotonic`)."""
        self._look()
        return since_s < self._woken_s

    async def watch(self) -> None:
        """Look at the clock until cancelled."""
        while True:
            self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._seen_s > self._lapse_s:
            self._woken_s = now_s
        self._seen_s = now_s

"""Waiting for what comes true in its own time."""

import asyncio
from collections.abc import Awaitable, Callable


async def until(
    condition: Callable[[], object | Awaitable[object]], *, timeout_s: float = 60.0
) -> None:
    """Wait for a condition, which may be a coroutine; raises `TimeoutError` after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.01)

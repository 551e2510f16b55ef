"""The least rate at which audio must arrive."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Sized
from typing import TypeVar

from worker.errors import FetchTooSlow
from worker.fetch.addresses import shown
from worker.settings import FetchSettings

Piece = TypeVar("Piece", bound=Sized)


async def paced(
    pieces: AsyncIterable[Piece], uri: str, settings: FetchSettings
) -> AsyncGenerator[Piece, None]:
    """The pieces as they arrive; raises `FetchTooSlow` where they arrive too slowly.

    What counts is the time spent waiting for the sender, not what is done between pieces. A
    `TimeoutError` is one that sends no piece for `stall_timeout_s`: its client's own timeout would
    wait on where bytes come that are none of the audio, such as a chunk's extensions.

    Parameters
    ----------
    pieces
        Each must come as soon as its bytes do: who waits for more of them before the next piece
        hides a sender that drips.
    uri
        Where they come from, for the message.
    """
    least_per_s, window_s = settings.min_bytes_per_s, settings.stall_timeout_s
    received_bytes, waited_s, coming = 0, 0.0, aiter(pieces)
    while True:
        since_s = time.monotonic()
        async with asyncio.timeout(window_s):
            piece = await anext(coming, None)
        if piece is None:
            return
        received_bytes += len(piece)
        waited_s += time.monotonic() - since_s
        if waited_s >= window_s:
            if received_bytes < least_per_s * waited_s:
                raise FetchTooSlow(
                    f"{shown(uri)} sent {received_bytes} bytes in {waited_s:.1f} s, less than "
                    f"{least_per_s} a second; retry when its server is faster, or lower "
                    "TIMBRE_FETCH__MIN_BYTES_PER_S."
                )
            received_bytes, waited_s = 0, 0.0
        yield piece

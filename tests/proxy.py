"""A port before another one, for tests of what lies between a client and its server."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import cast

from worker.services.service import HOST


def _never(_: bytes) -> bool:
    return False


@asynccontextmanager
async def proxy(
    port: int,
    *,
    context: ssl.SSLContext | None = None,
    stalls: Callable[[bytes], bool] = _never,
) -> AsyncIterator[int]:
    """A port before one of this machine, over TLS where a context is given.

    A connection whose client sends what `stalls` is true of passes nothing more on.
    """
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        connections.add(task := cast(asyncio.Task[None], asyncio.current_task()))
        task.add_done_callback(connections.discard)
        with suppress(OSError, asyncio.CancelledError):  # the end needs no farewell
            inner_reader, inner_out = await asyncio.open_connection(HOST, port)
            await asyncio.gather(
                _pass_on(reader, inner_out, stalls), _pass_on(inner_reader, out, _never)
            )

    server = await asyncio.start_server(serve, HOST, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _pass_on(
    reader: asyncio.StreamReader, out: asyncio.StreamWriter, stalls: Callable[[bytes], bool]
) -> None:
    """What one side sends, to the other, until its end."""
    try:
        stalled = False
        while data := await reader.read(1 << 16):
            stalled = stalled or stalls(data)
            if not stalled:
                out.write(data)
                await out.drain()
    finally:
        out.close()

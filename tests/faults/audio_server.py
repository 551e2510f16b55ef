"""A server of short tracks, each distinct, and of every fault that HTTP allows.

`/track/7.wav` is sound. `/stall/1000/7.wav` sends the same track's first 1000 bytes and no more;
the other faults are told in `FAULTS`. Raw sockets, since a library would not lie about lengths.
"""

import asyncio
import contextlib
import gzip
import hashlib
import io
import struct
import wave
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache
from typing import Self

import numpy as np

RATE_HZ = 16_000
DURATION_S = 3.0
WAV_HEADER_BYTES = 44
DRIP_BYTES, DRIP_S = 200, 0.2
PIECE_BYTES, PIECE_S = 16_000, 0.05
HEAD_ALONE_S = 1.0

Answer = Callable[["Request"], Awaitable[None]]


@lru_cache(maxsize=256)
def track(number: int, duration_s: float = DURATION_S) -> bytes:
    """A WAV file, 16 bits mono: a chord and noise of their own for every number."""
    random = np.random.default_rng(number)
    time_s = np.arange(round(duration_s * RATE_HZ)) / RATE_HZ
    signal = random.uniform(-0.05, 0.05, len(time_s))
    for frequency_hz in random.uniform(80, 4000, 4):
        signal += 0.15 * np.sin(2 * np.pi * frequency_hz * time_s)
    return wav((signal * 32_000).astype("<i2").tobytes())


def wav(pcm: bytes) -> bytes:
    """16-bit mono samples with the header of a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE_HZ)
        writer.writeframes(pcm)
    return file.getvalue()


class Request:
    """One request to a fault: its argument, the track it names, and where the answer goes."""

    def __init__(
        self,
        server: "AudioServer",
        path: str,
        argument: str,
        number: int,
        out: asyncio.StreamWriter,
    ) -> None:
        self.server = server
        self.path = path
        self.argument = argument
        self.number = number
        self.body = track(number)
        self._out = out

    async def send(self, data: bytes) -> None:
        self._out.write(data)
        await self._out.drain()

    async def head(self, status: str = "200 OK", **headers: object) -> None:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        text = "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines])
        await self.send(f"{text}\r\n\r\n".encode())

    async def sound(self) -> None:
        address = f"{self.server.origin}{self.path}"
        self.server.served[address] = hashlib.sha256(self.body).hexdigest()
        await self.head(Content_Length=len(self.body), Content_Type="audio/wav")
        await self.send(self.body)

    def reset(self) -> None:
        self._out.transport.abort()


async def stall(request: Request) -> None:
    """Nothing more after so many bytes; -1: not even a status line."""
    at = int(request.argument)
    if at >= 0:
        await request.head(Content_Length=len(request.body))
        await request.send(request.body[:at])
    await request.server.released.wait()


async def reset(request: Request) -> None:
    """The connection is reset after so many bytes."""
    await request.head(Content_Length=len(request.body))
    await request.send(request.body[: int(request.argument)])
    request.reset()


async def reset_once(request: Request) -> None:
    """The same at the first request only."""
    if request.server.requests[request.path] > 1:
        await request.sound()
    else:
        await reset(request)


async def status(request: Request) -> None:
    """Always that status."""
    await request.head(f"{request.argument} Fault", Content_Length=0)


async def busy(request: Request) -> None:
    """That status with Retry-After: 1 at the first two requests, then the track."""
    if request.server.requests[request.path] > 2:
        await request.sound()
    else:
        await request.head(f"{request.argument} Busy", Retry_After=1, Content_Length=0)


async def later(request: Request) -> None:
    """503 with so many seconds of Retry-After, always."""
    await request.head("503 Busy", Retry_After=request.argument, Content_Length=0)


async def no_length(request: Request) -> None:
    """The body comes in pieces and ends with the connection."""
    await request.head()
    for start in range(0, len(request.body), PIECE_BYTES):
        await request.send(request.body[start : start + PIECE_BYTES])
        await asyncio.sleep(PIECE_S)


async def false_length(request: Request) -> None:
    """Content-Length is off by so many bytes."""
    await request.head(Content_Length=len(request.body) + int(request.argument))
    # What is too much aiohttp refuses where the head comes together with it.
    await asyncio.sleep(HEAD_ALONE_S)
    await request.send(request.body)


async def endless(request: Request) -> None:
    """A body without an end, as fast as it goes."""
    await request.head()
    while True:
        await request.send(bytes(65536))


async def loop(request: Request) -> None:
    """A redirect to itself."""
    await request.head("302 Found", Location=request.path, Content_Length=0)


async def inward(request: Request) -> None:
    """A redirect to the address of a cloud's metadata service."""
    await request.head(
        "302 Found", Location="http://169.254.169.254/latest/meta-data/", Content_Length=0
    )


async def bomb(request: Request) -> None:
    """A body that unpacks to so many MiB."""
    body = await asyncio.to_thread(_zeros, int(request.argument))  # or all others would wait
    await request.head(Content_Length=len(body), Content_Encoding="gzip")
    await request.send(body)


async def drip(request: Request) -> None:
    """A little now and then: never a stall, never done."""
    await request.head(Content_Length=len(request.body))
    for start in range(0, len(request.body), DRIP_BYTES):
        await request.send(request.body[start : start + DRIP_BYTES])
        await asyncio.sleep(DRIP_S)


async def late(request: Request) -> None:
    """Sound, after so many seconds."""
    await asyncio.sleep(float(request.argument))
    await request.sound()


async def large(request: Request) -> None:
    """Sound, of so many seconds: its first minute again and again."""
    minute = np.frombuffer(track(request.number, 60.0), "<i2")[WAV_HEADER_BYTES // 2 :]
    times = round(float(request.argument) / 60)
    header = wav(b"")[: WAV_HEADER_BYTES - 4] + struct.pack("<I", times * minute.nbytes)
    await request.head(Content_Length=len(header) + times * minute.nbytes)
    await request.send(header)
    for _ in range(times):
        await request.send(minute.tobytes())


async def marked(request: Request) -> None:
    """Sound, and louder than any music: see `launcher`."""
    square = np.where(np.arange(round(DURATION_S * RATE_HZ)) // 20 % 2, 32_000, -32_000)
    square[0] = request.number  # distinct
    request.body = wav(square.astype("<i2").tobytes())
    await request.sound()


FAULTS: dict[str, Answer] = {
    answer.__name__.replace("_", "-"): answer
    for answer in (
        stall, reset, reset_once, status, busy, later, no_length, false_length, endless, loop,
        inward, bomb, drip, late, large, marked,
    )
}  # fmt: skip


@lru_cache
def _zeros(mebibytes: int) -> bytes:
    return gzip.compress(bytes(mebibytes << 20))


class AudioServer:
    """Listens on a free port of the loopback for as long as the context lasts.

    `delay_s` holds back every answer; `connections` counts all that were made, `requests` what was
    asked for, by path; `served` has the SHA-256 of whole tracks by address; setting `released` ends
    what stalls.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.port = 0
        self.connections = 0
        self.requests: Counter[str] = Counter()
        self.served: dict[str, str] = {}
        self.released = asyncio.Event()
        self._handlers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, number: int, fault: str = "track", argument: object = None) -> str:
        """The address of a track, sound or with a fault."""
        middle = "" if argument is None else f"/{argument}"
        return f"{self.origin}/{fault}{middle}/{number}.wav"

    async def _serve(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.connections += 1
        task.add_done_callback(self._handlers.discard)
        with _closing(out):
            path = (await reader.readuntil(b"\r\n\r\n")).decode().split()[1]
            self.requests[path] += 1
            await asyncio.sleep(self.delay_s)
            _, fault, *arguments, name = path.split("/")
            argument = arguments[0] if arguments else ""
            request = Request(self, path, argument, int(name.split(".")[0]), out)
            await (request.sound() if fault == "track" else FAULTS[fault](request))


@contextlib.contextmanager
def _closing(out: asyncio.StreamWriter) -> Iterator[None]:
    """Close the connection at the end; a client that went away has heard enough."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        try:
            yield
        finally:
            out.close()

"""The decoder pool: tracks in, windows out, each track in a process of its own for its time.

A decoder process writes windows into memory it shares with the worker, block by block; only slot
numbers travel over the socket between them. A process whose track ended in order serves the next.
Any other (crashed, too slow, too hungry, or left half-way) is killed and another started, with new
memory: what an abandoned decoder still writes, nobody reads.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

from schemas.events import Priority
from worker.backoff import Backoff
from worker.decode.decoder import DecodedFacts
from worker.decode.handle import Block, DecoderProcess
from worker.decode.line import Line
from worker.decode.process import Setup
from worker.errors import (
    AudioEmpty,
    AudioTooLong,
    AudioUnreadable,
    DecodeFailed,
    DecoderCrashed,
    DecoderKilled,
    DecodeTimeout,
    TimbreError,
    Unexpected,
)
from worker.settings import DecodeSettings, WindowSettings

log = logging.getLogger(__name__)

START_BACKOFF_S = (0.1, 10.0)
LONG_WINDOWS = 200  # ten minutes of three seconds each

# Errors of the audio itself: the process that found them is as good as before.
OF_THE_AUDIO: dict[str, type[TimbreError]] = {
    error.code: error for error in (AudioEmpty, AudioTooLong, AudioUnreadable, DecodeFailed)
}


class DecoderPool:
    """Decoder processes, each with one track at a time.

    Parameters
    ----------
    settings
        Number of processes and their limits.
    windows
        How tracks are cut.
    sample_rate_hz, window_samples
        What the model hears.
    on_restart
        Told of every process that ended and is replaced.

    Entering it raises DecoderCrashed when no process can be started.
    """

    def __init__(
        self,
        settings: DecodeSettings,
        windows: WindowSettings,
        *,
        sample_rate_hz: int,
        window_samples: int,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_restart = on_restart
        self._processes = settings.processes
        self._limits = settings
        self._setup = Setup(
            sample_rate_hz=sample_rate_hz,
            window_samples=window_samples,
            hop_samples=max(1, round(windows.hop_s * sample_rate_hz)),
            min_tail_samples=round(windows.min_tail_s * sample_rate_hz),
            silence_dbfs=windows.silence_dbfs,
            max_duration_s=settings.max_duration_s,
            max_memory_bytes=settings.max_memory_bytes,
            slots=settings.slots,
            slot_windows=settings.slot_windows,
        )
        self._line = Line(most_backfill=max(1, self._processes - 1))
        self._living: set[DecoderProcess] = set()
        self._keepers: set[asyncio.Task[None]] = set()
        # One thread starts and buries all processes, in order. It lives as long as the pool, which
        # matters: Linux counts a child's parent as gone when the thread that started it ends.
        self._reaper = ThreadPoolExecutor(1, "decoder-processes")

    async def __aenter__(self) -> Self:
        try:
            first = await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        self._keepers = {
            asyncio.create_task(self._keep(process), name="decoder process")
            for process in (first, *[None] * (self._processes - 1))
        }
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        keepers = tuple(self._keepers)
        for keeper in keepers:
            keeper.cancel()
        ends = await asyncio.gather(*keepers, return_exceptions=True)
        for process in tuple(self._living):  # of keepers that had not even begun
            self._reap(process)
        await asyncio.to_thread(self._reaper.shutdown)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    @property
    def pids(self) -> set[int]:
        """Ids of the processes that live now, for whoever watches their memory."""
        return {process.pid for process in self._living}

    @asynccontextmanager
    async def decode(
        self, path: Path, *, priority: Priority = "upload"
    ) -> AsyncIterator["Decoding"]:
        """Decode the file at `path`: enter the result, then iterate over its blocks.

        Entering waits for a free process, however long others hold them.

        Leaving before the end abandons the track; leaving after it waits until all blocks are
        released. The decoder's own work is limited by `decode.timeout_s`, and to each block by
        `decode.stall_timeout_s`; all else by the caller.

        Raises
        ------
        AudioUnreadable, AudioEmpty, AudioTooLong, DecodeTimeout, DecoderCrashed, DecodeFailed
            From the iteration, after the blocks that were decoded.
        """
        process = await self._line.take(priority)
        decoding = Decoding(process, path, self._limits, self._help_out)
        try:
            yield decoding
            if decoding.ended:
                await process.released.wait()
        finally:
            self._line.leave(priority)
            if decoding.ended_in_order and process.released.is_set():
                self._line.give(process)
            else:
                process.abandon()

    def _help_out(self) -> None:
        """Start a spare process where a track waits and long tracks hold all that there are.

        A long track is held back by the network, not by its decoder, so that a spare costs memory
        and hardly any time. There are as many spares as processes at most.
        """
        if (
            self._line.waiting
            and len(self._living) == len(self._keepers) < 2 * self._processes
            and all(process.windows >= LONG_WINDOWS for process in self._living)
        ):
            keeper = asyncio.create_task(self._keep_spare(), name="spare decoder process")
            self._keepers.add(keeper)
            keeper.add_done_callback(self._keepers.discard)

    async def _keep_spare(self) -> None:
        try:
            process = await self._start()
        except DecoderCrashed as error:
            log.warning("%s", error.message)
            return
        process.spare = True
        self._line.give(process)
        try:
            await process.ended.wait()
        finally:
            self._reap(process)

    async def _keep(self, process: DecoderProcess | None) -> None:
        """See to it that one process lives: when it has ended, reap it and start another."""
        backoff = Backoff(*START_BACKOFF_S)
        while True:
            useful = False
            try:
                process = process or await self._start()
            except DecoderCrashed as error:
                log.warning("%s", error.message)
            else:
                self._line.give(process)
                try:
                    await process.ended.wait()
                finally:
                    self._reap(process)
                self._on_restart()
                useful = process.tracks > 0
                process = None
            if useful:
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_s())

    async def _start(self) -> DecoderProcess:
        try:
            process = DecoderProcess(self._setup)
        except OSError as error:
            raise DecoderCrashed(f"A decoder's memory can't be had: {error.strerror}.") from error
        try:
            await process.start(self._reaper)
        except BaseException:
            self._reap(process)
            raise
        self._living.add(process)
        return process

    def _reap(self, process: DecoderProcess) -> None:
        self._living.discard(process)
        process.disconnect()
        self._reaper.submit(process.reap)


class Decoding:
    """One track being decoded: an asynchronous iterator over its blocks, in order."""

    def __init__(
        self,
        process: DecoderProcess,
        path: Path,
        limits: DecodeSettings,
        on_block: Callable[[], None],
    ) -> None:
        self.ended = False
        self._sound = False
        self._facts: DecodedFacts | None = None
        self._process = process
        self._limits = limits
        self._on_block = on_block
        process.begin(path, limits.timeout_s, limits.stall_timeout_s)

    @property
    def ended_in_order(self) -> bool:
        """Whether the process is as good as before the track."""
        return self._sound and not self._process.overdue

    @property
    def facts(self) -> DecodedFacts:
        """What the track turned out to be; known after the iteration."""
        assert self._facts is not None, "facts are known once all blocks have been read"
        return self._facts

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Block:
        if self.ended:
            raise StopAsyncIteration
        message = await self._process.inbox.get()
        if message is not None and "slot" in message:
            self._on_block()
            return self._process.block(message)
        self.ended = True
        if message is None:
            raise await self._death()
        if "error" in message:
            self._sound = message["error"]["code"] in OF_THE_AUDIO
            raise _error(message["error"])
        self._sound = True
        self._facts = DecodedFacts(**message["facts"])
        raise StopAsyncIteration

    async def _death(self) -> TimbreError:
        if self._process.spoke_nonsense:
            return DecoderCrashed(
                "The decoder process said what no decoder says and was ended: the file may be made "
                "to take it over."
            )
        if self._process.stalled:
            return DecodeTimeout(
                f"Decoding gave nothing for {self._limits.stall_timeout_s:g} s and was ended; if "
                "the track is sound, raise TIMBRE_DECODE__STALL_TIMEOUT_S."
            )
        if self._process.overdue:
            return DecodeTimeout(
                f"Decoding took more than {self._limits.timeout_s:g} s and was ended; if the track "
                "is sound, raise TIMBRE_DECODE__TIMEOUT_S."
            )
        status = await asyncio.wrap_future(self._process.status)
        if status == -signal.SIGKILL:
            return DecoderKilled(
                "The decoder process was killed (SIGKILL), perhaps since memory ran out; "
                "give the machine more, or lower TIMBRE_DECODE__PROCESSES."
            )
        how = f"with status {status}" if status >= 0 else f"of {signal.Signals(-status).name}"
        return DecoderCrashed(f"The decoder process died {how}: the file may be damaged.")


def _error(told: dict[str, str]) -> TimbreError:
    """The error that a decoder process tells of."""
    if told["code"] == DecoderCrashed.code:
        return DecoderCrashed(told["message"])
    if told["code"] in OF_THE_AUDIO:
        return OF_THE_AUDIO[told["code"]](told["message"])
    log.error("A decoder process failed:\n%s", told["traceback"])
    return Unexpected(told["message"])

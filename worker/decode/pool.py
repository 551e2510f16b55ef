"""The decoder pool: tracks in, windows out, each track in a process of its own for its time.

A decoder process writes windows into memory it shares with the worker, block by block; only slot
numbers travel over the socket between them. A process whose track ended in order serves the next.
Any other (crashed, too slow, too hungry, or left half-way) is killed and another started, with new
memory: what an abandoned decoder still writes, nobody reads.
"""

import asyncio
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, fields
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from worker.backoff import Backoff
from worker.decode import process as decoder_process
from worker.decode.decoder import DecodedFacts
from worker.decode.process import MESSAGE_BYTES, Message, Setup
from worker.errors import (
    AudioEmpty,
    AudioTooLong,
    AudioUnreadable,
    DeadlineExceeded,
    DecodeFailed,
    DecoderCrashed,
    DecoderKilled,
    DecodeTimeout,
    TimbreError,
    Unexpected,
)
from worker.settings import DecodeSettings, WindowSettings
from worker.windows import Windows

__all__ = ["Block", "DecodedFacts", "DecoderPool", "Decoding"]

log = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
START_BACKOFF_S = (0.1, 10.0)
FACTS = {field.name for field in fields(DecodedFacts)}

# Errors of the audio itself: the process that found them is as good as before.
OF_THE_AUDIO: dict[str, type[TimbreError]] = {
    error.code: error for error in (AudioEmpty, AudioTooLong, AudioUnreadable, DecodeFailed)
}


class Hearing(Protocol):
    """What of a model decides how audio is decoded for it."""

    @property
    def sample_rate_hz(self) -> int: ...

    @property
    def window_samples(self) -> int: ...


class Block:
    """Some consecutive windows of a track, in place in shared memory.

    Attributes
    ----------
    windows : np.ndarray [shape=(windows, window_samples), dtype=float32]
        A view; not to be touched once released.
    silent : np.ndarray [shape=(windows,), dtype=bool]
        Windows that don't vote.
    """

    def __init__(
        self, windows: Windows, silent: NDArray[np.bool_], release: Callable[[], None]
    ) -> None:
        self.windows = windows
        self.silent = silent
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the memory back to the decoder, from the event loop's thread; twice is once."""
        if self._release is not None:
            self._release()
            self._release = None


class DecoderPool:
    """Decoder processes, each with one track at a time.

    Parameters
    ----------
    settings
        Number of processes and their limits.
    windows
        How tracks are cut.
    model
        The bundle that windows are for.
    on_restart
        Told of every process that ended and is replaced.

    Entering it raises DecoderCrashed when no process can be started.
    """

    def __init__(
        self,
        settings: DecodeSettings,
        windows: WindowSettings,
        model: Hearing,
        *,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        self._on_restart = on_restart
        self._processes = settings.processes
        self._timeout_s = settings.timeout_s
        self._setup = Setup(
            sample_rate_hz=model.sample_rate_hz,
            window_samples=model.window_samples,
            hop_samples=max(1, round(windows.hop_s * model.sample_rate_hz)),
            min_tail_samples=round(windows.min_tail_s * model.sample_rate_hz),
            silence_dbfs=windows.silence_dbfs,
            max_duration_s=settings.max_duration_s,
            max_memory_bytes=settings.max_memory_bytes,
            slots=settings.slots,
            slot_windows=settings.slot_windows,
        )
        self._idle: asyncio.Queue[_Process] = asyncio.Queue()
        self._turn = asyncio.Lock()  # tracks are served in the order they came, a queue's aren't
        self._living: set[_Process] = set()
        self._keepers: list[asyncio.Task[None]] = []
        # One thread starts and buries all processes, in order. It lives as long as the pool, which
        # matters: Linux counts a child's parent as gone when the thread that started it ends.
        self._undertaker = ThreadPoolExecutor(1, "decoder-processes")

    async def __aenter__(self) -> Self:
        try:
            first = await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        self._keepers = [
            asyncio.create_task(self._keep(process), name="decoder process")
            for process in (first, *[None] * (self._processes - 1))
        ]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        ends = await asyncio.gather(*self._keepers, return_exceptions=True)
        for process in tuple(self._living):  # of keepers that had not even begun
            self._bury(process)
        await asyncio.to_thread(self._undertaker.shutdown)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    @property
    def pids(self) -> set[int]:
        """Ids of the processes that live now, for whoever watches their memory."""
        return {process.pid for process in self._living}

    def decode(self, path: Path, *, timeout_s: float) -> AbstractAsyncContextManager["Decoding"]:
        """Decode the file at `path`: enter the result, then iterate over its blocks.

        Leaving before the end abandons the track; leaving after it waits until all blocks are
        released.

        Parameters
        ----------
        timeout_s
            For everything from now on, the waiting for a free process and for blocks to be
            released included. The decoder's own work is limited by `decode.timeout_s`.

        Raises
        ------
        AudioUnreadable, AudioEmpty, AudioTooLong, DecodeTimeout, DecoderCrashed, DecodeFailed
            From the iteration, after the blocks that were decoded.
        DeadlineExceeded
            `timeout_s` has passed.
        """
        return self._decode(path, timeout_s)

    @asynccontextmanager
    async def _decode(self, path: Path, timeout_s: float) -> AsyncIterator["Decoding"]:
        deadline = _Deadline(timeout_s)
        async with deadline.scope():
            process = await self._free_process()
        decoding = Decoding(process, path, deadline, self._timeout_s)
        try:
            yield decoding
            if decoding.ended:
                async with deadline.scope():
                    await process.released.wait()
        finally:
            if decoding.ended_in_order and process.released.is_set():
                self._idle.put_nowait(process)
            else:
                process.kill()

    async def _free_process(self) -> "_Process":
        async with self._turn:
            while (process := await self._idle.get()).ended.is_set():
                pass  # died while idle: its keeper starts another
            return process

    async def _keep(self, process: "_Process | None") -> None:
        """See to it that one process lives: when it has ended, bury it and start another."""
        backoff = Backoff(*START_BACKOFF_S)
        while True:
            useful = False
            try:
                process = process or await self._start()
            except DecoderCrashed as error:
                log.warning("%s", error.message)
            else:
                self._idle.put_nowait(process)
                try:
                    await process.ended.wait()
                finally:
                    self._bury(process)
                if self._on_restart is not None:
                    self._on_restart()
                useful = process.tracks > 0
                process = None
            if useful:
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_s())

    async def _start(self) -> "_Process":
        try:
            process = _Process(self._setup)
        except OSError as error:
            raise DecoderCrashed(f"A decoder's memory can't be had: {error.strerror}.") from error
        try:
            await process.start(self._undertaker)
        except BaseException:
            self._bury(process)
            raise
        self._living.add(process)
        return process

    def _bury(self, process: "_Process") -> None:
        self._living.discard(process)
        process.deafen()
        self._undertaker.submit(process.bury)


class Decoding:
    """One track being decoded: an asynchronous iterator over its blocks, in order."""

    def __init__(
        self, process: "_Process", path: Path, deadline: "_Deadline", work_s: float
    ) -> None:
        self.ended = False
        self._process_sound = True
        self._facts: DecodedFacts | None = None
        self._process = process
        self._deadline = deadline
        self._work_s = work_s
        process.begin(path, work_s)

    @property
    def ended_in_order(self) -> bool:
        """Whether the process is as good as before the track."""
        return self.ended and self._process_sound and not self._process.overdue

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
        async with self._deadline.scope():
            message = await self._process.inbox.get()
        if message is not None and "slot" in message:
            return self._process.block(message)
        self.ended = True
        if message is None:
            self._process_sound = False
            raise await self._death()
        if "error" in message:
            error = _error(message["error"])
            self._process_sound = error.code in OF_THE_AUDIO
            raise error
        self._facts = DecodedFacts(**message["facts"])
        raise StopAsyncIteration

    async def _death(self) -> TimbreError:
        if self._process.astray:
            return DecoderCrashed(
                "The decoder process said what no decoder says and was ended: the file may be made "
                "to take it over."
            )
        if self._process.overdue:
            return DecodeTimeout(
                f"Decoding took more than {self._work_s:g} s and was ended; if the track is sound, "
                "raise TIMBRE_DECODE__TIMEOUT_S."
            )
        status = await asyncio.wrap_future(self._process.status)
        if status == -signal.SIGKILL:
            return DecoderKilled(
                "The decoder process was killed (SIGKILL), perhaps since memory ran out; "
                "give the machine more, or lower TIMBRE_DECODE__PROCESSES."
            )
        how = f"with status {status}" if status >= 0 else f"of {signal.Signals(-status).name}"
        return DecoderCrashed(f"The decoder process died {how}: the file may be damaged.")


class _Process:
    """A decoder process, the socket to it, and the memory shared with it.

    `ended` is set when it has died; `released` while the worker holds no block of it.
    """

    def __init__(self, setup: Setup) -> None:
        self.inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.released = asyncio.Event()
        self.released.set()
        self.status: Future[int] = Future()
        self.tracks = 0
        self.overdue = False
        self.astray = False
        self._setup = setup
        self._ready = False
        self._held: set[int] = set()
        self._clock: _Clock | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._control, self._its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        # A file without a name: nothing is left behind however the worker ends.
        self._memory_file = FileIO(os.memfd_create("timbre-windows"), "r+")
        self._memory_file.truncate(setup.memory_bytes)
        memory = mmap.mmap(self._memory_file.fileno(), setup.memory_bytes)
        self._memory = np.frombuffer(memory, np.float32).reshape(setup.shape)

    @property
    def pid(self) -> int:
        assert self._popen is not None, "it has been started"
        return self._popen.pid

    async def start(self, thread: ThreadPoolExecutor) -> None:
        """Start it on `thread` and wait until it can decode."""
        try:
            await self._loop.run_in_executor(thread, self._spawn)
            self._loop.add_reader(self._control, self._on_message)
            self._send(asdict(self._setup))
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await self.inbox.get()
        except (OSError, TimeoutError) as error:
            raise DecoderCrashed(f"A decoder process can't be started: {error!r}.") from error
        if ready is None:
            raise DecoderCrashed("A decoder process died while it started: see its output above.")

    def begin(self, path: Path, work_s: float) -> None:
        """Give it a track; from now on it has `work_s` of its own time."""
        self.tracks += 1
        self._clock = _Clock(work_s, self._on_overdue)
        self._clock.run()
        self._send({"path": str(path)})

    def block(self, message: Message) -> Block:
        slot = message["slot"]
        return Block(
            windows=self._memory[slot, : message["windows"]],
            silent=np.array([flag == "1" for flag in message["silent"]], np.bool_),
            release=partial(self._release, slot),
        )

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()

    def deafen(self) -> None:
        """Stop listening to it: it has ended, or is about to be."""
        if self.ended.is_set():
            return
        self._end_clock()
        self._loop.remove_reader(self._control)
        self.ended.set()
        self.inbox.put_nowait(None)

    def bury(self) -> None:
        """Kill it, wait until it is gone, and keep its exit status."""
        for file in (self._control, self._its_control, self._memory_file):
            file.close()
        if self._popen is not None:
            self._popen.kill()
            self.status.set_result(self._popen.wait())

    def _spawn(self) -> None:
        fds = (self._its_control.fileno(), self._memory_file.fileno())
        command = (sys.executable, "-S", "-P", "-m", decoder_process.__name__, *map(str, fds))
        try:
            self._popen = subprocess.Popen(  # noqa: S603  # all of it is ours
                command,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=fds,
            )
        finally:
            self._its_control.close()
            self._memory_file.close()

    def _on_message(self) -> None:
        try:
            data = self._control.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self.deafen()
            return
        try:
            message: Message = json.loads(data)
        except (ValueError, RecursionError):
            message = {}
        if not self._is_due(message):
            self._go_astray()
            return
        if "slot" in message:
            self._held.add(message["slot"])
            self.released.clear()
            if len(self._held) == self._setup.slots and self._clock is not None:
                self._clock.stop()  # it waits for us
        else:
            self._ready = True
            self._end_clock()
        self.inbox.put_nowait(message)

    def _is_due(self, message: Any) -> bool:
        """Whether a decoder of ours may say that now; one taken over by its input says anything."""
        works = self._clock is not None
        match message:
            case {"slot": int(slot), "windows": int(windows), "silent": str(silent)}:
                free = set(range(self._setup.slots)) - self._held
                is_free = type(slot) is int and slot in free  # True is a number, but no index
                fits = 0 < windows == len(silent) <= self._setup.slot_windows
                return works and is_free and fits
            case {"facts": dict(facts)}:
                return works and facts.keys() == FACTS
            case {"error": {"code": str(), "message": str(), "traceback": str()}}:
                return works
            case {"ready": True}:
                return not self._ready
        return False

    def _go_astray(self) -> None:
        self.astray = True
        self.kill()

    def _release(self, slot: int) -> None:
        self._held.remove(slot)
        if not self._held:
            self.released.set()
        if self.ended.is_set():
            return
        if self._clock is not None:
            self._clock.run()
        self._send({"release": slot})

    def _send(self, message: Message) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            return  # it has died, which `_on_message` is about to be told
        except BlockingIOError:  # it hears nothing
            self._go_astray()

    def _end_clock(self) -> None:
        if self._clock is not None:
            self._clock.stop()
            self._clock = None

    def _on_overdue(self) -> None:
        self.overdue = True
        self.kill()


class _Clock:
    """Counts seconds down while it runs, and calls back once none is left."""

    def __init__(self, seconds: float, on_end: Callable[[], None]) -> None:
        self._left_s = seconds
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def run(self) -> None:
        if self._timer is None:
            self._since_s = self._loop.time()
            self._timer = self._loop.call_later(self._left_s, self._on_end)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s = max(0.0, self._left_s - (self._loop.time() - self._since_s))


class _Deadline:
    """A point in time by which waiting ends."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._at = asyncio.get_running_loop().time() + timeout_s

    @asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._at):
                yield
        except TimeoutError:
            raise DeadlineExceeded(
                f"The track was not decoded within {self._timeout_s:g} s, its waiting for a "
                "decoder and for the network included."
            ) from None


def _environment() -> dict[str, str]:
    """The decoder's whole environment: our modules, one thread, none of our secrets."""
    root = str(Path(decoder_process.__file__).parents[2])
    return {
        "PYTHONPATH": os.pathsep.join((root, *filter(None, sys.path))),
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _error(told: dict[str, str]) -> TimbreError:
    """The error that a decoder process tells of."""
    if told["code"] == DecoderCrashed.code:
        return DecoderCrashed(told["message"])
    if told["code"] in OF_THE_AUDIO:
        return OF_THE_AUDIO[told["code"]](told["message"])
    log.error("A decoder process failed:\n%s", told["traceback"])
    return Unexpected(told["message"])

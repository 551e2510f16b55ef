"""The worker's side of a decoder process: its life, the socket to it, the memory they share."""

import asyncio
import json
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.decode import process as decoder_process
from worker.decode.decoder import DecodedFacts
from worker.decode.process import MESSAGE_BYTES, Message, Setup
from worker.errors import DecoderCrashed
from worker.windows import Windows

START_TIMEOUT_S = 30.0
FACTS = {field.name: field.type for field in fields(DecodedFacts)}


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
            del self.windows  # they hold all of the decoder's memory


class DecoderProcess:
    """A decoder process, the socket to it, and the memory shared with it.

    `ended` is set when it has died; `released` while the worker holds no block of it; a `spare`
    lives only as long as tracks wait for it.
    """

    def __init__(self, setup: Setup) -> None:
        self.spare = False
        self.inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.released = asyncio.Event()
        self.released.set()
        self.status: Future[int] = Future()
        self.tracks = 0
        self.windows = 0  # of the present track
        self.overdue = False
        self.stalled = False
        self.spoke_nonsense = False
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

    def begin(self, path: Path, work_s: float, silence_s: float) -> None:
        """Give it a track; it has `work_s` of its own time, and `silence_s` of it to each block."""
        self.tracks += 1
        self.windows = 0
        self._clock = _Clock(work_s, silence_s, self._on_overdue)
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

    def abandon(self) -> None:
        """Kill it with its track: its memory goes with the last block, not with the last error."""
        self.kill()
        del self._memory

    def disconnect(self) -> None:
        """Stop listening to it: it has ended, or is about to be."""
        if self.ended.is_set():
            return
        self._end_clock()
        self._loop.remove_reader(self._control)
        self.ended.set()
        self.inbox.put_nowait(None)

    def reap(self) -> None:
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
                process_group=0,  # or Ctrl-C would end it while it starts
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
            self.disconnect()
            return
        try:
            message: Message = json.loads(data)
        except (ValueError, RecursionError):
            message = {}
        if not self._is_due(message):
            self._kill_for_nonsense()
            return
        if "slot" in message:
            self._held.add(message["slot"])
            self.windows += message["windows"]
            self.released.clear()
            if self._clock is not None:
                self._clock.stop()
                if len(self._held) < self._setup.slots:  # else it waits for us
                    self._clock.run()
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
                kinds = {name: type(fact) for name, fact in facts.items()}
                return works and self.windows > 0 and kinds == FACTS
            case {"error": {"code": str(), "message": str(), "traceback": str()}}:
                return works
            case {"ready": True}:
                return not self._ready
        return False

    def _kill_for_nonsense(self) -> None:
        self.spoke_nonsense = True
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
            self._kill_for_nonsense()

    def _end_clock(self) -> None:
        if self._clock is not None:
            self._clock.stop()
            self._clock = None

    def _on_overdue(self, stalled: bool) -> None:
        self.overdue, self.stalled = True, stalled
        self.kill()


class _Clock:
    """Counts seconds down while it runs, and calls back once none is left (with False) or it has
    run for `at_once_s` since it was last stopped (with True).
    """

    def __init__(self, seconds: float, at_once_s: float, on_end: Callable[[bool], None]) -> None:
        self._left_s = seconds
        self._at_once_s = at_once_s
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def run(self) -> None:
        if self._timer is None:
            self._since_s = self._loop.time()
            stalled = self._at_once_s < self._left_s
            left_s = min(self._at_once_s, self._left_s)
            self._timer = self._loop.call_later(left_s, self._on_end, stalled)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s = max(0.0, self._left_s - (self._loop.time() - self._since_s))


def _environment() -> dict[str, str]:
    """The decoder's whole environment: our modules, one thread, none of our secrets."""
    root = str(Path(decoder_process.__file__).parents[2])
    return {
        "PYTHONPATH": os.pathsep.join((root, *filter(None, sys.path))),
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }

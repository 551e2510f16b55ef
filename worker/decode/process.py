"""What runs inside a decoder process: takes tracks over a socket, writes windows to shared memory.

Started by the pool as `python -m worker.decode.process CONTROL_FD MEMORY_FD`. Audio from outsiders
meets FFmpeg here and nowhere else: the process holds no secrets, can write no file, has bounds on
its memory, and dies with its worker. It speaks JSON, one message a datagram, so that a decoder
taken over by its input can't make the worker unpickle anything.

To the process:    Setup once; then `{"path": str}` a track; `{"release": slot}` at any time.
From the process:  `{"ready": true}` once; then a track's `{"slot", "windows", "silent": "0010"}`
                   blocks, and `{"facts"}` or `{"error"}` at its end.
"""

import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
import traceback
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worker.decode.decoder import Decoder
from worker.errors import DecoderCrashed, TimbreError, Unexpected
from worker.malloc import keep_freed_memory
from worker.windows import WindowCutter, Windows, cut, is_silent

MESSAGE_BYTES = 1 << 16
MAX_OPEN_FILES = 16
KEPT_BYTES = 32 << 20  # of memory that tracks before freed
PR_SET_PDEATHSIG = 1

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a decoder process is told about its work, the same for every track."""

    sample_rate_hz: int
    window_samples: int
    hop_samples: int
    min_tail_samples: int
    silence_dbfs: float
    max_duration_s: float
    max_memory_bytes: int
    slots: int
    slot_windows: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the shared memory: (slots, slot_windows, window_samples), float32."""
        return self.slots, self.slot_windows, self.window_samples

    @property
    def memory_bytes(self) -> int:
        return self.slots * self.slot_windows * self.window_samples * 4


def main() -> None:
    control_fd, memory_fd = (int(argument) for argument in sys.argv[1:])
    _die_with_the_worker()
    control = Control(socket.socket(fileno=control_fd))
    setup = Setup(**control.receive())
    slots = Slots(control, memory_fd, setup)
    keep_freed_memory(KEPT_BYTES)
    _limit(setup.max_memory_bytes)
    _fall_silent()
    control.send({"ready": True})
    while True:
        slots.handle(control.receive())
        while slots.paths:
            control.send(_decode(Path(slots.paths.popleft()), slots, setup))


class Control:
    """The socket to the worker; the process ends when the worker has gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def receive(self) -> Message:
        data = self._connection.recv(MESSAGE_BYTES)
        if not data:
            sys.exit()
        message: Message = json.loads(data)
        return message

    def send(self, message: Message) -> None:
        try:
            self._connection.send(json.dumps(message).encode())
        except BrokenPipeError:
            sys.exit()


class Slots:
    """The shared memory, written a block at a time into slots that the worker has released."""

    def __init__(self, control: Control, memory_fd: int, setup: Setup) -> None:
        self.paths: deque[str] = deque()
        self._control = control
        self._silence_dbfs = setup.silence_dbfs
        memory = mmap.mmap(memory_fd, setup.memory_bytes)
        os.close(memory_fd)
        self._memory = np.frombuffer(memory, np.float32).reshape(setup.shape)
        self._free = deque(range(setup.slots))
        self._slot: int | None = None
        self._filled = 0

    def handle(self, message: Message) -> None:
        if "release" in message:
            self._free.append(message["release"])
        else:
            self.paths.append(message["path"])

    def write(self, windows: Windows) -> None:
        """Add windows of shape (windows, window_samples), waiting for a free slot if need be."""
        while len(windows):
            while self._slot is None and not self._free:
                self.handle(self._control.receive())
            if self._slot is None:
                self._slot = self._free.popleft()
            room = self._memory[self._slot, self._filled : self._filled + len(windows)]
            room[:] = windows[: len(room)]
            windows = windows[len(room) :]
            self._filled += len(room)
            if self._filled == self._memory.shape[1]:
                self.send()

    def send(self) -> None:
        """Hand over the block begun, if any."""
        if self._slot is None:
            return
        windows = self._memory[self._slot, : self._filled]
        silent = is_silent(windows, self._silence_dbfs)
        self._control.send(
            {
                "slot": self._slot,
                "windows": self._filled,
                "silent": "".join("01"[flag] for flag in silent.tolist()),
            }
        )
        self._slot = None
        self._filled = 0

    def take_back(self) -> None:
        """Forget the block begun of a track that failed."""
        if self._slot is not None:
            self._free.append(self._slot)
            self._slot = None
            self._filled = 0


def _decode(path: Path, slots: Slots, setup: Setup) -> Message:
    """Decode one track into blocks; the message that ends it."""
    decoder = Decoder(path, setup.sample_rate_hz, max_duration_s=setup.max_duration_s)
    cutter = WindowCutter(setup.window_samples, setup.hop_samples, setup.min_tail_samples)
    try:
        for windows in cut(decoder, cutter):
            slots.write(windows)
        slots.send()
    except TimbreError as error:
        return _failed(slots, error)
    except MemoryError:
        limit = f"{setup.max_memory_bytes >> 20} MiB"
        return _failed(slots, DecoderCrashed(f"Decoding the track takes more than {limit}."))
    except Exception as error:  # the process must answer: the worker logs and raises it
        unexpected = Unexpected(f"{type(error).__name__} while decoding: {error}")
        return _failed(slots, unexpected, traceback.format_exc())
    return {"facts": asdict(decoder.facts)}


def _failed(slots: Slots, error: TimbreError, trace: str = "") -> Message:
    slots.take_back()
    return {"error": {"code": error.code, "message": error.message, "traceback": trace[-8000:]}}


def _die_with_the_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker's to answer, also for a whole group
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(max_memory_bytes: int) -> None:
    """Bound what a track may take; memory counts from what the process has at rest."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + max_memory_bytes
    for kind, bound in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ):
        resource.setrlimit(kind, (bound, bound))


def _fall_silent() -> None:
    """Drop what libraries print about broken files; what they print at a failed start is seen."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stderr.fileno())
    os.close(null)


if __name__ == "__main__":
    main()

"""The bounded place on disk where audio lies between fetch and decode.

Every process has a folder of its own in the spool, held by a lock file: the lock falls with the
process however it dies, and the next one to start removes what the dead left behind.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from worker.errors import AudioTooLarge, SettingsInvalid, SpoolFull

WRITE_BYTES = 256 * 1024  # as much as makes a hop into a thread worth it
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SpooledAudio:
    """Audio on disk, as long as the fetch that yielded it is open."""

    path: Path
    sha256: str
    size_bytes: int


class Spool:
    """Files of at most `max_bytes` together and `max_file_bytes` each.

    `on_bytes` is told of every piece that arrives, of attempts that fail later as well.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        max_file_bytes: int,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.max_file_bytes = max_file_bytes
        self._root = root
        self._max_bytes = max_bytes
        self._on_bytes = on_bytes
        self._used_bytes = 0
        self._folder: Path | None = None
        self._lock_fd = -1

    def open(self) -> None:
        """Make this process's folder and remove those of dead processes.

        Raises
        ------
        SettingsInvalid
            The spool's folder can't be made or written.
        """
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder, self._lock_fd = _claim(self._root)
            _remove_dead(self._root)
        except OSError as error:
            raise SettingsInvalid(
                f"The spool {self._root} can't be used ({error.strerror}); "
                "name a writable folder in TIMBRE_FETCH__SPOOL_DIR."
            ) from error

    def close(self) -> None:
        """Remove this process's folder with all that is in it."""
        if self._folder is None:
            return
        shutil.rmtree(self._folder, ignore_errors=True)  # what stays, the next process removes
        _lock_path(self._folder).unlink(missing_ok=True)
        os.close(self._lock_fd)
        self._folder = None

    def file(self) -> "SpoolFile":
        """A new, empty file, to be removed by whoever asked for it."""
        if self._folder is None:
            raise RuntimeError("the spool is not open")
        return SpoolFile(self, self._folder / secrets.token_hex(8))

    def reserve(self, size_bytes: int) -> None:
        """Count bytes that are about to be written; raises `SpoolFull` where they don't fit."""
        if self._used_bytes + size_bytes > self._max_bytes:
            raise SpoolFull(
                f"The spool holds its {self._max_bytes} bytes; fetch fewer tracks at once, or "
                "raise TIMBRE_FETCH__SPOOL_MAX_BYTES."
            )
        self._used_bytes += size_bytes
        if self._on_bytes is not None:
            self._on_bytes(size_bytes)

    def release(self, size_bytes: int) -> None:
        """Give back what `reserve` counted."""
        self._used_bytes -= size_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes in the spool now."""
        return self._used_bytes


class SpoolFile:
    """One file of the spool while it fills. Hashing and writing happen in threads."""

    def __init__(self, spool: Spool, path: Path) -> None:
        self.size_bytes = 0
        self._spool = spool
        self._path = path
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._reserved_bytes = 0
        self._fd = -1

    @property
    def max_bytes(self) -> int:
        """Bytes that the file may have."""
        return self._spool.max_file_bytes

    def check_size(self, size_bytes: int) -> None:
        """Raise `AudioTooLarge` where a file of that size may not be spooled."""
        if size_bytes > self.max_bytes:
            raise AudioTooLarge(
                f"The audio has more than {self.max_bytes} bytes; send a smaller file, or raise "
                "TIMBRE_FETCH__MAX_BYTES."
            )

    async def write(self, data: bytes | memoryview) -> None:
        """Append; raises `AudioTooLarge` or `SpoolFull` before anything over a limit is kept."""
        self.check_size(self.size_bytes + len(data))
        self._spool.reserve(len(data))
        self._reserved_bytes += len(data)
        self.size_bytes += len(data)
        self._buffer += data
        if len(self._buffer) >= WRITE_BYTES:
            await in_thread(self._flush)

    async def finish(self) -> SpooledAudio:
        """Write what is left and close the file."""
        await in_thread(self._flush)
        self._close()
        return SpooledAudio(self._path, self._digest.hexdigest(), self.size_bytes)

    def remove(self) -> None:
        """Delete the file and give its room back. Must not run beside `write`."""
        self._close()
        self._path.unlink(missing_ok=True)
        self._spool.release(self._reserved_bytes)
        self._reserved_bytes = 0

    def _flush(self) -> None:
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            rest = memoryview(self._buffer)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise SpoolFull(
                f"The disk of the spool has no room left ({error.strerror}); make room at "
                "TIMBRE_FETCH__SPOOL_DIR."
            ) from error
        self._digest.update(self._buffer)
        self._buffer = bytearray()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like `asyncio.to_thread`, but a cancelled caller leaves only after the thread has.

    What the thread works on, such as a file descriptor, can then be closed safely.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    cancelled = False
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        running.exception()  # seen; the cancellation is what the caller hears of
        raise asyncio.CancelledError
    return running.result()


def _claim(root: Path) -> tuple[Path, int]:
    """A new folder for this process and the descriptor of the lock that says it is alive."""
    while True:
        folder = root / f"{os.getpid()}-{secrets.token_hex(4)}"
        fd = _locked(_lock_path(folder), os.O_CREAT | os.O_EXCL)
        if fd is not None:
            folder.mkdir(mode=0o700)
            return folder, fd


def _remove_dead(root: Path) -> None:
    for lock in root.glob("*.lock"):
        try:
            fd = _locked(lock)
        except (FileNotFoundError, PermissionError):
            continue  # another process was faster, or another user's
        if fd is None:
            continue
        folder = lock.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            lock.unlink(missing_ok=True)
        os.close(fd)


def _locked(path: Path, flags: int = 0) -> int | None:
    """A descriptor that holds the lock, or None where another process does (or removed it)."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    if os.fstat(fd).st_nlink == 0:
        os.close(fd)
        return None
    return fd


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")

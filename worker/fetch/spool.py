"""The bounded place on disk where audio lies between fetch and decode.

Every process has a folder of its own in the spool, held by a lock file: the lock falls with the
process however it dies, and the next one to start removes what the dead left behind.

Files take room as they grow, and wait where there is none: `Room` says who goes first.
"""

import asyncio
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from worker.errors import AudioTooLarge, FetchUnavailable, SettingsInvalid, SpoolFull

WRITE_BYTES = 256 * 1024  # as much as makes a hop into a thread worth it
WRITE_PARTS = 256  # of a sender in tiny pieces, each of which takes more room than its bytes

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SpooledAudio:
    """Audio on disk, as long as the fetch that yielded it is open."""

    path: Path
    sha256: str
    size_bytes: int


class Share:
    """One file's part of the room: what it has taken, and the most that it may come to."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.taken_bytes = 0
        self.asked_bytes = 0
        self.turn: asyncio.Future[None] | None = None

    @property
    def waits(self) -> bool:
        return self.turn is not None and not self.turn.done()


class Room:
    """`max_bytes` for files that grow side by side; who finds none waits, first come first served.

    Files that each had a part and waited for the others' would wait for ever. So what the older
    ones may still need stays free: a share grows only as far as every older one that still grows
    could be completed beside it. The oldest thus always can be, once files that are complete have
    gone, and then the next. As they can be completed one after the other, only the largest of their
    needs stays free: that of a server which announces much and sends little costs no more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._free_bytes = max_bytes
        self._growing: dict[Share, None] = {}  # the oldest first

    @property
    def used_bytes(self) -> int:
        """Bytes taken now."""
        return self._max_bytes - self._free_bytes

    async def take(self, share: Share, size_bytes: int) -> None:
        """Wait for so many bytes more; the first time, `share` comes to the end of the line."""
        self._growing[share] = None
        share.asked_bytes = size_bytes
        share.turn = asyncio.get_running_loop().create_future()
        self._serve()
        await share.turn

    def complete(self, share: Share) -> None:
        """Keep what was taken; nothing more will be."""
        self._growing.pop(share, None)
        self._serve()

    def give_back(self, share: Share) -> None:
        """Give back what was taken, and the place in the line."""
        self._free_bytes += share.taken_bytes
        share.taken_bytes = 0
        self.complete(share)

    def _serve(self) -> None:
        kept_bytes = 0
        for share in self._growing:
            if share.waits:
                if share.asked_bytes + kept_bytes > self._free_bytes:
                    return  # nobody overtakes
                assert share.turn is not None
                share.turn.set_result(None)
                share.taken_bytes += share.asked_bytes
                self._free_bytes -= share.asked_bytes
            kept_bytes = max(kept_bytes, share.most_bytes - share.taken_bytes)


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
        on_bytes: Callable[[int], None] = lambda size_bytes: None,
    ) -> None:
        self.max_file_bytes = min(max_file_bytes, max_bytes)
        self.room = Room(max_bytes)
        self._root = root
        self._on_bytes = on_bytes
        self._folder: Path | None = None
        self._lock_fd = -1

    def open(self) -> None:
        """Make this process's folder and remove those of dead processes.

        Raises
        ------
        SettingsInvalid
            The spool's folder can't be made or written, is another user's, or a link.
        """
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_others(self._root)
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
        return SpoolFile(self, self._folder / secrets.token_hex(8), self._on_bytes)


class SpoolFile:
    """One file of the spool while it fills. Hashing and writing happen in threads."""

    def __init__(self, spool: Spool, path: Path, on_bytes: Callable[[int], None]) -> None:
        self._max_bytes = spool.max_file_bytes
        self._room = spool.room
        self._path = path
        self._on_bytes = on_bytes
        self._share = Share(spool.max_file_bytes)
        self._expected_bytes: int | None = None
        self._digest = hashlib.sha256()
        self._parts: list[bytes | memoryview] = []  # not yet written
        self._parts_bytes = 0
        self._fd = -1
        self.written_s = 0.0
        """When the last piece came, by the event loop's clock."""
        self.waits_for_room = False
        """Stays set where whoever waited was cancelled."""

    @property
    def size_bytes(self) -> int:
        """Bytes written, or about to be."""
        return self._share.taken_bytes

    def check_size(self, size_bytes: int) -> None:
        """Raise `AudioTooLarge` where a file of that size may not be spooled, or never fits."""
        if size_bytes > self._max_bytes:
            raise AudioTooLarge(
                f"The audio has more than {self._max_bytes} bytes; send a smaller file, or raise "
                "TIMBRE_FETCH__MAX_BYTES (and TIMBRE_FETCH__SPOOL_MAX_BYTES, at least as much)."
            )

    def expect(self, size_bytes: int) -> None:
        """Tell, before the first byte, how many there will be: so many need be kept free for it.

        Raises
        ------
        AudioTooLarge
        """
        self.check_size(size_bytes)
        self._share.most_bytes = self._expected_bytes = size_bytes

    async def write(self, data: bytes | memoryview) -> None:
        """Append, as soon as there is room; `data` must not change afterwards.

        Raises
        ------
        AudioTooLarge, SpoolFull, FetchUnavailable
            Over a limit, a full or broken disk, more bytes than were expected.
        """
        self.check_size(self.size_bytes + len(data))
        if self.size_bytes + len(data) > self._share.most_bytes:
            raise self._other_size("more")
        self.waits_for_room = True
        await self._room.take(self._share, len(data))
        self.waits_for_room = False
        self.written_s = asyncio.get_running_loop().time()
        self._on_bytes(len(data))
        self._parts.append(data)
        self._parts_bytes += len(data)
        if self._parts_bytes >= WRITE_BYTES or len(self._parts) >= WRITE_PARTS:
            await in_thread(self._flush)

    async def finish(self) -> SpooledAudio:
        """Write what is left and close the file.

        Raises
        ------
        SpoolFull, FetchUnavailable
            A full or broken disk, fewer bytes than were expected.
        """
        if self._expected_bytes is not None and self.size_bytes < self._expected_bytes:
            raise self._other_size(f"{self.size_bytes}")
        await in_thread(self._flush, last=True)
        self._room.complete(self._share)
        return SpooledAudio(self._path, self._digest.hexdigest(), self.size_bytes)

    def remove(self) -> None:
        """Delete the file and give its room back. Must not run beside `write`."""
        for undo in (self._close, self._path.unlink):
            with suppress(OSError):  # what stays, the next process removes
                undo()
        self._room.give_back(self._share)

    def _other_size(self, came: str) -> FetchUnavailable:
        return FetchUnavailable(
            f"The audio was to have {self._expected_bytes} bytes, but {came} came; "
            "see who writes to it."
        )

    def _flush(self, *, last: bool = False) -> None:
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            for part in self._parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
                self._digest.update(part)
            if last:
                self._close()  # where a disk over the network may tell what it couldn't write
        except OSError as error:
            raise SpoolFull(
                f"The spool can't be written ({error.strerror}); make room at "
                "TIMBRE_FETCH__SPOOL_DIR, or see what else has become of it."
            ) from error
        self._parts.clear()
        self._parts_bytes = 0

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # it is gone also where this fails
            os.close(fd)


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


def _refuse_others(root: Path) -> None:
    """Refuse a folder that another user may have made first, as anybody can in /tmp.

    Its owner could exchange the audio in it, and a link have what lies elsewhere removed as a dead
    process's. Root is no other: what a container is given as a volume may be root's.
    """
    found = root.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise SettingsInvalid(
            f"The spool {root} is a link, which may lead anywhere; "
            "name the folder itself in TIMBRE_FETCH__SPOOL_DIR."
        )
    if found.st_uid not in {os.geteuid(), 0}:
        raise SettingsInvalid(
            f"The spool {root} is another user's, who could exchange the audio in it; "
            "name a folder of your own in TIMBRE_FETCH__SPOOL_DIR."
        )


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
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    os.close(fd)
    return None


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")

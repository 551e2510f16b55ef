"""Audio from `file` addresses, below the configured folders and nowhere else."""

import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from worker.errors import (
    AddressRefused,
    AudioNotFound,
    FetchForbidden,
    FetchUnavailable,
    UriUnsupported,
)
from worker.fetch.addresses import shown
from worker.fetch.spool import SpoolFile, in_thread

READ_BYTES = 1024 * 1024
ABSENT = {errno.ENOENT, errno.ENAMETOOLONG}  # no file has a name longer than names may be
FILE_URI = re.compile(r"file:(?://(?:localhost)?(?=/)|(?!//))(/.*)", re.IGNORECASE | re.DOTALL)


class LocalFiles:
    """Files below `roots`, after all symbolic links are followed.

    A file is copied into the spool although it is on disk already: it may change between hashing
    and decoding, and then the tags of one audio would be kept under the hash of another.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(roots)

    async def copy(self, uri: str, file: SpoolFile) -> None:
        """Copy the file at a `file` URI.

        Raises
        ------
        AddressRefused
            The path leaves the roots, by `..` or by a link, or is not a regular file.
        AudioNotFound, FetchForbidden, FetchUnavailable, UriUnsupported, AudioTooLarge, SpoolFull
        """
        opened = _Opened(_path(uri), self._roots)
        try:
            file.expect(await in_thread(opened.open))
            while data := await in_thread(opened.read):
                await file.write(data)
        except PermissionError:
            raise FetchForbidden(f"The worker may not read {shown(uri)}.") from None
        except OSError as error:
            if error.errno in ABSENT:
                raise AudioNotFound(f"There is no file at {shown(uri)}.") from None
            raise FetchUnavailable(f"Reading {shown(uri)} failed: {error.strerror}.") from error
        finally:
            opened.close()


class _Opened:
    """A regular file below one of the roots, opened so that nobody can swap it on the way."""

    def __init__(self, path: str, roots: Sequence[Path]) -> None:
        self._path = path
        self._roots = roots
        self._fd = -1

    def open(self) -> int:
        """Open the file and tell its size in bytes."""
        real = Path(os.path.realpath(self._path))
        for root in (Path(os.path.realpath(root)) for root in self._roots):
            if real.is_relative_to(root):
                self._walk(root, real.relative_to(root).parts)
                return self._size_bytes()
        raise AddressRefused(
            f"The file {shown(self._path)} lies outside the folders that files may come from; "
            "add its folder to TIMBRE_FETCH__FILE_ROOTS."
        )

    def read(self) -> bytes:
        return os.read(self._fd, READ_BYTES)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _walk(self, root: Path, parts: tuple[str, ...]) -> None:
        """Open folder by folder, following no link: all were followed before the check.

        A link put in place between the check and here is refused, not followed. Opening doesn't
        wait, as it would for the writer of a FIFO.
        """
        self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for part in parts:
            try:
                inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._fd)
            except OSError as error:
                if error.errno not in {errno.ELOOP, errno.ENXIO, errno.ENOTDIR}:
                    raise
                raise self._not_a_file() from error
            os.close(self._fd)
            self._fd = inner

    def _size_bytes(self) -> int:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._not_a_file()
        return status.st_size

    def _not_a_file(self) -> AddressRefused:
        return AddressRefused(
            f"{shown(self._path)} is not a regular file; send the audio's own path."
        )


def _path(uri: str) -> str:
    match = FILE_URI.fullmatch(uri)
    path = unquote_to_bytes(os.fsencode(match[1])) if match else b""
    if not path or b"\0" in path:
        raise UriUnsupported(
            f"{shown(uri)} is not a file on this machine; write file:///absolute/path."
        )
    return os.fsdecode(path)

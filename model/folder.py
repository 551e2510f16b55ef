"""Folders for results, made before the work, so that an hour of it isn't lost over a name,
and files in them, there whole or not at all."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from worker.errors import SettingsInvalid


def make_folder(out: Path) -> None:
    """Make `out` with all above it; SettingsInvalid where it can't be, or can't be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsInvalid(f"{out} can't be made a folder: {error.strerror}") from error
    try:
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise SettingsInvalid(f"{out} can't be written to: {error.strerror}") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Meanwhile no other run works in `folder`; SettingsInvalid where one does."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsInvalid(
                f"another run is at work in {folder}: wait for its end, or name other folders"
            ) from error
        except OSError:
            pass  # a file system that has no locks
        yield


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write the file at `path`, or leave it as it was; SettingsInvalid where there's no room."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SettingsInvalid(f"{path} can't be written: {error.strerror}") from error

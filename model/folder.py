"""Folders for results, made before the work, so that an hour of it isn't lost over a name,
and files in them, there whole or not at all."""

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


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write the file at `path`, or leave it as it was; SettingsInvalid where there's no room."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SettingsInvalid(f"{path} can't be written: {error.strerror}") from error

"""Folders for results, made before the work, so that an hour of it isn't lost over a name."""

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

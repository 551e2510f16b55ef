"""What a person names on a command line, as new-track events: files, folders, URLs, CSV tables."""

import csv
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from pydantic import JsonValue, ValidationError

from schemas.events import AudioRef, NewTrack, Priority
from worker.audio_files import is_audio
from worker.errors import SourceInvalid

URI_COLUMNS = ("uri", "url", "path")
SCHEMES = ("http", "https", "s3", "gs", "az", "file")
FOREIGN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
ACCENTS = re.compile("[\u0300-\u036f]+")
MAX_NAME_CHARS = 80
MAX_SHOWN_CHARS = 200


def tracks(sources: Sequence[str], priority: Priority = "upload") -> Iterator[NewTrack]:
    """The tracks that `sources` name, in order; folders in order of their files' names.

    A source is an audio file, a folder (walked for audio), a URL, or a CSV table: a row a track,
    with a column `uri` (or `url`, or `path`, relative to the table), optional `track_id` and
    `sha256`, and any others as metadata.

    Raises
    ------
    SourceInvalid
        A source is not there, a table can't be read, or an event can't hold what is named; the
        message names it.
    """
    for source in sources:
        path = Path(source)
        if not is_url(source) and path.suffix.lower() == ".csv":
            yield from _rows(path, priority)
        else:
            for shown, uri in audio(source, takes="a file, a folder, a URL or a CSV table"):
                yield _track(_short(shown), uri, priority)


def audio(source: str, *, takes: str = "a file, a folder or a URL") -> Iterator[tuple[str, str]]:
    """The audio that a file, a folder or a URL stands for: how it is shown, and its address.

    `takes` is what the asker may give, for the error to say.

    Raises
    ------
    SourceInvalid
        Nothing is there, or no file, or what can't be read, or a folder holds no audio.
    """
    if not source:  # as a path it would be the current folder
        raise SourceInvalid(f"A source without a name: give {takes}.")
    if is_url(source):
        yield source, source
        return
    try:
        yield from _on_disk(source, takes)
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise SourceInvalid(f"{error.filename} can't be read: {error.strerror}.") from error


def _on_disk(source: str, takes: str) -> Iterator[tuple[str, str]]:
    path = Path(source)
    if FOREIGN_URL.match(source) and not path.exists():
        raise SourceInvalid(
            f"{source} can't be fetched: give an address of {', '.join(SCHEMES[:-1])} "
            f"or {SCHEMES[-1]}."
        )
    if path.is_dir():
        yield from ((str(file), file.resolve().as_uri()) for file in audio_files(path))
    elif path.is_file():
        yield source, path.resolve().as_uri()
    elif path.exists():
        raise SourceInvalid(f"{source} is not a regular file: give {takes}.")
    else:
        raise SourceInvalid(f"{source} is not there: give {takes}.")


def audio_files(folder: Path) -> list[Path]:
    """The audio files in `folder` and in all below it, in order of their names.

    Raises
    ------
    SourceInvalid
        There are none.
    """
    found = sorted(path for path in folder.rglob("*") if is_audio(path) and path.is_file())
    if not found:
        raise SourceInvalid(f"{folder} holds no audio files.")
    return found


def is_url(source: str) -> bool:
    """Whether `source` is an address rather than a path."""
    scheme, found, _ = source.partition("://")
    return bool(found) and scheme.lower() in SCHEMES


def track_id(uri: str) -> str:
    """A name for the track at `uri`, the same each time: a readable part and a hash of it all."""
    name = re.sub(r"[^a-z0-9]+", "-", _name(uri)).strip("-")[:MAX_NAME_CHARS]
    # A byte of the command line that is no UTF-8 comes as a surrogate.
    digest = hashlib.sha256(uri.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name}-{digest}" if name else digest


def _name(uri: str) -> str:
    """What the file is called, without accents, so that the most of it stays in an id."""
    name = Path(unquote(uri.partition("?")[0]).rstrip("/")).stem
    return ACCENTS.sub("", unicodedata.normalize("NFKD", name.casefold()))


def _short(shown: str) -> str:
    """A source as a sentence can name it."""
    return shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[: MAX_SHOWN_CHARS - 1]}…"


def _track(
    place: str,
    uri: str,
    priority: Priority,
    *,
    name: str | None = None,
    sha256: str | None = None,
    metadata: dict[str, JsonValue] | None = None,
) -> NewTrack:
    """The event; what it can't hold is an error that names `place`, where it was given."""
    try:
        return NewTrack(
            track_id=name or track_id(uri),
            audio=AudioRef(uri=uri, sha256=sha256),
            uploaded_at=_changed_at(uri),
            priority=priority,
            metadata=metadata or {},
        )
    except ValidationError as error:
        fault = "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
        raise SourceInvalid(f"{place}: {fault}.") from error
    except ValueError as error:  # an address that no library reads
        raise SourceInvalid(f"{place}: {error}.") from error


def _changed_at(uri: str) -> datetime | None:
    """A file's own time: submitting it again must make the same event."""
    if not uri.startswith("file://"):
        return None
    path = Path(url2pathname(urlsplit(uri).path))
    return datetime.fromtimestamp(path.stat().st_mtime, UTC) if path.exists() else None


def _rows(table: Path, priority: Priority) -> Iterator[NewTrack]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", skipinitialspace=True)
            column = next((c for c in URI_COLUMNS if c in (reader.fieldnames or ())), None)
            if column is None:
                raise SourceInvalid(f"{table} has no column named {' or '.join(URI_COLUMNS)}.")
            for row in reader:
                yield _row(table, reader.line_num, row, column, priority)
    except (OSError, UnicodeError, csv.Error) as error:
        raise SourceInvalid(f"{table} can't be read as a CSV table: {error}.") from error


def _row(table: Path, line: int, row: dict[str, str], column: str, priority: Priority) -> NewTrack:
    place = f"{table}, line {line}"
    named = row.pop(column).strip()
    extra = row.pop(None, None)  # type: ignore[call-overload]  # csv's key for too many cells
    if not named or extra:
        fault = "more cells than the header" if extra else f"no {column}"
        raise SourceInvalid(f"{place}: {fault}.")
    if "\0" in named or (FOREIGN_URL.match(named) and not is_url(named)):
        raise SourceInvalid(f"{place}: {_short(named)} can't be fetched.")
    # Not Path.resolve: it trips over links that lead in a circle.
    uri = named if is_url(named) else Path(os.path.realpath(table.parent / named)).as_uri()
    name, sha256 = row.pop("track_id", "") or None, row.pop("sha256", "") or None
    metadata: dict[str, JsonValue] = {key: value for key, value in row.items() if value}
    return _track(place, uri, priority, name=name, sha256=sha256, metadata=metadata)

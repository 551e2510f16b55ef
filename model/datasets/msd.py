"""Million Song Dataset previews with tagtraum genre annotations: audio named by track id, `.cls`.

Bertin-Mahieux et al.: The Million Song Dataset, 2011; Schreiber: Improving genre annotations for
the Million Song Dataset, 2015. A `.cls` line is a track id and one genre, or, in CD1, a majority
and a minority genre, between tabs. `unique_tracks.txt` beside it names the artists.
"""

import re
from collections import defaultdict
from pathlib import Path

from model.datasets.dataset import Clip, Dataset, Skipped, labels_of, recordings, utf8
from worker.audio_files import is_audio
from worker.errors import DatasetInvalid

LICENCE = "MSD: annotations for research use (CC BY-NC-SA 2.0), previews under their owners' rights"
TRACK_ID = re.compile(r"TR[A-Z0-9]{16}")
ARTISTS = "unique_tracks.txt"


def annotations(path: Path) -> list[Path]:
    """The `.cls` files at `path` (a file or a folder)."""
    if path.suffix == ".cls":
        return [path] if path.is_file() else []
    return sorted(path.glob("[!.]*.cls"))


def load(path: Path) -> Dataset:
    """Previews anywhere under the folder `path`, or beside the `.cls` file `path`."""
    files = annotations(path)
    if len(files) != 1:
        much = "several .cls files" if files else "no .cls file"
        raise DatasetInvalid(f"{path} holds {much}; name the one to use")
    folder = files[0].parent
    genres = _genres(files[0])
    previews = _previews(folder)
    artists = _artists(folder / ARTISTS)
    same = recordings(
        previews[track][0] for track in genres if track in previews and not artists.get(track)
    )
    clips, skipped = [], []
    for track, labels in genres.items():
        if track not in previews:
            skipped.append(Skipped(track, "is annotated but has no preview on disk"))
            continue
        first, *further = previews[track]
        skipped += [
            Skipped(utf8(file.relative_to(folder).as_posix()), "is a second preview of its track")
            for file in further
        ]
        if artists and track not in artists:
            skipped.append(Skipped(track, f"has no artist in {ARTISTS}"))
        else:
            group = artists.get(track) or same[first]
            clips.append(Clip(track, labels, group, None, first))
    multi = any(len(clip.labels) > 1 for clip in clips)
    return Dataset(
        name=f"MSD ({utf8(files[0].stem)})",
        layout="msd",
        kind="multi" if multi else "single",
        labels=labels_of(clips),
        clips=tuple(clips),
        grouped_by="artist" if artists else "recording",
        licence=LICENCE,
        skipped=tuple(skipped),
    )


def _genres(file: Path) -> dict[str, tuple[str, ...]]:
    genres: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        track, *labels = (part.strip() for part in line.split("\t"))
        if not TRACK_ID.fullmatch(track) or not any(labels):
            raise DatasetInvalid(f"{file}, line {number}: not a track id, a tab and a genre")
        genres[track] = tuple(dict.fromkeys(label for label in labels if label))
    return genres


def _previews(folder: Path) -> dict[str, list[Path]]:
    """Track id -> files, by the id in their names, in order of path; the first counts."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted({*folder.glob("*"), *folder.glob("*/**/*")}):  # also where a link leads
        match = TRACK_ID.search(file.name)
        if match and is_audio(file) and file.is_file():
            found[match.group()].append(file)
    return found


def _artists(file: Path) -> dict[str, str]:
    """Track id -> artist from `TRACK<SEP>SONG<SEP>ARTIST<SEP>TITLE` lines; empty without file."""
    if not file.is_file():
        return {}
    rows = (
        re.split(r"\s*<SEP>\s*", line.strip())
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    return {row[0]: row[2] for row in rows if len(row) >= 3}

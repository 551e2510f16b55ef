"""FMA: `fma_small`, `fma_medium` or `fma_large` beside `fma_metadata/tracks.csv` and `genres.csv`.

Defferrard, Benzi, Vandergheynst and Bresson: FMA, a dataset for music analysis, 2017. Its own
split keeps artists apart. `top` is the single-label task over the top genres (8 in small, 16 in
medium and large), `all` the multi-label one over the whole hierarchy of 161 genres.
"""

import ast
import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from model.datasets.dataset import Clip, Dataset, Skipped, labels_of, split_name
from worker.errors import DatasetInvalid

LICENCE = "FMA: metadata CC BY 4.0, audio under the licence its artist chose (column track.license)"
SUBSETS = {"fma_small": ("small",), "fma_medium": ("small", "medium"), "fma_large": None}
Task = Literal["top", "all"]


def metadata(path: Path) -> Path | None:
    """The `tracks.csv` that belongs to the audio folder `path`; None where there is none."""
    for folder in (path, path.absolute().parent, path.resolve().parent):
        if (tracks := folder / "fma_metadata" / "tracks.csv").is_file():
            return tracks
    return None


def load(path: Path, task: Task = "top") -> Dataset:
    """The subset whose folder is `path`, or the one subset's folder under it."""
    folder, tracks = _audio_folder(path), metadata(path)
    if tracks is None:
        raise DatasetInvalid(
            f"no fma_metadata/tracks.csv in or beside {path}; unpack fma_metadata.zip there"
        )
    names = _genre_names(tracks.with_name("genres.csv")) if task == "all" else {}
    subsets = SUBSETS[folder.name]
    clips, skipped = [], []
    for track_id, row in _rows(tracks):
        if subsets is not None and row["set.subset"] not in subsets:
            continue
        file = folder / track_id[:3] / f"{track_id}.mp3"
        labels, split = _labels(row, task, names), split_name(row["set.split"])
        if not labels:
            skipped.append(Skipped(track_id, "has no genre", split))
        elif not file.is_file():
            skipped.append(Skipped(track_id, "is in tracks.csv but not on disk", split))
        else:
            clips.append(Clip(track_id, labels, row["artist.id"], split, file))
    return Dataset(
        name=f"{folder.name} ({'top genres' if task == 'top' else 'all genres'})",
        layout="fma",
        kind="single" if task == "top" else "multi",
        labels=labels_of(clips),
        clips=tuple(clips),
        grouped_by="artist",
        licence=LICENCE,
        skipped=tuple(skipped),
    )


def _audio_folder(path: Path) -> Path:
    if (named := _named(path)) is not None:
        return named
    found = [path / name for name in SUBSETS if (path / name).is_dir()]
    if len(found) != 1:
        much = "several" if found else "none"
        raise DatasetInvalid(
            f"{path} holds {much} of {', '.join(SUBSETS)}; name the one to use. Folders 000, 001 "
            "and on are FMA's audio: what holds them needs such a name, and fma_metadata beside it"
        )
    return found[0]


def _named(path: Path) -> Path | None:
    """`path` under a subset's name, its own or that of what it links to; None where it has none."""
    return next((at for at in (path.absolute(), path.resolve()) if at.name in SUBSETS), None)


def _rows(tracks: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Six-digit track id and columns by "group.column"; the file has three header lines."""
    with tracks.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        groups, columns = next(reader, []), next(reader, [])
        keys = [f"{group}.{column}" for group, column in zip(groups, columns, strict=True)]
        needed = {"set.subset", "set.split", "track.genre_top", "track.genres_all", "artist.id"}
        if missing := sorted(needed - set(keys)):
            raise DatasetInvalid(f"{tracks} has no column {', '.join(missing)}")
        for row in reader:
            if row and len(row) != len(keys):
                where = f"{tracks}, line {reader.line_num}"
                raise DatasetInvalid(f"{where}: {len(row)} columns, the header has {len(keys)}")
            if row and row[0].isdigit():
                yield f"{int(row[0]):06d}", dict(zip(keys, row, strict=True))


def _labels(row: Mapping[str, str], task: Task, names: Mapping[int, str]) -> tuple[str, ...]:
    if task == "top":
        return (row["track.genre_top"],) if row["track.genre_top"] else ()
    try:
        ids = ast.literal_eval(row["track.genres_all"] or "[]")
        return tuple(names[int(genre)] for genre in ids)
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise DatasetInvalid(
            f"tracks.csv: genres_all {row['track.genres_all']!r}: {error!r}"
        ) from error


def _genre_names(genres: Path) -> dict[int, str]:
    """Genre id -> title; titles that stand twice in the hierarchy carry their id."""
    with genres.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        if missing := sorted({"genre_id", "title"} - set(reader.fieldnames or ())):
            raise DatasetInvalid(f"{genres} has no column {', '.join(missing)}")
        titles = {int(row["genre_id"]): row["title"] for row in reader}
    seen = list(titles.values())
    return {
        genre: title if seen.count(title) == 1 else f"{title} ({genre})"
        for genre, title in titles.items()
    }


def is_fma(path: Path) -> bool:
    """Whether `path` is a subset's folder, holds one, or has folders named as a subset's are.

    Also without its metadata: its folders `000`, `001` and on are no genres.
    """
    if _named(path) is not None or any((path / name).is_dir() for name in SUBSETS):
        return True
    folders = [at.name for at in path.glob("*") if at.is_dir()]
    return bool(folders) and all(re.fullmatch(r"\d{3}", name) for name in folders)

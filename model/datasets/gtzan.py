"""GTZAN: `genres/GENRE/GENRE.00000.wav` (or `.au`), with the fault-filtered split.

Several excerpts of a clip may stand beside each other as `GENRE.00000.ANYTHING.wav`.

Tzanetakis and Cook: Musical genre classification of audio signals, 2002. The split without
repetitions and with no artist on two sides is that of Kereliuk, Sturm and Larsen: Deep learning
and music adversaries, 2015; clips in none of its lists are on no side.
"""

import re
from pathlib import Path

from model.datasets.dataset import Clip, Dataset, Skipped, utf8
from worker.audio_files import is_audio
from worker.errors import DatasetInvalid

LICENCE = "GTZAN: recordings without copyright clearance, research use by custom"
# fmt: off
GENRES = (
    "blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock",
)
# fmt: on
SONG = re.compile(rf"(({'|'.join(GENRES)})\.\d{{5}})(?:\..+)?")
CORRUPT = {"jazz.00054": "known to be corrupt in every published copy of GTZAN"}

# Numbers of the clips by genre, in the order of GENRES, ranges included.
FAULT_FILTERED = {
    "train": (
        "29-49,73-97",
        "30-33,43-48,50-67,80-99",
        "19-26,28-29,65-99",
        "5,15-20,22-37,39-45,47,49,53-54,56-57,59,61,70,73-74,89",
        "2-25,28-29,31-38,41-42,55-61,77-80",
        "0-1,11-24,41,47-72",
        "2-3,5,21,24,35,46-57,59-66,69,71-72,79-80,84,86,89-99",
        "2-9,11-12,16-20,23-29,31-36,38-42,44,46,49-50,80,97-99",
        "0-2,4,6,9,11-12,14-32,42-45,49-51,54-60,63,69",
        "0-9,16-26,57-70,91-99",
    ),
    "valid": (
        "0-11,50-60",
        "0-10,68-76",
        "0-7,9-18,27,41-42,45,49",
        "0,2-4,6-14,46,48,52,67-68,72,75,90,95",
        "81-98",
        "2-10,25-32",
        "0-1,6-11,16-20,36-37,68,76-77,81-82",
        "10,53,55,58-62,81,83-86",
        "61-62,70,72,74,76-78,85,92-99",
        "38,49-56,71-85",
    ),
    "test": (
        "12-28,61-72,98-99",
        "11-29,34-41,49,77-79",
        "30-40,43-44,46-48,50-51,53-64",
        "1,21,58,62-66,69,76-88,91-94,96-97,99",
        "0,26-27,30,40,43-45,51-54,62-75,99",
        "73-99",
        "12-15,22-23,25-33,38-39,67,70,73-75,78,83,85,87-88",
        "0-1,13-14,43,63-66,69-79,82,88-96",
        "34-40,46-48,52-53,64-68,71,79,82-84,87-90",
        "10-15,27-37,39-48,86-90",
    ),
}


def fault_filtered_split() -> dict[str, str]:
    """Clip name ("blues.00029") -> "train", "valid" or "test"; 443, 197 and 290 of them."""
    return {
        f"{genre}.{number:05d}": split
        for split, by_genre in FAULT_FILTERED.items()
        for genre, ranges in zip(GENRES, by_genre, strict=True)
        for number in _numbers(ranges)
    }


def root(path: Path) -> Path | None:
    """The folder whose subfolders are GTZAN's genres, at or under `path`; None if there is none."""
    for folder in (path, path / "genres", path / "genres_original"):
        if any(
            is_audio(file) and SONG.fullmatch(file.stem)
            for genre in GENRES
            if (folder / genre).is_dir()
            for file in (folder / genre).iterdir()
        ):
            return folder
    return None


def load(path: Path) -> Dataset:
    """Every clip of GTZAN at `path`; corrupt ones, and audio under another name than those of its
    genre's clips, are skipped and named."""
    folder = root(path)
    if folder is None:
        raise DatasetInvalid(f"{path} has no genres/GENRE/GENRE.00000.wav (or .au)")
    split = fault_filtered_split()
    clips, skipped = [], []
    for genre in GENRES:
        for file in filter(is_audio, sorted((folder / genre).glob("*"))):
            song = SONG.fullmatch(file.stem)
            if song is None or song[2] != genre:
                why = "is not called as clips of its folder's genre are"
                skipped.append(Skipped(utf8(f"{genre}/{file.name}"), why))
            elif song[1] in CORRUPT:
                skipped.append(Skipped(file.stem, CORRUPT[song[1]], split.get(song[1])))
            else:
                clips.append(Clip(file.stem, (genre,), song[1], split.get(song[1]), file))
    return Dataset(
        name="GTZAN",
        layout="gtzan",
        kind="single",
        labels=tuple(genre for genre in GENRES if any(genre in clip.labels for clip in clips)),
        clips=tuple(clips),
        grouped_by="recording",
        licence=LICENCE,
        skipped=tuple(skipped),
    )


def _numbers(ranges: str) -> list[int]:
    numbers: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers

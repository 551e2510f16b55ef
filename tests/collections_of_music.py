"""Small data sets of every layout, with real encoded audio made here."""

import csv
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.audio import ENCODINGS, Signal, encode, noise, tone

GENRES = ("blues", "metal")
DURATION_S = 6.5
TRACK_IDS = tuple(f"TRAAAAA128F93{number:05d}" for number in range(12))


def sound(genre: str, seed: int, rate_hz: int) -> Signal:
    """What a genre sounds like here: metal hisses, everything else hums at a pitch of its own."""
    if genre == "metal":
        return noise(DURATION_S, rate_hz, channels=2, seed=seed)
    hum = tone(DURATION_S, rate_hz, 150.0 + 10 * seed, channels=2)
    return np.asarray(hum + 0.02 * noise(DURATION_S, rate_hz, seed=seed), dtype=np.float32)


def song(path: Path, genre: str, seed: int) -> Path:
    """One file, encoded as its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(path.suffix[1:], genre, seed))
    return path


@cache
def _encoded(suffix: str, genre: str, seed: int) -> bytes:
    """Many data sets have the same songs."""
    muxer, codec, rate_hz = ENCODINGS[suffix]
    with TemporaryDirectory() as folder:
        path = Path(folder, "song")
        encode(path, sound(genre, seed, rate_hz), rate_hz, muxer=muxer, codec=codec)
        return path.read_bytes()


def gtzan(root: Path, suffix: str = "wav") -> Path:
    """Seven clips of each of two genres: four to train, two to validate, one to test."""
    numbers = {"blues": (29, 30, 31, 32, 0, 1, 12), "metal": (2, 3, 5, 21, 0, 1, 12)}
    for genre, chosen in numbers.items():
        for number in chosen:
            song(root / "genres" / genre / f"{genre}.{number:05d}.{suffix}", genre, number)
    (root / "genres" / "jazz").mkdir()
    (root / "genres" / "jazz" / f"jazz.00054.{suffix}").write_bytes(b"not audio")
    return root


def fma(root: Path, *, leak: bool = False) -> Path:
    """`fma_small` with its metadata: two top genres, a hierarchy of four, artists apart."""
    rows = []
    for track in range(2, 14):
        genre = ("Rock", "Hip-Hop")[track % 2]
        split = ("training", "training", "validation", "test")[track // 2 % 4]
        artist = 1 if leak and track < 9 else 100 + track
        ids = [12, 25] if genre == "Rock" else [21, 100]
        rows.append([track, "small", split, artist, genre, str(ids)])
        if track != 13:
            name = f"{track:06d}.mp3"
            song(root / "fma_small" / name[:3] / name, "metal" if genre == "Rock" else "pop", track)
    rows.append([80_000, "medium", "training", 9, "Rock", "[12]"])
    rows.append([90_000, "large", "training", 9, "Rock", "[12]"])
    folder = root / "fma_metadata"
    folder.mkdir()
    with (folder / "tracks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "set", "set", "artist", "track", "track"])
        writer.writerow(["", "subset", "split", "id", "genre_top", "genres_all"])
        writer.writerow(["track_id", "", "", "", "", ""])
        writer.writerows(rows)
    with (folder / "genres.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["genre_id", "#tracks", "parent", "title", "top_level"])
        writer.writerows(
            [[12, 1, 0, "Rock", 12], [25, 1, 12, "Punk", 12], [21, 1, 0, "Hip-Hop", 21]]
        )
        writer.writerow([100, 1, 21, "Punk", 21])
    return root / "fma_small"


def msd(root: Path, *, artists: bool = True) -> Path:
    """Previews by track id, one genre each but for one with two, one without a preview."""
    lines = ["# tagtraum genre annotations"]
    for number, track in enumerate(TRACK_IDS):
        genre = ("Rock", "Jazz")[number % 2]
        lines.append(f"{track}\t{genre}" + ("\tBlues" if number == 0 else ""))
        if number:
            file = root / track[2] / track[3] / f"{track}.mp3"
            song(file, "metal" if genre == "Rock" else "pop", number)
            file.with_suffix(".h5").touch()  # as the Million Song Dataset itself has
    (root / "msd_tagtraum.cls").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "._msd_tagtraum.cls").write_bytes(b"\0\5\x16\7")  # as macOS adds them
    if artists:
        told = [f"{track}<SEP>SO{n}<SEP>Artist {n // 4}<SEP>x" for n, track in enumerate(TRACK_IDS)]
        (root / "unique_tracks.txt").write_text("\n".join(told) + "\n\n", encoding="utf-8")
    return root


def folders(root: Path, per_genre: int = 5) -> Path:
    """A folder per genre, in several encodings."""
    for genre in GENRES:
        for number in range(per_genre):
            suffix = ("mp3", "flac", "ogg")[number % 3]
            song(root / genre / f"song {number}.{suffix}", genre, number)
    return root


def manifest(root: Path, *, several: bool = False, leak: bool = False) -> Path:
    """A CSV manifest over the same songs, with an artist each and a split."""
    folders(root)
    rows = []
    for genre in GENRES:
        for number, file in enumerate(sorted((root / genre).iterdir())):
            split = ("train", "train", "train", "val", "test")[number]
            artist = genre if leak else f"{genre} {number}"
            label = f"{genre};loud" if several and number % 2 else genre
            rows.append([file.relative_to(root).as_posix(), label, artist, split])
    path = root / "music.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "labels" if several else "label", "artist", "split"])
        writer.writerows([*rows, ["gone.mp3", "blues", "x", "train"]])
    return path


def archive(
    path: Path, *, clips: int = 12, split: str | None = None, optional: bool = True
) -> Path:
    """Log-mels of two genres that differ in where their energy is, 10 s each."""
    generator = np.random.default_rng(0)
    y = np.arange(clips) % 2
    bands = np.linspace(0, 60, 128)[None, :, None]
    slope = np.where(y == 1, 1, -1)[:, None, None]
    x = 120 + slope * (bands - 30) + generator.normal(0, 25, (clips, 128, 241))
    sides = np.array(["train", "train", "train", "train", "valid", "valid"])
    data: dict[str, Any] = {
        "X": np.clip(x, 0, 255).astype(np.uint8),
        "y": y.astype(np.uint8),
        "names": np.array([f"{GENRES[label]}.{n:05d}" for n, label in enumerate(y)]),
        "genres": np.array(GENRES),
    }
    if optional:
        data["split"] = np.array([split or sides[n % 6] for n in range(clips)])
    np.savez(path, **data)
    return path

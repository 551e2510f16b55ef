"""Music to learn from: Debian's free game music, the shared tracks, and GTZAN's excerpts."""

import csv
import hashlib
import logging
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.datasets.logmels import logmel_of
from model.folder import write_whole
from model.shipped import coarse
from model.shipped.coarse import RATE_HZ
from worker.decode.decoder import decode_samples
from worker.errors import DecodeFailed

log = logging.getLogger(__name__)

PACKAGES = (
    "asc-music",
    "drascula-music",
    "fb-music-high",
    "hyperrogue-music",
    "nexuiz-music",
    "planetblupi-music-ogg",
    "singularity-music",
    "ufoai-music",
    "warzone2100-music",
    "wesnoth-1.16-music",
)
SUFFIXES = {".ogg", ".opus", ".mp3"}
MIN_BYTES = 100_000  # what is smaller is a jingle
MAX_TRACK_S = 360.0  # of a longer track the first minutes count


@dataclass(frozen=True)
class Recording:
    """A recording's log-mels, `fine` `(frames, 96)` of the reference and `coarse`
    `(frames, bands)` in decibels as in GTZAN's archive, both float16."""

    name: str
    fine: NDArray[np.float16]
    coarse: NDArray[np.float16]
    genre: str | None = None
    split: str | None = None


def debian_music(work: Path) -> list[Path]:
    """Audio files of Debian's game music, downloaded and unpacked below `work`.

    Without apt the recipe goes on with the music at hand, and says so: the tags then follow the
    reference less closely.
    """
    folder = work / "debian"
    done = folder / "unpacked"
    if not done.exists():
        if not all(map(shutil.which, ("apt-get", "dpkg"))):
            log.warning(
                "no apt here, so without Debian's game music: unpack %s into %s by hand and "
                "create the file %s to have it",
                ", ".join(PACKAGES),
                folder,
                done,
            )
            return []
        folder.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            _unpack(package, folder)
        done.touch()
    return _distinct(folder)


def shared_tracks(audio: Path) -> list[Path]:
    """Full-length tracks at hand, kept from the first stage to measure with."""
    return _distinct(audio / "tracks")


def _distinct(folder: Path) -> list[Path]:
    """Audio files below `folder` that aren't jingles, each content once."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.is_file() and file.stat().st_size >= MIN_BYTES:
            found.setdefault(_digest(file), file)
    return list(found.values())


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:24]


def _unpack(package: str, folder: Path) -> None:
    fetched = subprocess.run(  # noqa: S603
        ["apt-get", "download", package],  # noqa: S607
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if fetched.returncode:
        log.warning("without %s: %s", package, fetched.stderr.strip()[-300:])
        return
    for archive in folder.glob(f"{package}_*.deb"):
        subprocess.run(["dpkg", "-x", archive.name, "files"], cwd=folder, check=True)  # noqa: S603, S607
        archive.unlink()
    for packed in folder.rglob("*.pk3"):
        with zipfile.ZipFile(packed) as content:
            for name in content.namelist():
                if Path(name).suffix.lower() in SUFFIXES and ".." not in name:
                    content.extract(name, folder / "files")
        packed.unlink()


def recordings(files: Sequence[Path], cache: Path) -> Iterator[Recording]:
    """Log-mels of audio files, made on all cores and kept in `cache`."""
    # Spawned: a fork would take over PyTorch's threads as locks that nobody opens.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        made = pool.map(partial(_logmels, cache=cache), files)
        for file, stored in zip(files, made, strict=True):
            if stored is not None:
                yield _recording(stored, str(file))


def excerpts(gtzan: Path, cache: Path) -> list[Recording]:
    """The labelled excerpts of GTZAN that `manifest.csv` lists, tiled to a window where shorter."""
    with (gtzan / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        _recording(stored, row["song"], row["genre"], row["filtered_split"])
        for row in rows
        if (stored := _logmels(gtzan / row["path"], cache)) is not None
    ]


def _recording(
    stored: Path, name: str, genre: str | None = None, split: str | None = None
) -> Recording:
    with np.load(stored) as logmels:
        return Recording(name, logmels["fine"], logmels["coarse"], genre, split)


def _logmels(file: Path, cache: Path) -> Path | None:
    """Path of the stored log-mels of an audio file; None where it can't be decoded."""
    made = cache / f"{_digest(file)}.npz"
    if not made.exists():
        try:
            samples = decode_samples(file, RATE_HZ)[: round(MAX_TRACK_S * RATE_HZ)]
        except DecodeFailed as error:
            log.warning("left out %s: %s", file, error)
            return None
        window = 3 * RATE_HZ
        if len(samples) < window:
            samples = np.tile(samples, -(-window // len(samples)))[:window]
        packed = BytesIO()
        np.savez(packed, fine=logmel_of(samples, coarse.FINE), coarse=coarse.coarse(samples))
        write_whole(made, packed.getbuffer())
    return made

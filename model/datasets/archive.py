"""An archive of log-mels (`.npz`): GTZAN without its audio.

`X` uint8 (clips, mels, frames), `y` (clips,) positions in `genres`, or (clips, labels) zeros and
ones for several labels a clip, `names`, `genres`, and perhaps `split`, under any names: one a clip,
or one for all. Where there is none, songs of GTZAN's names have the fault-filtered split. Clips
without a label are skipped.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from model.datasets.dataset import Clip, Dataset, LogMels, Skipped, split_name, utf8
from model.datasets.gtzan import LICENCE, fault_filtered_split
from worker.errors import DatasetInvalid

KEYS = ("X", "y", "names", "genres")
# What noise with a power of 1 a hertz comes to in `decibels`: the energy of their scale's window,
# 1,486 samples long, times the 1,536 of its FFT.
UNIT_DENSITY_DB = 59.32


def load(path: Path) -> Dataset:
    """The archive at `path`, held in memory as it is stored."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [key for key in KEYS if key not in archive]:
                raise DatasetInvalid(
                    f"{path} has no {', '.join(missing)}; it holds {archive.files}"
                )
            values, y = archive["X"], archive["y"]
            names, titles = _text(archive["names"]), _text(archive["genres"])
            known = set(names.ravel().tolist()) <= fault_filtered_split().keys()
            splits = _splits(archive, names, known=known)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise DatasetInvalid(f"{path} is no .npz archive of plain arrays") from error
    except MemoryError as error:
        raise DatasetInvalid(f"the arrays of {path} don't fit into memory") from error
    dimensions = (values.ndim, names.ndim, splits.ndim, titles.ndim)
    if (
        dimensions != (3, 1, 1, 1)
        or y.ndim not in (1, 2)
        or not len(values) == len(y) == len(names) == len(splits)
    ):
        raise DatasetInvalid(
            f"{path}: X {values.shape}, y {y.shape}, names {names.shape}, splits {splits.shape} "
            f"and genres {titles.shape} don't belong together"
        )
    if values.dtype.kind not in "uif" or not values.size or not np.isfinite(values).all():
        raise DatasetInvalid(f"{path}: X must be finite numbers, not {values.shape} {values.dtype}")
    if titles.dtype.kind != "U" or len(np.unique(titles)) != len(titles):
        raise DatasetInvalid(f"{path}: genres must be text, each of them once")
    multi, genres = y.ndim == 2, tuple(titles.tolist())
    table = _several(path, y, genres) if multi else _one(path, y, genres)
    labelled = table.any(1)
    return Dataset(
        name=utf8(path.stem) + (" (GTZAN log-mels)" if known else ""),
        layout="archive",
        kind="multi" if multi else "single",
        labels=genres,
        clips=tuple(
            Clip(
                name=str(name),
                labels=tuple(genres[column] for column in np.flatnonzero(row)),
                group=str(name),
                split=split_name(str(split)),
            )
            for name, row, split in zip(
                names[labelled], table[labelled], splits[labelled], strict=True
            )
        ),
        grouped_by="recording",
        licence=LICENCE if known else "that of the archive's audio",
        skipped=tuple(
            Skipped(str(name), "has no label", split_name(str(split)))
            for name, split in zip(names[~labelled], splits[~labelled], strict=True)
        ),
        logmels=LogMels(values if labelled.all() else values[labelled]),
    )


def _text(values: NDArray[Any]) -> NDArray[Any]:
    """UTF-8 as text; whatever else, as it is."""
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values


def _splits(
    archive: Mapping[str, NDArray[Any]], names: NDArray[Any], *, known: bool
) -> NDArray[Any]:
    """The split of each of `names`, where there is one; those of GTZAN are `known`."""
    if "split" in archive:
        told = _text(archive["split"])
        return told if told.ndim else np.full(names.shape, told)
    split = fault_filtered_split() if known else {}
    return np.reshape([split.get(name, "") for name in names.ravel().tolist()], names.shape)


def _one(path: Path, y: NDArray[Any], genres: tuple[str, ...]) -> NDArray[np.bool_]:
    """Zeros and ones `(clips, labels)` of positions in `genres`."""
    if y.dtype.kind not in "iuf" or not np.isin(y, np.arange(len(genres))).all():
        raise DatasetInvalid(
            f"{path}: y must be positions in genres, whole numbers from 0 to {len(genres) - 1}"
        )
    return np.asarray(np.eye(len(genres), dtype=bool)[y.astype(int)])


def _several(path: Path, y: NDArray[Any], genres: tuple[str, ...]) -> NDArray[np.bool_]:
    if y.dtype.kind not in "biuf" or not np.isin(y, (0, 1)).all() or y.shape[1] != len(genres):
        raise DatasetInvalid(
            f"{path}: y must be zeros and ones, a column for each of the {len(genres)} genres; "
            f"it has {y.shape[1]} columns of {y.dtype}"
        )
    return y.astype(bool)


def decibels(clip: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A clip of GTZAN's archive `(mels, frames)` in decibels, in the scale of `shipped.coarse`.

    Its range is unknown but near 77 dB where nothing was cut off and 80 dB where something was;
    its gain is near that of the excerpts. Both were read off the clips that there is audio of.
    """
    values = clip.astype(np.float32)
    cut_off = float((clip == 0).mean()) > 0.01
    return values * (80 / 255) - 51 if cut_off else values * 0.304 - 50

"""An archive of log-mels (`.npz`): GTZAN without its audio.

`X` uint8 (clips, mels, frames), `y` (clips,) positions in `genres`, or (clips, labels) zeros and
ones for several labels a clip, `names`, `genres`, and perhaps `split`, under any names.
"""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from model.datasets.dataset import Clip, Dataset, LogMels, split_name
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
            names, genres = archive["names"].tolist(), tuple(archive["genres"].tolist())
            splits = archive["split"].tolist() if "split" in archive else [""] * len(names)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DatasetInvalid(f"{path} is no .npz archive of plain arrays") from error
    if values.ndim != 3 or not len(values) == len(y) == len(names) == len(splits):
        raise DatasetInvalid(
            f"{path}: X {values.shape}, y {y.shape}, {len(names)} names and {len(splits)} splits "
            "don't belong together"
        )
    multi = y.ndim == 2
    table = y.astype(bool) if multi else np.eye(len(genres), dtype=bool)[y.astype(int)]
    known = set(names) <= fault_filtered_split().keys()
    return Dataset(
        name=f"{path.stem} (GTZAN log-mels)" if known else path.stem,
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
            for name, row, split in zip(names, table, splits, strict=True)
        ),
        grouped_by="recording",
        licence=LICENCE if known else "that of the archive's audio",
        logmels=LogMels(values),
    )


def decibels(clip: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A clip of GTZAN's archive `(mels, frames)` in decibels, in the scale of `recipe.coarse`.

    Its range is unknown but near 77 dB where nothing was cut off and 80 dB where something was;
    its gain is near that of the excerpts. Both were read off the clips that there is audio of.
    """
    values = clip.astype(np.float32)
    cut_off = float((clip == 0).mean()) > 0.01
    return values * (80 / 255) - 51 if cut_off else values * 0.304 - 50

"""Which layout a path has, and its loader. The one list of layouts."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.datasets import archive, fma, folders, gtzan, manifest, msd
from model.datasets.dataset import Dataset
from worker.errors import DatasetInvalid


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layout is told from the others, and read."""

    fits: Callable[[Path], bool]
    load: Callable[[Path], Dataset]


# In the order of asking: the most particular first.
LAYOUTS: dict[str, Layout] = {
    "archive": Layout(lambda path: path.suffix.lower() == ".npz", archive.load),
    "manifest": Layout(lambda path: path.suffix.lower() == ".csv", manifest.load),
    "fma": Layout(fma.is_fma, fma.load),
    "fma-all": Layout(lambda path: False, lambda path: fma.load(path, "all")),
    "msd": Layout(lambda path: bool(msd.annotations(path)), msd.load),
    "gtzan": Layout(lambda path: gtzan.root(path) is not None, gtzan.load),
    "folders": Layout(folders.is_folders, folders.load),
}


def detect(path: Path) -> str:
    """Name of the first layout that fits `path`."""
    for name, layout in LAYOUTS.items():
        if layout.fits(path):
            return name
    raise DatasetInvalid(
        f"{path} has none of the layouts {', '.join(LAYOUTS)}: name the one it should have with "
        "--layout; the plainest is a folder of folders of audio, each with a genre's name"
    )


def load(path: Path, layout: str | None = None) -> Dataset:
    """The data set at `path`, its split checked.

    Raises
    ------
    DatasetInvalid
        Nothing there, an unknown layout, or not what the layout promises.
    SplitLeaks
        The data set's own split puts an artist or a recording on two sides.
    """
    if not path.exists():
        raise DatasetInvalid(f"{path} does not exist")
    name = layout or detect(path)
    if name not in LAYOUTS:
        raise DatasetInvalid(f"unknown layout {name!r}, known: {', '.join(LAYOUTS)}")
    try:
        return LAYOUTS[name].load(path).check_split()
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetInvalid(f"{path} can't be read in layout {name!r}: {error}") from error

"""A folder per genre: `GENRE/any/where/song.mp3`, or the same under `train`, `valid` and `test`."""

from pathlib import Path

from model.datasets.dataset import Clip, Dataset, recordings, split_name, utf8
from worker.audio_files import is_audio
from worker.errors import DatasetInvalid

SPLITS = frozenset({"train", "valid", "test"})


def is_folders(path: Path) -> bool:
    """Whether some subfolder holds audio."""
    return path.is_dir() and any(is_audio(file) for file in path.glob("*/**/*"))


def load(path: Path) -> Dataset:
    """Clips under `path`; artists are unknown, so that files of the same bytes stay together."""
    if not path.is_dir():
        raise DatasetInvalid(f"{path} is not a folder")
    by_split: dict[Path, str | None] = {
        folder: split_name(folder.name)
        for folder in sorted(path.iterdir())
        if folder.is_dir() and split_name(folder.name) in SPLITS
    }
    files = {
        file: split
        for top, split in (by_split or {path: None}).items()
        for file in sorted(top.glob("*/**/*"))
        if is_audio(file)
    }
    tops = {
        file: top for top in (by_split or {path: None}) for file in files if top in file.parents
    }
    same = recordings(files)
    clips = tuple(
        Clip(
            name=utf8(file.relative_to(path).as_posix()),
            labels=(utf8(file.relative_to(tops[file]).parts[0]),),
            group=same[file],
            split=split,
            path=file,
        )
        for file, split in files.items()
    )
    return Dataset(
        name=utf8(path.resolve().name),
        layout="folders",
        kind="single",
        labels=tuple(sorted({label for clip in clips for label in clip.labels})),
        clips=clips,
        grouped_by="recording",
        licence="that of your own files",
    )

"""A folder per genre: `GENRE/any/where/song.mp3`, or the same under `train`, `valid` and `test`."""

from pathlib import Path

from model.datasets.dataset import Clip, Dataset, Skipped, labels_of, recordings, split_name, utf8
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
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    splits = [folder for folder in folders if split_name(folder.name) in SPLITS]
    top_of = {
        file: top
        for top in splits or [path]
        for file in sorted(top.glob("*/**/*"))
        if is_audio(file) and file.is_file()
    }
    same = recordings(top_of)
    clips = tuple(
        Clip(
            name=utf8(file.relative_to(path).as_posix()),
            labels=(utf8(file.relative_to(top).parts[0]),),
            group=same[file],
            split=split_name(top.name) if splits else None,
            path=file,
        )
        for file, top in top_of.items()
    )
    loose = [
        Skipped(
            name=utf8(file.relative_to(path).as_posix()),
            reason="is in no genre's folder",
            split=None if top == path else split_name(top.name),
        )
        for top in (path, *splits)
        for file in sorted(top.glob("*"))
        if is_audio(file) and file.is_file()
    ]
    beside = [
        Skipped(utf8(folder.name), f"is a folder beside {utf8(splits[0].name)}, but no split")
        for folder in folders
        if splits and folder not in splits and any(map(is_audio, folder.glob("**/*")))
    ]
    return Dataset(
        name=utf8(path.resolve().name),
        layout="folders",
        kind="single",
        labels=labels_of(clips),
        clips=clips,
        grouped_by="recording",
        licence="that of your own files",
        skipped=(*loose, *beside),
    )

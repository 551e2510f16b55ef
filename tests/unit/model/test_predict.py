"""Prediction: which head of a bundle a data set is held against, and what is left out."""

from pathlib import Path

import pytest

from model.bundle import Bundle
from model.datasets import Skipped, load
from model.predict import predict
from tests import collections_of_music as music
from worker.errors import DatasetInvalid


def annotated(folder: Path, *, jazz: str = "Jazz") -> Path:
    """Previews with one genre each, Rock or Jazz, spelt as tagtraum spells them."""
    file = music.msd(folder) / "msd_tagtraum.cls"
    told = file.read_text(encoding="utf-8").replace("\tBlues", "").replace("Jazz", jazz)
    file.write_text(told, encoding="utf-8")
    return folder


def test_labels_that_differ_in_case_alone_are_the_heads(tmp_path: Path) -> None:
    predictions = predict(Bundle.load(), load(annotated(tmp_path)))
    labels = predictions.head.labels
    assert predictions.head.name == "genre"
    for clip, target in zip(predictions.clips, predictions.targets, strict=True):
        assert [labels[column] for column in target.nonzero()[0]] == [clip.labels[0].lower()]


def test_clips_none_of_which_can_be_read_are_said_why(tmp_path: Path) -> None:
    (tmp_path / "blues").mkdir()
    (tmp_path / "blues" / "a.mp3").write_bytes(b"not audio")
    with pytest.raises(DatasetInvalid, match=r"none of its 1 clips .* blues/a\.mp3: No accepted"):
        predict(Bundle.load(), load(tmp_path))


def test_labels_that_no_head_has_are_refused_in_any_case(tmp_path: Path) -> None:
    dataset = load(annotated(tmp_path, jazz="Polka"))
    with pytest.raises(DatasetInvalid, match=r"knows all labels of MSD.*Polka, Rock"):
        predict(Bundle.load(), dataset)


def test_clips_left_out_of_a_split_are_told_by_any_of_its_names(tmp_path: Path) -> None:
    for seed, folder in enumerate(("train", "validation")):
        music.song(tmp_path / folder / "blues" / "song.wav", "blues", seed)
        (tmp_path / folder / "loose.mp3").touch()
    why = "is in no genre's folder"
    skipped = predict(Bundle.load(), load(tmp_path), "Validation").skipped
    assert skipped == (Skipped("validation/loose.mp3", why, "valid"),)

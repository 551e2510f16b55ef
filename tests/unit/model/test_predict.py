"""Prediction: which head of a bundle a data set is held against, and what is left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.bundle import Bundle
from model.datasets import Clip, Dataset, Skipped, load
from model.predict import _head, predict
from tests import collections_of_music as music
from tests.audio import encode, noise
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


def test_several_labels_a_clip_are_held_against_a_head_of_such() -> None:
    labels = ("jazz", "rock")
    mine = Dataset("mine", "manifest", "multi", labels, (Clip("a", labels, "a"),), "artist", "none")
    bundle = Bundle.load()
    assert _head(bundle, mine).name == "tags"
    assert _head(bundle, replace(mine, kind="single")).name == "genre"


def test_silent_windows_have_no_part_in_what_a_track_is_like(tmp_path: Path) -> None:
    sounds = noise(3.0, 16_000), np.zeros((48_000, 1), np.float32)
    for name, sound in (("whole", sounds[0]), ("half", np.concatenate(sounds))):
        (tmp_path / "metal").mkdir(exist_ok=True)
        encode(tmp_path / "metal" / f"{name}.wav", sound, 16_000, muxer="wav", codec="pcm_s16le")
    (tmp_path / "blues").mkdir()
    (tmp_path / "blues" / "broken.wav").write_bytes(b"not audio")
    predictions = predict(Bundle.load(), load(tmp_path))
    assert [clip.name for clip in predictions.clips] == ["metal/half.wav", "metal/whole.wav"]
    assert predictions.targets[:, predictions.head.labels.index("metal")].tolist() == [1, 1]
    assert [windows.tolist() for windows in predictions.voting] == [[True, False], [True]]
    half, whole = predictions.embeddings
    np.testing.assert_allclose(half, whole, atol=1e-4)


def test_clips_none_of_which_can_be_read_are_said_why(tmp_path: Path) -> None:
    (tmp_path / "blues").mkdir()
    (tmp_path / "blues" / "a.mp3").write_bytes(b"not audio")
    (tmp_path / "loose.mp3").touch()
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

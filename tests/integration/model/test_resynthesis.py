"""The fast bundle on whole clips of GTZAN: heard as audio, and made audible from log-mels."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.bundle import Bundle
from model.datasets import load
from model.datasets.dataset import Dataset
from model.predict import Predictions, predict


@pytest.fixture(scope="module")
def both(shared_data: Path) -> tuple[Dataset, Dataset]:
    """The same clips of 30 s, in the same order: audio, and log-mels."""
    audio = load(shared_data / "gtzan" / "manifest.csv")
    whole = [clip for clip in audio.clips if ".x30." in clip.name]
    if not whole:
        pytest.skip("no whole clips in ../shared/gtzan/manifest.csv")
    archive = load(shared_data / "gtzan" / "logmel30s.npz")
    rows = {clip.name: row for row, clip in enumerate(archive.clips)}
    return (
        dataclasses.replace(audio, clips=tuple(whole)),
        archive.only([rows[clip.group] for clip in whole]),
    )


def scores(predictions: Predictions) -> NDArray[np.float32]:
    """Mean probabilities `(tracks, labels)`."""
    return np.stack([windows.mean(0) for windows in predictions.probabilities])


def test_answers_on_log_mels_made_audible_are_much_like_those_on_audio(
    both: tuple[Dataset, Dataset],
) -> None:
    bundle = Bundle.load("fast")
    heard, again = (predict(bundle, dataset) for dataset in both)
    assert [clip.group for clip in heard.clips] == [clip.group for clip in again.clips]
    one, other = scores(heard), scores(again)
    alike = np.corrcoef(one.ravel(), other.ravel())[0, 1]
    assert alike > 0.8
    assert (one.argmax(1) == other.argmax(1)).mean() > 0.65
    assert (heard.embeddings * again.embeddings).sum(1).mean() > 0.7

"""Sound, its log-mels as an archive holds them, and the sound made of those again."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchaudio.functional import resample

from model.datasets import load
from model.datasets.archive import UNIT_DENSITY_DB, decibels
from model.datasets.dataset import Dataset, LogMels
from model.datasets.logmels import logmel_of
from model.datasets.resynthesis import Resynthesis
from model.frontend import LogMel, LogMelConfig
from model.logmel_cnn import ARCHIVE_FRONT_END
from model.shipped import coarse
from tests import collections_of_music as music
from tests.unit.model.music import RATE_HZ, chords
from worker.errors import DatasetInvalid

ARCHIVE_RATE_HZ = ARCHIVE_FRONT_END.sample_rate_hz
DURATION_S = 12


def archived(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Log-mels `(mels, frames)` of samples at 16 kHz, quantised as in the archive."""
    heard = resample(torch.from_numpy(samples), RATE_HZ, ARCHIVE_RATE_HZ).numpy()
    made = logmel_of(heard, ARCHIVE_FRONT_END).astype(np.float32).T
    n_fft = ARCHIVE_FRONT_END.n_fft
    energy_db = 10 * np.log10(np.square(np.hanning(n_fft + 1)[:-1]).sum() * n_fft)
    levels = made - energy_db + UNIT_DENSITY_DB
    return np.asarray(np.clip(np.round((levels + 50) / 0.304), 1, 255), dtype=np.uint8)


def dataset(folder: Path, *sounds: NDArray[np.float32]) -> Dataset:
    """An archive of those sounds."""
    given = load(music.archive(folder / "a.npz", clips=len(sounds)))
    values = np.stack([archived(samples) for samples in sounds])
    return dataclasses.replace(given, logmels=LogMels(values))


def tune(seed: int) -> NDArray[np.float32]:
    return np.asarray(chords(DURATION_S // 3, seed=seed).flatten().numpy())


def hiss() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 0.05, DURATION_S * RATE_HZ).astype(np.float32)


def windows(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the default bundle's front end makes of the first 9 s."""
    cut = torch.from_numpy(samples[: 9 * RATE_HZ]).reshape(3, -1)
    return np.asarray(LogMel(LogMelConfig())(cut).numpy())


def likeness(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def test_log_mels_become_sound_with_log_mels_like_the_first(tmp_path: Path) -> None:
    sounds = [tune(0), tune(1), hiss(), tune(2)]
    resynthesis = Resynthesis(dataset(tmp_path, *sounds), RATE_HZ)
    for row in (0, 1, 3):
        again = resynthesis.samples(row)
        assert len(again) == pytest.approx(DURATION_S * RATE_HZ, rel=0.01)
        assert likeness(windows(again), windows(sounds[row])) > 0.93


def test_sound_is_as_loud_as_the_archives_decibels_say(tmp_path: Path) -> None:
    again = Resynthesis(dataset(tmp_path, hiss(), tune(0)), RATE_HZ).samples(0)
    assert 20 * np.log10(again.std() / hiss().std()) == pytest.approx(0, abs=2)
    assert windows(again).mean() == pytest.approx(windows(hiss()).mean(), abs=0.2)


def test_decibels_have_the_scale_of_the_recipes() -> None:
    mine, recipes = decibels(archived(hiss()))[: coarse.BANDS].T, coarse.coarse(hiss())
    frames = min(len(mine), len(recipes))
    assert np.abs(mine[:frames] - recipes[:frames]).mean() < 0.5


def test_the_same_log_mels_give_the_same_sound(tmp_path: Path) -> None:
    given = dataset(tmp_path, tune(0), tune(1))
    np.testing.assert_array_equal(
        Resynthesis(given, RATE_HZ).samples(1), Resynthesis(given, RATE_HZ).samples(1)
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.zeros((2, 128, 241), np.float32), "128 mels as float32"),
        (np.zeros((2, 96, 241), np.uint8), "96 mels as uint8"),
        (np.zeros((2, 128, 2), np.uint8), "2 frames, too short"),
    ],
)
def test_log_mels_that_nothing_is_known_of_are_refused(
    tmp_path: Path, values: NDArray[np.uint8] | NDArray[np.float32], told: str
) -> None:
    given = load(music.archive(tmp_path / "a.npz", clips=2))
    with pytest.raises(DatasetInvalid, match=told):
        Resynthesis(dataclasses.replace(given, logmels=LogMels(values)), RATE_HZ)

"""Handcrafted features: what they are of sounds whose features are known."""

from pathlib import Path

import librosa
import numpy as np
import pytest

from model.datasets import Clip, Dataset, LogMels, load
from model.datasets.logmels import LogMelSource, archive_source
from model.features import RATE_HZ, feature_table, whole_clips
from model.logmel_cnn import ARCHIVE_FRONT_END
from tests.audio import encode, noise, tone


def test_features_of_a_tone_and_of_a_beat_are_theirs(tmp_path: Path) -> None:
    hum = np.concatenate([tone(3.0, RATE_HZ, 1_000.0), tone(3.5, RATE_HZ, 2_000.0)])
    beat = noise(6.5, RATE_HZ) * (np.arange(len(hum)) % (RATE_HZ // 2) < 1_000)[:, None]
    (tmp_path / "a").mkdir()
    for name, sound in (("beat", beat), ("hum", hum)):
        encode(tmp_path / "a" / f"{name}.wav", sound, RATE_HZ, muxer="wav", codec="pcm_s16le")
    table = feature_table(load(tmp_path), LogMelSource([], ARCHIVE_FRONT_END))
    assert table["name"].tolist() == ["a/beat.wav"] * 2 + ["a/hum.wav"] * 2
    assert table["segment"].tolist() == [0, 1, 0, 1]
    assert table["tempo"].tolist()[:2] == pytest.approx([120, 120], abs=4)
    of_hum = table.iloc[2]
    assert table["centroid_mean"].tolist()[2:] == pytest.approx([1_000, 2_000], rel=0.02)
    assert of_hum["rolloff_mean"] == pytest.approx(1_000, rel=0.03)
    assert of_hum["zero_crossings_mean"] == pytest.approx(2_000 / RATE_HZ, rel=0.02)
    assert of_hum[[f"chroma_{pitch:02d}_mean" for pitch in range(12)]].argmax() == 11  # a B
    assert table["mfcc_00_std"][0] > 100 > of_hum["mfcc_00_std"]
    clips = whole_clips(table)
    assert clips["name"].tolist() == ["a/beat.wav", "a/hum.wav"]
    assert clips["mfcc_00_mean"].tolist() == table.groupby("name")["mfcc_00_mean"].mean().tolist()


def test_features_of_an_archive_are_where_its_loudest_band_is() -> None:
    values = np.zeros((1, 128, 144), np.uint8)
    values[:, 50] = 255
    clip = Clip("song", ("a",), "song")
    logmels = LogMels(values)
    held = Dataset("x", "archive", "single", ("a",), (clip,), "recording", "", (), logmels)
    table = feature_table(held, archive_source(held, ARCHIVE_FRONT_END))
    band_hz = librosa.mel_frequencies(130, fmax=logmels.f_max_hz)[51]
    assert table["segment"].tolist() == [0, 1]
    assert table["rolloff_mean"].tolist() == pytest.approx([band_hz] * 2)
    assert table["centroid_mean"].tolist() == pytest.approx([band_hz] * 2, rel=0.05)

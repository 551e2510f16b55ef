"""Handcrafted features: what people computed before networks, as one table.

librosa does the computing. From audio every feature is there; from an archive's log-mels those
that a log-mel still holds (no chroma, no zero crossings).
"""

from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.datasets.dataset import Dataset
from model.datasets.logmels import LogMelSource, samples_of
from model.folder import make_folder
from worker.errors import SettingsInvalid

RATE_HZ, N_FFT, HOP = 22_050, 2_048, 512
MFCCS = 20
SEGMENT_S = 3.0
FACTS = ("name", "segment", "label", "group", "split")  # columns that aren't features

Floats = NDArray[np.float64]


def feature_table(dataset: Dataset, source: LogMelSource) -> pd.DataFrame:
    """One row a segment of 3 s: FACTS, then mean and deviation of every feature over the segment,
    and its tempo in beats per minute."""
    rows = []
    for row, clip in enumerate(dataset.clips):
        series, frame_rate_hz = (
            _from_logmel(source, row) if clip.path is None else _from_audio(clip.path)
        )
        onset = series.pop("onset")[0]
        frames = round(SEGMENT_S * frame_rate_hz)
        for segment in range(max(1, len(onset) // frames)):
            span = slice(segment * frames, (segment + 1) * frames)
            facts = (clip.name, segment, clip.labels[0], clip.group, clip.split)
            values: dict[str, Any] = dict(zip(FACTS, facts, strict=True))
            for name, lines in series.items():
                for number, line in enumerate(lines[:, span]):
                    column = f"{name}_{number:02d}" if len(lines) > 1 else name
                    values[f"{column}_mean"], values[f"{column}_std"] = line.mean(), line.std()
            values["tempo"] = _tempo(onset[span], frame_rate_hz)
            rows.append(values)
    return pd.DataFrame(rows)


def whole_clips(table: pd.DataFrame) -> pd.DataFrame:
    """The same averaged over each clip: one row a clip."""
    facts = {column: "first" for column in FACTS if column != "name"}
    features = {column: "mean" for column in table.columns if column not in FACTS}
    averaged: pd.DataFrame = table.groupby("name", sort=False).agg(facts | features).reset_index()
    return averaged


def check_table(path: Path) -> None:
    """SettingsInvalid unless a table can be saved there, to know before it is computed."""
    if path.suffix not in {".csv", ".parquet"}:
        raise SettingsInvalid(f"{path}: features are saved as .csv or .parquet")
    make_folder(path.parent)


def save_table(table: pd.DataFrame, path: Path) -> None:
    """As CSV or Parquet, by the suffix."""
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)


def mfccs(logmel: Tensor) -> Tensor:
    """Cepstra `(clips, frames, MFCCS)` of log-mels in decibels `(clips, frames, mels)`."""
    bands = logmel.numpy().astype(np.float64).swapaxes(1, 2)
    cepstra = librosa.feature.mfcc(S=bands, n_mfcc=MFCCS).swapaxes(1, 2)
    return torch.from_numpy(np.ascontiguousarray(cepstra, dtype=np.float32))


def _from_audio(path: Path) -> tuple[dict[str, Floats], float]:
    """Features over time `(lines, frames)` by name, and frames a second."""
    samples = samples_of(path, RATE_HZ)
    magnitude = np.abs(librosa.stft(samples, n_fft=N_FFT, hop_length=HOP))
    decibels = librosa.power_to_db(
        librosa.feature.melspectrogram(S=magnitude**2, sr=RATE_HZ, n_mels=128)
    )
    return {
        "mfcc": librosa.feature.mfcc(S=decibels, n_mfcc=MFCCS),
        "chroma": librosa.feature.chroma_stft(S=magnitude**2, sr=RATE_HZ, tuning=0.0),
        "centroid": librosa.feature.spectral_centroid(S=magnitude, sr=RATE_HZ),
        "rolloff": librosa.feature.spectral_rolloff(S=magnitude, sr=RATE_HZ),
        "zero_crossings": librosa.feature.zero_crossing_rate(
            samples, frame_length=N_FFT, hop_length=HOP
        ),
        "onset": librosa.onset.onset_strength(S=decibels, sr=RATE_HZ)[None],
    }, RATE_HZ / HOP


def _from_logmel(source: LogMelSource, row: int) -> tuple[dict[str, Floats], float]:
    """The same as far as a log-mel of unknown gain goes; its 255 steps stand for some 80 dB."""
    front_end = source.front_end
    decibels = np.asarray(source.clip(row), dtype=np.float64).T * (80 / 255)
    power = librosa.db_to_power(decibels - 80)
    bands_hz = librosa.mel_frequencies(n_mels=front_end.n_mels + 2, fmax=front_end.f_max_hz)[1:-1]
    return {
        "mfcc": librosa.feature.mfcc(S=decibels, n_mfcc=MFCCS),
        "centroid": librosa.feature.spectral_centroid(S=np.sqrt(power), freq=bands_hz),
        "rolloff": librosa.feature.spectral_rolloff(S=np.sqrt(power), freq=bands_hz),
        "onset": librosa.onset.onset_strength(S=decibels)[None],
    }, front_end.sample_rate_hz / front_end.hop


def _tempo(onset: Floats, frame_rate_hz: float) -> float:
    """Beats a minute of one segment's onset envelope."""
    return float(librosa.feature.tempo(onset_envelope=onset, sr=frame_rate_hz, hop_length=1)[0])

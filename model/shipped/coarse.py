"""Two pictures of the same sound: the reference's log-mels, and coarse ones as GTZAN's archive has.

The archive holds labels for far more music than there is audio of, but only as log-mels of 24
frames a second. `Translation` turns such log-mels into the front end's kind, as blurred as they
are; a network that is taught to answer alike on both learns genres from the archive too.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from model.datasets.archive import decibels
from model.frontend import LogMelConfig

Floats = NDArray[np.float32]

FINE = LogMelConfig()
RATE_HZ = FINE.sample_rate_hz
FINE_FPS = RATE_HZ / FINE.hop
# The archive's 2048 samples and 914 a hop at 22,050 Hz, and its 128 bands up to 11,025 Hz, of
# which the lowest 115 lie below half of our rate.
COARSE_FFT, COARSE_SPAN, COARSE_HOP = 1_536, 1_486, 663
COARSE_FPS = RATE_HZ / COARSE_HOP
BANDS = 115
TOP_HZ = 7801.85  # where the lowest 115 of the archive's bands end
ARCHIVE_FPS = 22_050 / 914.375
WINDOW_FRAMES = FINE.frames


def coarse(samples: Floats) -> NDArray[np.float16]:
    """The archive's kind of log-mels of a recording, `(frames, BANDS)` in decibels."""
    spectrum = torch.stft(
        torch.from_numpy(samples),
        COARSE_FFT,
        COARSE_HOP,
        COARSE_SPAN,
        torch.hann_window(COARSE_SPAN),
        pad_mode="constant",
        return_complex=True,
    )
    power = (spectrum.real.square() + spectrum.imag.square()).T @ _bank()
    return (10 * torch.log10(power.clamp_min(1e-10))).half().numpy()


def _bank() -> torch.Tensor:
    bins = COARSE_FFT // 2 + 1
    bank = torchaudio.functional.melscale_fbanks(
        bins, 0.0, TOP_HZ, BANDS, RATE_HZ, norm="slaney", mel_scale="slaney"
    )
    return torch.Tensor(bank)


def archive_decibels(clip: NDArray[np.uint8]) -> Floats:
    """An archive's clip `(mels, frames)` as decibels `(frames, BANDS)`."""
    return decibels(clip)[:BANDS].T


def compress(decibels: Floats) -> Floats:
    """The front end's compression, log10(10000 x + 1), of powers in decibels."""
    return np.asarray(np.log10(1e4 * 10 ** (decibels / 10) + 1), dtype=np.float32)


def sampled(logmel: Floats, positions: NDArray[np.floating]) -> Floats:
    """Rows of `logmel` at fractional `positions`, linearly in between."""
    inside = np.clip(positions, 0, len(logmel) - 1.001)
    below = inside.astype(int)
    share = (inside - below)[:, None].astype(np.float32)
    return np.asarray(logmel[below] * (1 - share) + logmel[below + 1] * share)


@dataclass(frozen=True)
class Translation:
    """Linear map from compressed coarse bands to the front end's, `(BANDS + 1, 96)`."""

    weights: Floats

    @classmethod
    def fit(cls, pairs: list[tuple[NDArray[np.float16], NDArray[np.float16]]]) -> "Translation":
        """By ridge regression over (fine, coarse) log-mels of the same recordings."""
        sources, targets = [], []
        for fine_mel, coarse_mel in pairs:
            rows = np.arange(0, len(fine_mel) - 2, max(1, len(fine_mel) // 150))
            at = rows / FINE_FPS * COARSE_FPS
            sources.append(sampled(compress(coarse_mel.astype(np.float32)), at))
            targets.append(fine_mel[rows].astype(np.float32))
        source = np.concatenate(sources)
        source = np.concatenate([source, np.ones((len(source), 1), np.float32)], 1)
        gram = source.T @ source + np.eye(BANDS + 1, dtype=np.float32)
        return cls(np.linalg.solve(gram, source.T @ np.concatenate(targets)).astype(np.float32))

    def __call__(self, compressed: Floats) -> Floats:
        """Compressed coarse log-mels `(..., BANDS)` as the front end's `(..., 96)`."""
        return np.asarray(np.maximum(compressed @ self.weights[:-1] + self.weights[-1], 0))

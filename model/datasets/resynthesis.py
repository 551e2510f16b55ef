"""Audio made of an archive's log-mels, for networks whose front end makes others than it holds.

What mel bands say of the spectrum is undone by least squares, and phases that go with it are found
by a few rounds of Griffin and Lim's algorithm (1984) as Perraudin, Balazs and Søndergaard hasten it
(2013). What the log-mels have lost stays lost: everything between two bands or two frames.
"""

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from torch.nn import functional

from model.datasets.archive import UNIT_DENSITY_DB, decibels
from model.datasets.dataset import Dataset
from worker.errors import DatasetInvalid

MELS = 128  # more have bands without a bin of the spectrum
ROUNDS = 4  # more of them bring the answers no nearer to those on audio
MOMENTUM = 0.99


class Resynthesis:
    """The clips of an archive as samples at `rate_hz`.

    Raises DatasetInvalid where the log-mels aren't such as their decibels are known of.
    """

    def __init__(self, dataset: Dataset, rate_hz: int) -> None:
        logmels = dataset.logmels
        assert logmels is not None
        clips, mels, frames = logmels.values.shape
        if logmels.values.dtype != np.uint8 or mels != MELS:
            raise DatasetInvalid(
                f"{dataset.name} holds {mels} mels as {logmels.values.dtype}, others than this "
                f"bundle's front end makes of audio, and only {MELS} mels as uint8 can be made "
                "audible for it: use the data set's audio, or a bundle that was trained on such "
                "an archive"
            )
        if frames * logmels.hop <= logmels.n_fft:
            raise DatasetInvalid(
                f"{dataset.name}: {clips} clips of {frames} frames, too short to be made audible"
            )
        self._logmels = logmels
        self._hop = logmels.n_fft // 4
        self._frames = round((frames - 1) * logmels.hop / self._hop) + 1
        self._window = torch.hann_window(logmels.n_fft)
        self._unmel = torchaudio.transforms.InverseMelScale(
            logmels.n_fft // 2 + 1,
            mels,
            logmels.sample_rate_hz,
            f_max=logmels.f_max_hz,
            norm="slaney",
            mel_scale="slaney",
        )
        self._resample = torchaudio.transforms.Resample(logmels.sample_rate_hz, rate_hz)

    @torch.inference_mode()
    def samples(self, row: int) -> NDArray[np.float32]:
        """The clip in that row, `(samples,)`: the same whenever it is asked for."""
        n_fft = self._logmels.n_fft
        coarse = torch.from_numpy(decibels(self._logmels.values[row]))
        levels = functional.interpolate(
            coarse[None], size=self._frames, mode="linear", align_corners=True
        )[0]
        density = 10 ** ((levels - UNIT_DENSITY_DB) / 10)
        sound = torchaudio.functional.griffinlim(
            self._unmel(density * self._window.square().sum() * n_fft),
            self._window,
            n_fft,
            self._hop,
            n_fft,
            power=2.0,
            n_iter=ROUNDS,
            momentum=MOMENTUM,
            length=None,
            rand_init=False,
        )
        return np.asarray(self._resample(sound).numpy())

"""From samples to log-mels, on the network's own device and always in float32."""

from typing import Literal

import torch
import torchaudio
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

GROUP_BANDS = 24


class LogMelConfig(BaseModel):
    """How a window of samples becomes a log-mel; part of a bundle's `model.json`.

    `compression` is `musicnn` for log10(10000 x + 1) of the mel power (Pons and Serra, 2019) or
    `decibel` for 10 log10(max(x, 1e-10)), of which `range_db` keeps as much as lies that far below
    the window's highest level and lifts what is lower. `normalise` takes mean and standard
    deviation out of every window, for networks trained on log-mels of unknown gain.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample_rate_hz: int = Field(16_000, ge=4_000, le=48_000)
    n_fft: int = Field(512, ge=64, le=8_192)
    hop: int = Field(256, ge=16, le=8_192)
    n_mels: int = Field(96, ge=8, le=256)
    f_max_hz: float = Field(8_000.0, gt=0, le=24_000)
    frames: int = Field(187, ge=1, le=4_096)
    compression: Literal["musicnn", "decibel"] = "musicnn"
    range_db: float | None = Field(None, gt=0, le=200)
    normalise: bool = False


class LogMel(nn.Module):
    """Log-mels of windows: `(windows, samples)` in, `(windows, frames, mels)` float32 out.

    The mel bank is librosa's (Slaney's scale and area normalisation) and frame `t` is centred on
    sample `t * hop`, with zeros before the first sample and after the last.
    """

    window: Tensor
    bank: Tensor

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__()
        self.config = config
        # Derived, so never stored; made on the CPU even where the network is laid out on `meta`.
        with torch.device("cpu"):
            self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
            bank = torchaudio.functional.melscale_fbanks(
                config.n_fft // 2 + 1,
                0.0,
                config.f_max_hz,
                config.n_mels,
                config.sample_rate_hz,
                norm="slaney",
                mel_scale="slaney",
            )
            self.register_buffer("bank", bank, persistent=False)
            self._groups = _groups(bank)

    def forward(self, samples: Tensor) -> Tensor:
        with torch.autocast(samples.device.type, enabled=False):
            power = self.power(samples.float())
            mels = [power[..., bins] @ self.bank[bins, bands] for bins, bands in self._groups]
            return self._compress(torch.cat(mels, -1))

    def power(self, samples: Tensor) -> Tensor:
        """Power spectrogram `(windows, frames, bins)` of float32 `samples`."""
        # Frames by hand: `torch.stft` gives bins before frames, and turning that round costs more
        # than the transform itself.
        frames = self.padded(samples).unfold(-1, self.config.n_fft, self.config.hop)
        squares = torch.view_as_real(torch.fft.rfft(frames * self.window)).square_()
        return squares[..., 0] + squares[..., 1]

    def padded(self, samples: Tensor) -> Tensor:
        """`samples` with zeros on both sides where frames reach out, to the end of the last."""
        lead = self.config.n_fft // 2
        end = (self.config.frames - 1) * self.config.hop + lead
        # Not `pad`, which fills all of the result before it copies.
        before = samples.new_zeros(*samples.shape[:-1], lead)
        after = samples.new_zeros(*samples.shape[:-1], max(0, end - samples.shape[-1]))
        return torch.cat([before, samples[..., :end], after], -1)

    def _compress(self, mel: Tensor) -> Tensor:
        if self.config.compression == "musicnn":
            logged = (10_000.0 * mel).add_(1.0).log10_()
        else:
            logged = floored(10.0 * torch.log10(mel.clamp_min(1e-10)), self.config.range_db)
        return normalise(logged) if self.config.normalise else logged


def _groups(bank: Tensor) -> list[tuple[slice, slice]]:
    """Neighbouring bands of `bank` `(bins, bands)`, and the bins that they hear.

    Most of the bank is zeros, and by groups most of those cost nothing.
    """
    groups = []
    for first in range(0, bank.shape[1], GROUP_BANDS):
        bands = slice(first, first + GROUP_BANDS)
        heard = bank[:, bands].any(1).nonzero().flatten().tolist() or [0]
        groups.append((slice(heard[0], heard[-1] + 1), bands))
    return groups


def floored(decibels: Tensor, range_db: float | None) -> Tensor:
    """Each window `(..., frames, mels)` with nothing further below its highest level than that."""
    if range_db is None:
        return decibels
    return torch.maximum(decibels, decibels.amax((-2, -1), keepdim=True) - range_db)


def normalise(logmel: Tensor) -> Tensor:
    """Each window `(..., frames, mels)` less its mean, over its standard deviation."""
    mean = logmel.mean((-2, -1), keepdim=True)
    deviation = logmel.std((-2, -1), keepdim=True)
    return (logmel - mean) / (deviation + 1e-5)

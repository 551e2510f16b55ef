"""Augmentation on log-mels: what changes a recording without changing what it is.

Time and frequency masking after SpecAugment (Park et al., 2019), mixup after Zhang et al. (2018);
pitch and tempo are resampled along the bands and the frames, which costs a thousandth of doing it
to the samples.
"""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from model.frontend import LogMelConfig, normalise

KNOTS = 6  # of an equaliser curve


class Augmentation(BaseModel):
    """How much of each; zero turns one off.

    `pitch` and `tempo` are the largest relative change, `equaliser` the deviation of a curve's
    knots and `gain` of the whole window's level, both in deviations of the window; masks are in
    parts of the window, `mixup` is the share of batches that are mixed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pitch: float = Field(0.15, ge=0, lt=1)
    tempo: float = Field(0.2, ge=0, lt=1)
    equaliser: float = Field(0.3, ge=0)
    gain: float = Field(0.3, ge=0)
    time_mask: float = Field(1 / 3, ge=0, lt=1)
    band_mask: float = Field(3 / 16, ge=0, lt=1)
    band_masks: int = Field(2, ge=0)
    mixup: float = Field(0.7, ge=0, le=1)


class Augmenter:
    """Random windows out of longer excerpts. Every draw comes from `generator`, on the CPU."""

    def __init__(
        self,
        amounts: Augmentation,
        front_end: LogMelConfig,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.amounts = amounts
        self.frames = front_end.frames
        self.normalised = front_end.normalise
        self.generator = generator
        self.device = device
        self.top_mel = float(_mel(torch.tensor(front_end.f_max_hz)))
        bands = torch.arange(1, front_end.n_mels + 1) / (front_end.n_mels + 1)
        self.centres_hz = _hertz(bands * self.top_mel).to(device)

    @property
    def span(self) -> int:
        """Frames that an excerpt must have, so that the fastest tempo still fills a window."""
        return math.ceil((self.frames - 1) * (1 + self.amounts.tempo)) + 2

    def __call__(self, excerpts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, span, mels)` and targets `(clips, labels)` to windows `(clips, frames, mels)`
        as the network takes them, and their targets."""
        logmel = self._change_pitch(self._change_tempo(excerpts))
        mean = logmel.mean((1, 2), keepdim=True)
        deviation = logmel.std((1, 2), keepdim=True) + 1e-5
        logmel = self._equalise((logmel - mean) / deviation)
        logmel, targets = self._mix(logmel, targets)
        if self.normalised:
            return self._mask(normalise(logmel)), targets
        louder = self._normal(len(logmel), 1, 1) * self.amounts.gain
        return self._mask(logmel + louder) * deviation + mean, targets

    def _change_tempo(self, excerpts: Tensor) -> Tensor:
        rate = self._around_one(len(excerpts), self.amounts.tempo)
        covered = rate * (self.frames - 1)
        start = self._uniform(len(excerpts)) * (excerpts.shape[1] - 1 - covered)
        frames = torch.arange(self.frames, device=self.device)
        return _sample(excerpts, start[:, None] + rate[:, None] * frames, axis=1)

    def _change_pitch(self, logmel: Tensor) -> Tensor:
        if not self.amounts.pitch:
            return logmel
        ratio = self._around_one(len(logmel), self.amounts.pitch)
        bands = logmel.shape[2]
        mels = _mel(self.centres_hz / ratio[:, None])
        return _sample(logmel, mels / self.top_mel * (bands + 1) - 1, axis=2)

    def _equalise(self, logmel: Tensor) -> Tensor:
        """Add a curve over the bands, smooth by interpolation between few knots."""
        strength = self.amounts.equaliser * 2 * self._uniform(len(logmel), 1, 1)
        knots = self._normal(len(logmel), 1, KNOTS) * strength
        return logmel + functional.interpolate(
            knots, size=logmel.shape[2], mode="linear", align_corners=True
        )

    def _mix(self, logmel: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each window with another of the batch, targets alike; the first weighs more."""
        if float(self._uniform(1)) >= self.amounts.mixup:
            return logmel, targets
        other = torch.randperm(len(logmel), generator=self.generator).to(self.device)
        weight = torch.sin(self._uniform(len(logmel)) * math.pi / 2).square()  # Beta(1/2, 1/2)
        weight = torch.maximum(weight, 1 - weight)[:, None]
        mixed = torch.lerp(logmel[other], logmel, weight[..., None])
        return mixed, torch.lerp(targets[other], targets, weight)

    def _mask(self, logmel: Tensor) -> Tensor:
        """Hide a stretch of time and some ranges of bands.

        A hidden stretch takes each band's mean, so that these stay what they are for a network that
        takes them out; hidden bands take the window's.
        """
        hidden = self._stretch(len(logmel), logmel.shape[1], self.amounts.time_mask)[:, :, None]
        logmel = torch.where(hidden, logmel.mean(1, keepdim=True), logmel)
        for _ in range(self.amounts.band_masks):
            bands = self._stretch(len(logmel), logmel.shape[2], self.amounts.band_mask)
            logmel = logmel.masked_fill(bands[:, None, :], 0.0)
        return logmel

    def _stretch(self, rows: int, length: int, most: float) -> Tensor:
        """True `(rows, length)` on one random stretch of each row."""
        size = self._uniform(rows, 1) * most * length
        start = self._uniform(rows, 1) * (length - size)
        place = torch.arange(length, device=self.device)
        return (place >= start) & (place < start + size)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def _around_one(self, rows: int, most: float) -> Tensor:
        return torch.exp((2 * self._uniform(rows) - 1) * math.log1p(most))


def _sample(source: Tensor, position: Tensor, *, axis: int) -> Tensor:
    """Linear interpolation of `(rows, a, b)` at fractional positions `(rows, n)` on one axis."""
    position = position.clamp(0, source.shape[axis] - 1 - 1e-3)
    before = position.long()
    other = 2 if axis == 1 else 1
    shape = [-1, -1, -1]
    shape[other] = source.shape[other]
    index = before.unsqueeze(other).expand(shape)
    weight = (position - before).unsqueeze(other)
    return torch.lerp(source.gather(axis, index), source.gather(axis, index + 1), weight)


def _mel(hertz: Tensor) -> Tensor:
    """Slaney's mel scale, as librosa has it: linear below 1 kHz, logarithmic above."""
    return torch.where(
        hertz < 1_000,
        hertz * 3 / 200,
        15 + torch.log(hertz.clamp_min(1.0) / 1_000) * 27 / math.log(6.4),
    )


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1_000 * torch.exp((mel - 15) * math.log(6.4) / 27))

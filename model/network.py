"""The networks that bundles are made of, and what they answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from model.frontend import LogMel, LogMelConfig
from model.heads import Head


@dataclass(frozen=True)
class Output:
    """What a network says of a batch of windows.

    `probabilities` holds `(windows, labels)` by head, `embedding` is `(windows, embedding_dim)`,
    both float32.
    """

    probabilities: dict[str, Tensor]
    embedding: Tensor


class Tagger(nn.Module):
    """Front end, trunk and heads: `(windows, window_samples)` float32 in, `Output` out.

    `trunk` turns log-mels `(windows, frames, mels)` into embeddings `(windows, embedding_dim)`;
    each head is one linear layer over the embedding.
    """

    def __init__(
        self, front_end: LogMel, trunk: nn.Module, embedding_dim: int, heads: Sequence[Head]
    ) -> None:
        super().__init__()
        self.front_end = front_end
        self.trunk = trunk
        self.embedding_dim = embedding_dim
        self.kinds = {head.name: head.kind for head in heads}
        self.heads = nn.ModuleDict(
            {head.name: nn.Linear(embedding_dim, len(head.labels)) for head in heads}
        )

    def logits(self, logmel: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits by head and the embedding of log-mels, for training."""
        embedding = self.trunk(logmel)
        return {name: head(embedding) for name, head in self.heads.items()}, embedding

    def forward(self, samples: Tensor) -> Output:
        return self.from_logmel(self.front_end(samples))

    def from_logmel(self, logmel: Tensor) -> Output:
        """What the network says of log-mels `(windows, frames, mels)` as its front end gives."""
        logits, embedding = self.logits(logmel)
        probabilities = {
            name: raw.float().softmax(-1) if self.kinds[name] == "single" else raw.float().sigmoid()
            for name, raw in logits.items()
        }
        return Output(probabilities, embedding.float())


class Branch(BaseModel):
    """A group of front filters `taps` frames long and `height` bands high.

    `band_stride` bands lie between their positions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    filters: int = Field(ge=1, le=1_024)
    taps: int = Field(ge=1, le=512)
    height: int = Field(ge=1, le=256)
    band_stride: int = Field(1, ge=1, le=64)


class MusicnnConfig(BaseModel):
    """Shape of a musicnn-like network; see `Musicnn`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    front_end: LogMelConfig = LogMelConfig()
    branches: tuple[Branch, ...] = Field(min_length=1, max_length=16)
    first_filters: int = Field(64, ge=1, le=1_024)
    mid_filters: int = Field(64, ge=1, le=1_024)
    mid_taps: int = Field(7, ge=1, le=64)
    embedding_dim: int = Field(200, ge=1, le=256)

    @model_validator(mode="after")
    def _first_filters_are_among_the_others(self) -> "MusicnnConfig":
        if self.first_filters > self.mid_filters:
            raise ValueError("first_filters is more than mid_filters")
        return self


# Frames that filters along time compute at once; 48 take half as long again.
RUN_FRAMES = 16
# Filters that a processor computes at once, and by how many it is given them.
LANES = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
FILTERS_STEP = 8


class FrontFilters(nn.Module):
    """2-D filters followed by the maximum over frequency: `(windows, mels, frames)` to
    `(windows, filters, frames)`.

    The published network normalises after the ReLU and before the maximum. Here the scale is in
    the weights and its sign in `sign`, and the ReLU, being monotone, comes after the maximum,
    where it costs a fiftieth.
    """

    sign: Tensor

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch
        shape = (branch.filters, 1, branch.taps, branch.height)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(branch.filters))
        self.register_buffer("sign", torch.empty(branch.filters, 1))

    def forward(self, logmel: Tensor) -> Tensor:
        along = self._along_time if self.branch.height == 1 else self._along_bands
        return self.sign * functional.relu(self.sign * along(logmel))

    def _along_bands(self, bands: Tensor) -> Tensor:
        """The highest of the positions.

        Where two neighbouring positions side by side leave fewer lanes idle than one does, one
        convolution gives both. A number of filters that is no multiple of eight takes it longer
        than filters of zeros beside them do.
        """
        filters, stride, taps = self.branch.filters, self.branch.band_stride, self.branch.taps
        padded = functional.pad(bands, ((taps - 1) // 2, taps // 2)).unsqueeze(1)
        kernel = self.weight.transpose(2, 3)
        bias: Tensor = self.bias
        positions = (bands.shape[1] - self.branch.height) // stride + 1
        both = positions % 2 == 0 and -2 * filters % LANES < 2 * (-filters % LANES)
        if both:
            lower, upper = (0, 0, 0, stride), (0, 0, stride, 0)
            kernel = torch.cat([functional.pad(kernel, lower), functional.pad(kernel, upper)])
            bias, stride = bias.repeat(2), 2 * stride
        zeros = -len(bias) % FILTERS_STEP
        kernel = functional.pad(kernel, (0, 0, 0, 0, 0, 0, 0, zeros))
        each = functional.conv2d(padded, kernel, functional.pad(bias, (0, zeros)), (stride, 1))
        highest = each.amax(2)
        if both:
            return torch.maximum(highest[:, :filters], highest[:, filters : 2 * filters])
        return highest[:, :filters]

    def _along_time(self, bands: Tensor) -> Tensor:
        """The highest of the bands, each filtered by itself.

        Filters over a single channel leave a processor waiting for memory. So a run of frames is
        computed at once: one matrix product with every filter laid out for each frame of the run.
        """
        filters, taps = self.branch.filters, self.branch.taps
        frames = bands.shape[-1]
        runs = -(-frames // RUN_FRAMES)
        sides = (taps - 1) // 2, taps // 2 + runs * RUN_FRAMES - frames
        padded = functional.pad(bands[:, :: self.branch.band_stride], sides)
        reached = padded.unfold(-1, RUN_FRAMES + taps - 1, RUN_FRAMES)
        # Tap i - t for the run's frame t: (frames reached, filters, RUN_FRAMES)
        edges = functional.pad(self.weight[:, 0, :, 0], (RUN_FRAMES - 1, RUN_FRAMES - 1))
        shifted = edges.unfold(1, RUN_FRAMES, 1).flip(2).transpose(0, 1)
        each = reached.flatten(0, 2) @ shifted.flatten(1)
        # Not `len`, which would fix the number of windows in an exported file.
        highest = each.view(bands.shape[0], -1, runs, filters, RUN_FRAMES).amax(1)
        return highest.transpose(1, 2).flatten(2)[..., :frames] + self.bias.unsqueeze(-1)


class MidLayer(nn.Module):
    """1-D convolution over time, ReLU, then scale and shift by channel."""

    def __init__(self, channels: int, filters: int, taps: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, filters, taps, padding=taps // 2)
        self.scale = nn.Parameter(torch.empty(filters, 1))
        self.shift = nn.Parameter(torch.empty(filters, 1))

    def forward(self, features: Tensor) -> Tensor:
        return functional.relu(self.conv(features)) * self.scale + self.shift


class Musicnn(nn.Module):
    """Log-mels `(windows, frames, mels)` to embeddings, after Pons and Serra, "musicnn", 2019.

    Filters over time and frequency, three 1-D layers of which the last two are residual, maximum
    and mean over time of all of it, and a dense layer. Filters that give a constant are left out,
    so that the first 1-D layer has fewer than the others, whose first ones it is added to. A
    channel of ones beside what is left carries the constants on: zero-padding takes it away near
    the edges as it would them.
    """

    def __init__(self, config: MusicnnConfig) -> None:
        super().__init__()
        self.input_scale = nn.Parameter(torch.empty(2))
        self.front = nn.ModuleList([FrontFilters(branch) for branch in config.branches])
        channels = sum(branch.filters for branch in config.branches)
        first, mid, taps = config.first_filters, config.mid_filters, config.mid_taps
        self.first_is_whole = first == mid
        self.mid = nn.ModuleList(
            [
                MidLayer(channels + 1, first, taps),
                MidLayer(first if self.first_is_whole else first + 1, mid, taps),
                MidLayer(mid, mid, taps),
            ]
        )
        self.dense = nn.Linear(2 * (channels + first + 2 * mid), config.embedding_dim)
        self.scale = nn.Parameter(torch.empty(config.embedding_dim))
        self.shift = nn.Parameter(torch.empty(config.embedding_dim))

    def forward(self, logmel: Tensor) -> Tensor:
        scaled = (logmel.transpose(1, 2) * self.input_scale[0] + self.input_scale[1]).contiguous()
        front = torch.cat([branch(scaled) for branch in self.front], 1)
        first = self.mid[0](_with_ones(front))
        second = self.mid[1](first if self.first_is_whole else _with_ones(first))
        second = second + functional.pad(first, (0, 0, 0, second.shape[1] - first.shape[1]))
        third = second + self.mid[2](second)
        features = torch.cat([front, first, second, third], 1)
        pooled = torch.cat([features.amax(-1), features.mean(-1)], 1)
        return functional.relu(self.dense(pooled)) * self.scale + self.shift


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def build_musicnn(config: Mapping[str, Any], heads: Sequence[Head]) -> Tagger:
    """A musicnn-like tagger from its `model.json` section."""
    parsed = MusicnnConfig.model_validate(config)
    return Tagger(LogMel(parsed.front_end), Musicnn(parsed), parsed.embedding_dim, heads)


# Kind of network in `model.json` -> where its builder lives. A fixed list: what a bundle names is
# looked up here and never imported by its own word.
KINDS = {
    "musicnn": "model.network:build_musicnn",
    "logmel_cnn": "model.logmel_cnn:build_logmel_cnn",
}


def build(kind: str, config: Mapping[str, Any], heads: Sequence[Head]) -> Tagger:
    """An untrained network of `kind`; ValueError for an unknown kind or a config out of bounds."""
    if kind not in KINDS:
        raise ValueError(f"unknown network kind {kind!r}, known: {', '.join(sorted(KINDS))}")
    module, _, function = KINDS[kind].partition(":")
    builder: Callable[[Mapping[str, Any], Sequence[Head]], Tagger]
    builder = getattr(import_module(module), function)
    return builder(config, heads)

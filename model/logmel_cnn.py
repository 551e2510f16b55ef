"""The network of `timbre model train`: small CNNs over log-mels, several side by side.

They are small because what there is to learn from is small, and strided early because that is where
the cost is: a member at the defaults takes up to 0.1 GFLOP for a window of 3 s.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from model.frontend import LogMel, LogMelConfig
from model.heads import Head
from model.network import Tagger

# The log-mels of the GTZAN archive: 22,050 Hz, 3 s in 72 frames, nothing below a clip's peak by
# more than 80 dB. Without that floor the near-silent bands above a lossy codec's cut, which have
# most of the variance then, would be far lower than the network ever saw them.
ARCHIVE_FRONT_END = LogMelConfig(
    sample_rate_hz=22_050,
    n_fft=2_048,
    hop=914,
    n_mels=128,
    f_max_hz=11_025.0,
    frames=72,
    compression="decibel",
    range_db=80.0,
    normalise=True,
)

MAX_EMBEDDING_DIM = 256  # of a bundle
BATCH = 64  # windows at a time, where nothing is learnt
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=4_096)]

# Of filter members: how many, frames long, and of all bands high.
TALL_FILTERS = ((40, 7, 0.2), (40, 7, 0.4), (24, 3, 0.4), (24, 1, 0.7))
TALL_STRIDE = (2, 8)  # frames, bands
LONG_FILTERS = ((16, 9), (16, 17), (16, 33))  # how many, and frames of half the rate long
RANGES = 16  # at most, into which the bands are averaged for these
LAYER_FILTERS, LAYER_TAPS = 64, 7


class MemberConfig(BaseModel):
    """One of the networks side by side.

    `balance` is how much of each band's mean over the window is taken out before it looks, from 0,
    where the recording's equalisation stays, to 1, where none of it is left.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["residual", "filters"] = "residual"
    balance: Share = 0.5


DEFAULT_MEMBERS = (
    MemberConfig(balance=0.5),
    MemberConfig(balance=1.0),
    MemberConfig(kind="filters", balance=0.5),
    MemberConfig(kind="filters", balance=1.0),
)


class LogMelCnnConfig(BaseModel):
    """Shape of the network.

    What its members say is averaged before the softmax; members that hear differently gain more.
    While they learn, the embedding is all that they pool; `narrowed_dim` is what is left of it
    afterwards (see `narrowed`). `channels` and `stem_stride` are those of residual members.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    front_end: LogMelConfig = ARCHIVE_FRONT_END
    members: tuple[MemberConfig, ...] = Field(DEFAULT_MEMBERS, min_length=1, max_length=16)
    channels: tuple[Count, ...] = Field((24, 48, 96, 192), min_length=1, max_length=6)
    stem_stride: tuple[Count, Count] = (2, 4)
    dropout: float = Field(0.3, ge=0, lt=1)
    narrowed_dim: int | None = Field(None, ge=1, le=MAX_EMBEDDING_DIM)

    @property
    def member_dim(self) -> int:
        """Numbers that a member pools."""
        return 2 * self.channels[-1]

    @property
    def pooled_dim(self) -> int:
        """Numbers that all members pool together."""
        return len(self.members) * self.member_dim

    @property
    def embedding_dim(self) -> int:
        return self.narrowed_dim or self.pooled_dim


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; `stride` 2 halves time and frequency."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(channels, filters, (3, 3), (stride, stride))
        self.second = _convolution(filters, filters, (3, 3), (1, 1))
        self.shortcut = (
            nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                _convolution(channels, filters, (1, 1), (1, 1)),
            )
            if stride > 1 or channels != filters
            else nn.Identity()
        )

    def forward(self, features: Tensor) -> Tensor:
        inside = self.second(functional.relu(self.first(features)))
        return functional.relu(inside + self.shortcut(features))


class ResidualMember(nn.Module):
    """`(windows, 1, frames, mels)` to its part `(windows, member_dim)` by residual blocks.

    What is left of frequency is averaged; over time both the mean and the maximum count. He, Zhang,
    Ren and Sun: Deep residual learning for image recognition, 2016.
    """

    def __init__(self, config: LogMelCnnConfig) -> None:
        super().__init__()
        widths = config.channels
        self.stem = _convolution(1, widths[0], (5, 7), config.stem_stride)
        self.blocks = nn.Sequential(
            *(
                Block(before, after, 1 if index == 0 else 2)
                for index, (before, after) in enumerate(
                    zip((widths[0], *widths), widths, strict=False)
                )
            )
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, logmel: Tensor) -> Tensor:
        features = self.blocks(functional.relu(self.stem(logmel))).mean(3)
        return torch.as_tensor(self.dropout(_pooled(features)))


class FilterMember(nn.Module):
    """`(windows, 1, frames, mels)` to its part `(windows, member_dim)` by filters made for music.

    Tall filters hear timbre at any pitch, since of their places along frequency the loudest counts;
    long ones hear how ranges of bands go on. Three layers over time follow, of which the last two
    are residual, and mean and maximum over time of all of it. Pons, Slizovskaia, Gong, Gomez and
    Serra: Timbre analysis of music audio signals with convolutional neural networks, 2017.
    """

    def __init__(self, config: LogMelCnnConfig) -> None:
        super().__init__()
        bands = config.front_end.n_mels
        self.tall = nn.ModuleList(
            _convolution(1, filters, (taps, math.ceil(bands * height)), TALL_STRIDE, (taps // 2, 0))
            for filters, taps, height in TALL_FILTERS
        )
        width = math.ceil(bands / RANGES)
        self.ranges = nn.AvgPool2d((TALL_STRIDE[0], width), ceil_mode=True)
        self.long = nn.ModuleList(
            _along_time(math.ceil(bands / width), filters, taps) for filters, taps in LONG_FILTERS
        )
        front = sum(filters for filters, *_ in (*TALL_FILTERS, *LONG_FILTERS))
        self.layers = nn.ModuleList(
            _along_time(channels, LAYER_FILTERS, LAYER_TAPS)
            for channels in (front, LAYER_FILTERS, LAYER_FILTERS)
        )
        self.dense = nn.Linear(2 * (front + len(self.layers) * LAYER_FILTERS), config.member_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, logmel: Tensor) -> Tensor:
        ranges = self.ranges(logmel)[:, 0].transpose(1, 2)
        front = torch.cat(
            [functional.relu(tall(logmel)).amax(3) for tall in self.tall]
            + [functional.relu(long(ranges)) for long in self.long],
            1,
        )
        first, *others = self.layers
        features = [functional.relu(first(front))]
        for layer in others:
            features.append(features[-1] + functional.relu(layer(features[-1])))
        pooled = _pooled(torch.cat([front, *features], 1))
        return torch.as_tensor(self.dropout(self.dense(pooled)))


def _pooled(features: Tensor) -> Tensor:
    """`(windows, channels, frames)` to their mean and maximum over time, side by side."""
    return torch.cat([features.mean(2), features.amax(2)], 1)


class LogMelCnn(nn.Module):
    """Log-mels `(windows, frames, mels)`, each window normalised, to embeddings."""

    def __init__(self, config: LogMelCnnConfig) -> None:
        super().__init__()
        self.balance = [member.balance for member in config.members]
        self.members = nn.ModuleList(
            FilterMember(config) if member.kind == "filters" else ResidualMember(config)
            for member in config.members
        )
        self.side_by_side = len(config.members) if config.narrowed_dim is None else 1
        self.narrow = (
            nn.Linear(config.pooled_dim, config.narrowed_dim)
            if config.narrowed_dim
            else nn.Identity()
        )

    def forward(self, logmel: Tensor) -> Tensor:
        plane = logmel.unsqueeze(1).contiguous(memory_format=torch.channels_last)
        means = plane.mean(2, keepdim=True)
        heard = [
            member(plane - balance * means)
            for member, balance in zip(self.members, self.balance, strict=True)
        ]
        # Over their number, so that one head's sum over all members is the mean of their logits and
        # each member's weights learn at the pace that they would alone.
        return torch.as_tensor(self.narrow(torch.cat(heard, 1) / len(heard)))


def build_logmel_cnn(config: Mapping[str, Any], heads: Sequence[Head]) -> Tagger:
    """A tagger with a log-mel CNN from its `model.json` section."""
    parsed = LogMelCnnConfig.model_validate(config)
    trunk = LogMelCnn(parsed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Tagger(LogMel(parsed.front_end), trunk, parsed.embedding_dim, heads)


@torch.no_grad()
def narrowed(
    network: Tagger, config: LogMelCnnConfig, head: Head, logmels: Tensor
) -> tuple[Tagger, LogMelCnnConfig]:
    """The trained `network` with an embedding of `MAX_EMBEDDING_DIM` numbers, and its config.

    The first of them are the directions that `head` reads, so that its answers stay what they were
    where its labels are no more than these numbers (of more labels, the strongest directions stay).
    The others are the principal components of the rest over `logmels` `(windows, frames, mels)`.
    All have unit length and stand at right angles, so distances are those of what is pooled.
    """
    layer = network.heads[head.name]
    assert isinstance(layer, nn.Linear)
    where = layer.weight.device
    parts = torch.split(logmels.to(where), BATCH)
    pooled = torch.cat([network.trunk(part) for part in parts]).double()
    centre = pooled.mean(0)
    directions = torch.linalg.svd(layer.weight.double()).Vh
    read_dims = min(len(layer.weight), MAX_EMBEDDING_DIM)
    read, rest = directions[:read_dims], directions[read_dims:]
    spread = (pooled - centre) @ rest.T
    components = torch.linalg.eigh(spread.T @ spread).eigenvectors.flip(1).T @ rest
    kept = torch.cat([read, components[: MAX_EMBEDDING_DIM - len(read)]])

    smaller = config.model_copy(update={"narrowed_dim": MAX_EMBEDDING_DIM})
    result = build_logmel_cnn(smaller.model_dump(mode="json"), [head])
    weight = torch.zeros(len(layer.weight), MAX_EMBEDDING_DIM)
    weight[:, : len(read)] = layer.weight.double() @ read.T
    state = {
        **network.state_dict(),
        "trunk.narrow.weight": kept,
        "trunk.narrow.bias": -kept @ centre,
        f"heads.{head.name}.weight": weight,
        f"heads.{head.name}.bias": layer.bias.double() + layer.weight.double() @ centre,
    }
    result.load_state_dict(state)
    return result.to(where).eval(), smaller


def _convolution(
    channels: int,
    filters: int,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | None = None,
) -> nn.Sequential:
    """Convolution, which keeps the size but for the stride unless `padding` says so, and norm."""
    padding = padding or (size[0] // 2, size[1] // 2)
    return nn.Sequential(
        nn.Conv2d(channels, filters, size, stride, padding, bias=False), nn.BatchNorm2d(filters)
    )


def _along_time(channels: int, filters: int, taps: int) -> nn.Sequential:
    """Convolution over frames that keeps their number, and batch norm."""
    return nn.Sequential(
        nn.Conv1d(channels, filters, taps, padding=taps // 2, bias=False), nn.BatchNorm1d(filters)
    )

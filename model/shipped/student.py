"""The network of `fast`: the folded reference at half the frame rate and fewer positions, taught to
answer as the reference does. No label plays a part, so whatever is fitted on its embedding later
can be cross-validated honestly."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from model.bundle import Bundle
from model.network import Branch, Musicnn, MusicnnConfig, Tagger, build
from model.shipped.coarse import (
    ARCHIVE_FPS,
    FINE_FPS,
    WINDOW_FRAMES,
    Floats,
    Translation,
    compress,
    sampled,
)
from model.shipped.music import Recording

log = logging.getLogger(__name__)

BAND_STRIDE = 3  # bands between positions of a filter
TOP_MEL = 45.245  # Slaney's mel of 8 kHz
BATCH = 64
EMBEDDING_WEIGHT = 0.5  # of a lesson, beside the tags
Item = TypeVar("Item")


def start(reference: Bundle) -> tuple[Tagger, MusicnnConfig]:
    """An untrained student with the reference's filters, resampled to its frame rate.

    One of its frames stands for two of the reference's, so each pair of a filter's taps becomes
    their sum.
    """
    shape = MusicnnConfig.model_validate(reference.config)
    config = MusicnnConfig(
        front_end=shape.front_end.model_copy(
            update={
                "hop": 2 * shape.front_end.hop,
                "frames": -(-shape.front_end.frames // 2),
            }
        ),
        branches=tuple(
            Branch(
                filters=branch.filters,
                taps=-(-branch.taps // 2),
                height=branch.height,
                band_stride=BAND_STRIDE,
            )
            for branch in shape.branches
        ),
        first_filters=shape.first_filters,
        mid_filters=shape.mid_filters,
        mid_taps=5,
        embedding_dim=shape.embedding_dim,
    )
    student = build("musicnn", config.model_dump(mode="json"), reference.heads)
    state = dict(reference.network.state_dict())
    for name, weight in state.items():
        if "front" in name and name.endswith("weight"):
            state[name] = _summed(functional.pad(weight, (0, 0, 0, weight.shape[2] % 2)))
        elif "mid" in name and name.endswith("conv.weight"):
            # Around a frame of the student lie the reference's taps in either of two ways.
            sides = (functional.pad(weight, side) for side in ((1, 2), (2, 1)))
            state[name] = torch.stack([_summed(side) for side in sides]).mean(0)
    student.load_state_dict(state)
    return student, config


def _summed(taps: Tensor) -> Tensor:
    """Neighbouring taps, on axis 2, in pairs."""
    return taps[:, :, 0::2] + taps[:, :, 1::2]


def equalised(logmel: Floats, rng: np.random.Generator) -> Floats:
    """A log-mel `(frames, 96)` as it would be of audio that went through a random gain and
    equaliser, and sometimes a low-pass as of a thrifty codec."""
    mels = np.linspace(0, TOP_MEL, logmel.shape[1] + 2)[1:-1]
    knots, gains = np.sort(rng.uniform(0, 45, 4)), rng.normal(0, 4, 4) * (rng.random() > 0.3)
    decibels = np.interp(mels, knots, gains) + rng.normal(1, 4)
    if rng.random() < 0.15:
        decibels -= 15 * np.maximum(0, mels - rng.uniform(30, 45))
    power = np.maximum(10**logmel - 1, 0) * 10 ** (decibels / 10)
    return np.asarray(np.log10(power + 1), dtype=np.float32)


def excerpt(recording: Recording, rng: np.random.Generator) -> Floats:
    """A window of a recording's log-mels at a random place."""
    last = len(recording.fine) - WINDOW_FRAMES
    place = int(rng.integers(max(1, last + 1)))
    window = recording.fine[place : place + WINDOW_FRAMES].astype(np.float32)
    if last < 4:  # tiled, so it may begin anywhere
        window = np.roll(window, rng.integers(WINDOW_FRAMES), 0)
    return window


def clip_window(clip: Floats, start_s: float, translation: Translation) -> Floats:
    """A window `(WINDOW_FRAMES, 96)` of an archive's clip, as sharp as the archive is."""
    at = (start_s + np.arange(WINDOW_FRAMES) / FINE_FPS) * ARCHIVE_FPS
    first, end = int(at[0]), int(at[-1]) + 3
    return translation(sampled(compress(clip[first:end]), at - first))


def _one(items: Sequence[Item], rng: np.random.Generator) -> Item:
    return items[int(rng.integers(len(items)))]


def varied(
    recordings: Sequence[Recording], count: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Windows of recordings: equalised, at other tempi and pitches, some of them mixed in pairs.

    What the reference says of a mixture is as good a lesson as any, so little music goes far.
    """
    for _ in range(count):
        window = excerpt(_one(recordings, rng), rng)
        if rng.random() < 0.35:
            other = excerpt(_one(recordings, rng), rng)
            share = 10 ** rng.uniform(-1.5, 0)
            window = np.log10(10**window - 1 + share * (10**other - 1) + 1)
        if rng.random() < 0.5:
            at = np.arange(WINDOW_FRAMES) * rng.uniform(0.85, 1.18)
            window = sampled(window, at % (WINDOW_FRAMES - 1.001))
        if rng.random() < 0.4:
            window = sampled(window.T, np.arange(96) + rng.uniform(-2, 2)).T
        yield equalised(window, rng)


def of_archive(
    clips: Sequence[Floats], translation: Translation, count: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Windows of an archive's clips, equalised."""
    for _ in range(count):
        yield equalised(clip_window(_one(clips, rng), rng.uniform(0, 26), translation), rng)


@dataclass(frozen=True)
class Lessons:
    """Windows at the student's frame rate, `(windows, frames, 96)` float16, and what the reference
    says of them: `tags` as probabilities, and its `embedding`."""

    logmel: NDArray[np.float16]
    tags: Floats
    embedding: Floats

    @classmethod
    @torch.inference_mode()
    def ask(cls, reference: Bundle, windows: Iterable[Floats]) -> "Lessons":
        """Put `windows` `(WINDOW_FRAMES, 96)` to the reference."""
        kept, tags, embedding = [], [], []
        coming = iter(windows)
        while asked := list(islice(coming, BATCH)):
            batch = torch.from_numpy(np.stack(asked))
            logits, embedded = reference.network.logits(batch)
            kept.append(halved(batch).half().numpy())
            tags.append(logits["tags"].sigmoid().numpy())
            embedding.append(embedded.numpy())
        return cls(np.concatenate(kept), np.concatenate(tags), np.concatenate(embedding))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
        """Log-mels, tags and embeddings of `count` windows."""
        rows = rng.choice(len(self.tags), count, replace=False)
        return self.logmel[rows].astype(np.float32), self.tags[rows], self.embedding[rows]


def halved(logmel: Tensor) -> Tensor:
    """The reference's log-mels `(windows, frames, 96)` as the student's front end makes them."""
    return logmel[:, ::2]


@dataclass(frozen=True)
class Plan:
    """How long and how hard to train. `batch` counts windows of each source."""

    steps: int
    learning_rate: float
    batch: tuple[int, ...]


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Dying filters pass through denormal numbers, which processors are slow with. The mode is the
    whole thread's, so it is put back."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@_denormals_flushed()
def teach(
    student: Tagger, sources: Sequence[Lessons], plan: Plan, rng: np.random.Generator
) -> Tagger:
    """Train in place to answer as the reference does; what is left is the moving average of the
    weights."""
    trunk = student.trunk
    assert isinstance(trunk, Musicnn)
    # The input's scale stays: its gradient would need one for every input, at twice the cost.
    trunk.input_scale.requires_grad_(False)
    trained = [part for part in student.parameters() if part.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, plan.learning_rate, total_steps=plan.steps, pct_start=0.1
    )
    deviation = torch.from_numpy(sources[0].embedding.std(0) + 0.05)
    average = {name: value.clone() for name, value in student.state_dict().items()}
    for step in range(plan.steps):
        drawn = [source.draw(count, rng) for source, count in zip(sources, plan.batch, strict=True)]
        logmel, tags, wanted = (
            torch.from_numpy(np.concatenate(parts)) for parts in zip(*drawn, strict=True)
        )
        embedded = trunk(logmel)
        raw = student.heads["tags"](embedded)
        # Kullback and Leibler's divergence: what of the cross-entropy can become zero.
        like = functional.binary_cross_entropy_with_logits(raw, tags)
        like = tags.shape[1] * (like - functional.binary_cross_entropy(tags, tags))
        near = ((embedded - wanted) / deviation).square().mean()
        loss = like + EMBEDDING_WEIGHT * near
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for name, value in student.state_dict().items():
                average[name].lerp_(value, 0.5 if step < 100 else 0.01)
        if (step + 1) % 50 == 0:
            log.info("step %d: tags %.3f, embedding %.3f", step + 1, like.item(), near.item())
    student.load_state_dict(average)
    return student.eval()

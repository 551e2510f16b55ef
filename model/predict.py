"""A bundle over a data set: what every window and every track is said to be.

Audio goes the worker's way (its decoder, its cutting, its rule of silence). Log-mels go into the
network behind its front end where it makes such, and are made audible where it makes others.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.bundle import Bundle
from model.datasets.dataset import Clip, Dataset, Skipped, split_name
from model.datasets.logmels import archive_source, makes
from model.datasets.resynthesis import Resynthesis
from model.frontend import LogMelConfig
from model.heads import Head
from model.network import Output
from worker.decode.decoder import Decoder
from worker.errors import DatasetInvalid, DecodeFailed
from worker.settings import WindowSettings
from worker.vote import mean_embedding
from worker.windows import WindowCutter, cut, is_silent

BATCH = 64  # windows
HOP_S = WindowSettings().hop_s

Heard = Literal["audio", "log-mels", "audio resynthesised from log-mels"]


@dataclass(frozen=True)
class Predictions:
    """By track: windows' probabilities `(windows, labels)`, which of them vote, and embeddings.

    `targets` is `(tracks, labels)` in the head's order, `embeddings` `(tracks, dims)` of length 1,
    `heard` what the network was given.
    """

    head: Head
    heard: Heard
    clips: tuple[Clip, ...]
    targets: NDArray[np.float32]
    probabilities: list[NDArray[np.float32]]
    voting: list[NDArray[np.bool_]]
    embeddings: NDArray[np.float32]
    skipped: tuple[Skipped, ...]


def predict(
    bundle: Bundle,
    dataset: Dataset,
    split: str | None = None,
    *,
    hop_s: float = HOP_S,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Predictions:
    """Run `bundle` over the clips of `split`, or over all, a window every `hop_s`.

    Raises
    ------
    DatasetInvalid
        No head of the bundle knows the labels, no clip can be read, or the data set has log-mels
        that neither are those of the bundle's front end nor can be made audible for it.
    """
    head = _head(bundle, dataset)
    chosen = dataset.indices(split)
    heard, windows_of = _reader(bundle, dataset, hop_s)
    kept: list[int] = []
    side = None if split is None else split_name(split)
    skipped = [clip for clip in dataset.skipped if side is None or clip.split == side]
    before = len(skipped)
    probabilities, voting, embeddings = [], [], []
    for number, index in enumerate(chosen, 1):
        clip = dataset.clips[index]
        progress(number, len(chosen))
        try:
            output, votes = windows_of(clip, int(index))
        except DecodeFailed as error:
            skipped.append(Skipped(clip.name, error.message, clip.split))
            continue
        if not votes.any():
            skipped.append(Skipped(clip.name, "every window is silent", clip.split))
            continue
        kept.append(int(index))
        probabilities.append(output.probabilities[head.name].numpy())
        voting.append(votes)
        embeddings.append(mean_embedding(output.embedding.numpy()[votes]))
    if not kept:
        first = skipped[before]
        raise DatasetInvalid(
            f"{dataset.name}: none of its {len(chosen)} clips can be used; the first of them, "
            f"{first.name}: {first.reason}"
        )
    return Predictions(
        head=head,
        heard=heard,
        clips=tuple(dataset.clips[index] for index in kept),
        targets=dataset.targets(head.labels)[kept],
        probabilities=probabilities,
        voting=voting,
        embeddings=np.stack(embeddings),
        skipped=tuple(skipped),
    )


Reader = Callable[[Clip, int], tuple[Output, NDArray[np.bool_]]]


def _reader(bundle: Bundle, dataset: Dataset, hop_s: float) -> tuple[Heard, Reader]:
    rate_hz = bundle.sample_rate_hz
    if dataset.logmels is None:
        return "audio", _audio_windows(bundle, hop_s, lambda clip, _: _decoded(clip, rate_hz))
    front_end = bundle.network.front_end.config
    if makes(front_end, dataset.logmels):
        return "log-mels", _logmel_windows(bundle, dataset, front_end, hop_s)
    resynthesis = Resynthesis(dataset, rate_hz)
    return "audio resynthesised from log-mels", _audio_windows(
        bundle, hop_s, lambda _, row: [resynthesis.samples(row)]
    )


def _decoded(clip: Clip, rate_hz: int) -> Iterable[NDArray[np.float32]]:
    assert clip.path is not None
    return Decoder(clip.path, rate_hz)


def _logmel_windows(
    bundle: Bundle, dataset: Dataset, front_end: LogMelConfig, hop_s: float
) -> Reader:
    network = bundle.network
    source = archive_source(dataset, front_end)
    hop = max(1, round(hop_s / bundle.window_s * front_end.frames))

    def read(_: Clip, row: int) -> tuple[Output, NDArray[np.bool_]]:
        windows = source.windows(row, hop)
        output = _in_batches(network.from_logmel, torch.split(windows, BATCH))
        return output, np.ones(len(windows), dtype=np.bool_)

    return read


def _audio_windows(
    bundle: Bundle, hop_s: float, samples_of: Callable[[Clip, int], Iterable[NDArray[np.float32]]]
) -> Reader:
    settings, rate_hz = WindowSettings(), bundle.sample_rate_hz

    def read(clip: Clip, row: int) -> tuple[Output, NDArray[np.bool_]]:
        cutter = WindowCutter(
            bundle.window_samples, round(hop_s * rate_hz), round(settings.min_tail_s * rate_hz)
        )
        silent: list[NDArray[np.bool_]] = []

        def batches() -> Iterator[Tensor]:
            for windows in cut(samples_of(clip, row), cutter):
                for first in range(0, len(windows), BATCH):
                    batch = np.array(windows[first : first + BATCH])  # PyTorch wants to write
                    silent.append(is_silent(batch, settings.silence_dbfs))
                    yield torch.from_numpy(batch)

        output = _in_batches(bundle.network, batches())
        return output, ~np.concatenate(silent)

    return read


@torch.inference_mode()
def _in_batches(network: Callable[[Tensor], Output], batches: Iterable[Tensor]) -> Output:
    said = [network(batch) for batch in batches]
    names = said[0].probabilities
    return Output(
        {name: torch.cat([output.probabilities[name] for output in said]) for name in names},
        torch.cat([output.embedding for output in said]),
    )


def _head(bundle: Bundle, dataset: Dataset) -> Head:
    """The head of the data set's kind that knows all its labels, in whatever case."""
    for head in bundle.heads:
        if head.kind == dataset.kind and dataset.columns(head.labels).keys() >= set(dataset.labels):
            return head
    known = "; ".join(
        f"{head.name} ({head.kind}): {', '.join(head.labels)}" for head in bundle.heads
    )
    raise DatasetInvalid(
        f"no {dataset.kind}-label head of {bundle.name} knows all labels of {dataset.name} "
        f"({', '.join(dataset.labels[:20])}); it has {known}. Train one on this data set"
    )

"""Exploration: what is in a data set, in pictures."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import librosa
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from model.datasets.dataset import Dataset, left_out
from model.datasets.logmels import LogMelSource, open_source, samples_of
from model.features import RATE_HZ, mfccs
from model.frontend import normalise
from model.logmel_cnn import ARCHIVE_FRONT_END
from model.pictures import MOST_POINTS, Gallery, canvas, drawn_by_chance, scatter_by_class, tsne

SHOWN_LABELS = 12
MOST_LINES = 200  # of a picture with a line a label; FMA's hierarchy has 161
QUICK_CLIPS = 40
PICTURED_S = 30.0

Say = Callable[[str], None]


def explore(
    dataset: Dataset,
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    say: Say = lambda _: None,
) -> Path:
    """Draw waveforms, spectrograms, class balance, durations and t-SNE into `out`; the page."""
    gallery, labels = Gallery(out, dataset.name), _lines(dataset)
    gallery.table("The data set", ["", ""], _facts(dataset))
    gallery.picture(
        "balance",
        _balance(dataset, labels),
        "Class balance",
        f"Clips by label, and by split within each; at most {MOST_LINES} labels, the commonest.",
    )
    chosen = _sample(dataset, QUICK_CLIPS if quick else MOST_POINTS, seed)
    say(f"{dataset.name}: log-mels of {len(chosen.clips)} of {len(dataset.clips)} clips")
    source, chosen = open_source(chosen, ARCHIVE_FRONT_END, out / "logmels")
    gallery.picture(
        "durations",
        _durations(chosen, source, labels),
        "Duration by label",
        "Seconds of audio in a clip of the same labels; boxes hold the middle half.",
    )
    _draw_examples(gallery, chosen, source)
    _draw_features(gallery, chosen, source, seed, say)
    if chosen.skipped:
        gallery.table("Left out", ["clip", "why"], [list(row) for row in left_out(chosen.skipped)])
    return gallery.write()


def _facts(dataset: Dataset) -> list[list[str]]:
    sizes = [f"{split} {len(dataset.indices(split))}" for split in dataset.splits]
    return [
        ["layout", dataset.layout],
        ["task", f"{dataset.kind}-label, {len(dataset.labels)} labels"],
        ["clips", str(len(dataset.clips))],
        [f"{dataset.grouped_by}s", str(len({clip.group for clip in dataset.clips}))],
        ["splits", ", ".join(sizes) or "none"],
        ["licence", dataset.licence],
    ]


def _draw_examples(gallery: Gallery, dataset: Dataset, source: LogMelSource) -> None:
    rows = _firsts(dataset)
    if dataset.logmels is None:
        gallery.picture(
            "waveforms",
            _waveforms(dataset, rows),
            "Waveforms",
            "One clip of each label: the mean of its channels, at most 30 s.",
        )
    gallery.picture(
        "spectrograms",
        _spectrograms(dataset, source, rows),
        "Spectrograms",
        "Log-mels of the same clips: low bands at the bottom, decibels as brightness.",
    )


def _draw_features(
    gallery: Gallery, dataset: Dataset, source: LogMelSource, seed: int, say: Say
) -> None:
    classes = np.array([dataset.labels.index(clip.labels[0]) for clip in dataset.clips])
    mel, cepstra = _statistics(source)
    for name, vectors in (("MFCC", cepstra), ("mel", mel)):
        say(f"t-SNE of {name} features")
        gallery.picture(
            f"tsne_{name.lower()}",
            scatter_by_class(tsne(_standardised(vectors), seed), classes, dataset.labels),
            f"t-SNE of {name} features",
            f"Mean and deviation of every {name} line over the clip; close clips sound alike.",
        )


def _sample(dataset: Dataset, most: int, seed: int) -> Dataset:
    """At most `most` clips, drawn at random; all of them in one split, so that none is dropped."""
    drawn = dataset.only(drawn_by_chance(len(dataset.clips), most, seed))
    return replace(drawn, clips=tuple(replace(clip, split="all") for clip in drawn.clips))


def _firsts(dataset: Dataset) -> list[int]:
    """The first clip of each of the first labels."""
    seen: dict[str, int] = {}
    for row, clip in enumerate(dataset.clips):
        seen.setdefault(clip.labels[0], row)
    return [seen[label] for label in sorted(seen)][:SHOWN_LABELS]


def _lines(dataset: Dataset) -> list[str]:
    """Labels that have a line in a picture: the commonest, in their order."""
    counts = Counter(label for clip in dataset.clips for label in clip.labels)
    commonest = {label for label, _ in counts.most_common(MOST_LINES)}
    return [label for label in dataset.labels if label in commonest]


def _balance(dataset: Dataset, labels: list[str]) -> Figure:
    counts = Counter(
        (label, clip.split or "no split") for clip in dataset.clips for label in clip.labels
    )
    figure, axes = canvas(8, 1.5 + 0.25 * len(labels))
    places, start = np.arange(len(labels)), np.zeros(len(labels))
    for split in (*dataset.splits, "no split"):
        width = np.array([counts[label, split] for label in labels])
        if width.any():
            axes.barh(places, width, left=start, label=split)
        start += width
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("clips")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _durations(dataset: Dataset, source: LogMelSource, labels: list[str]) -> Figure:
    """By the length of the log-mels; long files are said at their full length where known."""
    hop_s = source.front_end.hop / source.front_end.sample_rate_hz
    decoded_s = [len(source.clip(row)) * hop_s for row in range(len(source.clips))]
    seconds = [
        decoded if clip.path is None else _duration_s(clip.path, decoded)
        for clip, decoded in zip(dataset.clips, decoded_s, strict=True)
    ]
    by_label = [
        [s for s, clip in zip(seconds, dataset.clips, strict=True) if label in clip.labels]
        for label in labels
    ]
    figure, axes = canvas(8, 1.5 + 0.25 * len(labels))
    axes.boxplot(by_label, orientation="horizontal", tick_labels=labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    return figure


def _duration_s(path: Path, decoded_s: float) -> float:
    """What the container says, where that is more than what was decoded."""
    with av.open(str(path)) as container:
        return max(decoded_s, (container.duration or 0) / av.time_base)


def _waveforms(dataset: Dataset, rows: list[int]) -> Figure:
    figure = Figure(figsize=(9, 0.9 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(grid, rows, strict=True):
        clip = dataset.clips[row]
        assert clip.path is not None
        samples = samples_of(clip.path, RATE_HZ)[: int(PICTURED_S * RATE_HZ)]
        librosa.display.waveshow(samples, sr=RATE_HZ, ax=axes, color="C0")
        axes.set(ylim=(-1, 1), yticks=[], xlabel="")
        axes.set_ylabel(clip.labels[0], rotation=0, ha="right", va="center")
    # librosa's own tells 10.5 seconds as 10.
    grid[-1].xaxis.set_major_formatter(ScalarFormatter())
    grid[-1].set_xlabel("seconds")
    return figure


def _spectrograms(dataset: Dataset, source: LogMelSource, rows: list[int]) -> Figure:
    columns = 2 if len(rows) > 1 else 1
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(10, 1.9 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    hop_s = source.front_end.hop / source.front_end.sample_rate_hz
    for axes in grid:
        axes.set_axis_off()
    for axes, row in zip(grid, rows, strict=False):
        logmel = source.whole(row).numpy()[: int(PICTURED_S / hop_s)]
        axes.set_axis_on()
        low, high = np.quantile(logmel, [0.02, 0.999])
        seconds, bands = len(logmel) * hop_s, logmel.shape[1]
        axes.imshow(
            logmel.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=low,
            vmax=high,
            extent=(0, seconds, 0, bands),
        )
        axes.set_title(f"{dataset.clips[row].labels[0]}: {dataset.clips[row].name}", fontsize=9)
        axes.set(xlabel="seconds", ylabel="mel band")
    return figure


def _statistics(source: LogMelSource) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation over time by clip: of mel bands and of MFCCs."""
    mel: list[NDArray[np.float64]] = []
    cepstra: list[NDArray[np.float64]] = []
    for row in range(len(source.clips)):
        logmel = normalise(source.whole(row)[None])
        for found, plane in ((mel, logmel), (cepstra, mfccs(logmel))):
            found.append(
                torch.cat([plane.mean(1), plane.std(1, correction=0)], 1)[0].double().numpy()
            )
    return np.stack(mel), np.stack(cepstra)


def _standardised(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((vectors - vectors.mean(0)) / (vectors.std(0) + 1e-9))

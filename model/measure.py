"""Figures: what predictions over windows are worth, by track, with how sure one can be of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from model.calibration import Kind
from model.heads import Head
from worker.settings import VoteMethod
from worker.vote import vote

METHODS: tuple[VoteMethod, ...] = get_args(VoteMethod)

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Voted:
    """What the worker's vote makes of each track's windows.

    `scores` is `(tracks, labels)` in the head's order, calibrated as the head is, and `best` the
    column of the tag that comes first, `(tracks,)`.
    """

    scores: Scores
    best: NDArray[np.intp]

    @classmethod
    def of(
        cls,
        tracks: Sequence[NDArray[np.floating]],
        head: Head,
        method: VoteMethod,
        voting: Sequence[NDArray[np.bool_]] | None = None,
    ) -> "Voted":
        """Vote over each track's `(windows, labels)`; those of `voting`, or all."""
        columns = {label: column for column, label in enumerate(head.labels)}
        scores = np.zeros((len(tracks), len(columns)))
        best = np.zeros(len(tracks), dtype=np.intp)
        for row, windows in enumerate(tracks):
            allowed = np.ones(len(windows), dtype=bool) if voting is None else voting[row]
            verdict = vote(
                {head.name: windows}, allowed, [head], method=method, uncertain_below=0.0
            )
            for tag in verdict.tags:
                scores[row, columns[tag.label]] = tag.score
            best[row] = columns[verdict.tags[0].label]
        return cls(scores, best)

    @property
    def confidence(self) -> Scores:
        """Score of each track's first tag, `(tracks,)`."""
        return np.asarray(self.scores[np.arange(len(self.best)), self.best])

    def hits(self, targets: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Whether each track's first tag is one of its labels, `(tracks,)`."""
        return np.asarray(targets[np.arange(len(targets)), self.best] > 0)

    def accuracy(self, targets: NDArray[np.floating]) -> float:
        """Share of tracks whose first tag is right."""
        return float(self.hits(targets).mean())


def window_hits(
    tracks: Sequence[NDArray[np.floating]], targets: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """Whether the best label of each window, track after track, is (one of) its track's."""
    right = [target[windows.argmax(1)] > 0 for windows, target in zip(tracks, targets, strict=True)]
    return np.concatenate(right)


def window_accuracy(tracks: Sequence[NDArray[np.floating]], targets: NDArray[np.floating]) -> float:
    """Share of all windows whose best label is (one of) their track's."""
    return float(window_hits(tracks, targets).mean())


def nll(scores: Scores, targets: NDArray[np.floating], kind: Kind) -> float:
    """Mean negative log-likelihood in nats: of the right label, or of every label's yes or no."""
    p = np.clip(scores, 1e-12, 1.0)
    if kind == "single":
        return float(-np.log(p[targets.astype(bool)]).mean())
    no = np.clip(1.0 - scores, 1e-12, 1.0)
    return float(-(targets * np.log(p) + (1 - targets) * np.log(no)).mean())

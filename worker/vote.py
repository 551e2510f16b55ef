"""Vote: what the windows of one track say becomes the tags of the track, and its embedding.

Silent windows don't vote. Three methods, explained in docs/voting.md:

mean      the mean of the windows' probabilities, the sum rule of Kittler et al. (1998)
majority  the share of windows that vote for a label
weighted  the mean, each window weighted by how little entropy its probabilities have, after the
          entropy-based combination of Misra, Bourlard and Tyagi (2003)

Kittler, Hatef, Duin and Matas: On Combining Classifiers. IEEE TPAMI 20 (3), 1998.
Misra, Bourlard and Tyagi: New entropy based combination rules in HMM/ANN multi-stream ASR.
ICASSP 2003.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.calibration import Kind
from worker.errors import TrackSilent
from worker.settings import VoteMethod

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]
MULTI_LABEL_VOTE_ABOVE = 0.5


class Head(Protocol):
    """What voting asks of a model's head; `model.bundle.Head` is one."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def categories(self) -> tuple[str, ...]: ...
    def calibrate(self, voted: Floats, method: VoteMethod) -> Floats: ...


@dataclass(frozen=True, slots=True)
class VotedTag:
    """A label with its calibrated score and the share of voting windows that voted for it."""

    head: str
    label: str
    category: str
    score: float
    share: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """All tags of a track, head after head in the model's order and best first within a head.

    `uncertain` says that nothing is clear: the best score lies below the threshold.
    """

    tags: list[VotedTag]
    uncertain: bool


def vote(
    probabilities: Mapping[str, Floats],
    voting: Flags,
    heads: Sequence[Head],
    *,
    method: VoteMethod = "mean",
    uncertain_below: float,
) -> Verdict:
    """Let the windows of a track vote.

    Parameters
    ----------
    probabilities : Mapping[str, np.ndarray [shape=(windows, labels)]]
        By head; rows sum to 1 where the head is single-label.
    voting : np.ndarray [shape=(windows,), dtype=bool]
        False where a window is silent.
    heads : Sequence[Head]
        The model's heads; each must be in `probabilities`.
    method : {"mean", "majority", "weighted"}
    uncertain_below : float
        Compared with the best score of the first single-label head, or, where the model has none,
        with the best score of all.

    Returns
    -------
    Verdict
        Every label of every head. Labels of equal score stand in the order of their mean
        probability, then in the head's own order.

    Raises
    ------
    TrackSilent
        No window votes.
    """
    if not voting.any():
        raise TrackSilent("Every window of the track is silent, so there is nothing to tag.")
    results = [
        _vote_head(head, probabilities[head.name][voting].astype(np.float64), method)
        for head in heads
    ]
    deciding = deciding_heads(heads)
    best = max(tags[0].score for head, tags in zip(heads, results, strict=True) if head in deciding)
    return Verdict(tags=[tag for tags in results for tag in tags], uncertain=best < uncertain_below)


def confidence(probabilities: Floats, kind: Kind) -> Floats:
    """One less the normalised entropy of each window: 0 knows nothing, 1 is sure.

    A single-label head's window is one distribution over K labels, of at most log K nats. A
    multi-label head's is K independent yes-or-no questions, of at most K log 2 nats together.

    Parameters
    ----------
    probabilities : np.ndarray [shape=(windows, labels)]

    Returns
    -------
    np.ndarray [shape=(windows,)], in [0, 1]
    """
    labels = probabilities.shape[1]
    nats: Floats = _nats(probabilities)
    most = np.log(max(labels, 2))  # one label alone is always sure
    if kind == "multi":
        nats = nats + _nats(1.0 - probabilities)
        most = labels * np.log(2.0)
    result: Floats = np.clip(1.0 - nats.sum(axis=1) / most, 0.0, 1.0)
    return result


def deciding_heads(heads: Sequence[Head]) -> Sequence[Head]:
    """Those whose best score says whether a track is uncertain."""
    return [head for head in heads if head.kind == "single"][:1] or heads


def mean_embedding(windows: Floats) -> Floats:
    """The embedding of a track: the mean over its windows, each of length 1 before and the mean
    after.

    Parameters
    ----------
    windows : np.ndarray [shape=(windows, dims)]
        Of those that vote.

    Returns
    -------
    np.ndarray [shape=(dims,)], in the type of `windows`
    """
    return _unit(_unit(windows).mean(axis=0))


def _unit(vectors: Floats) -> Floats:
    """Vectors on the last axis, scaled to length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Floats = vectors / np.maximum(lengths, 1e-12)
    return unit


def _vote_head(head: Head, probabilities: Floats, method: VoteMethod) -> list[VotedTag]:
    mean: Floats = probabilities.mean(axis=0)
    share: Floats = _votes(probabilities, head.kind).mean(axis=0)
    voted: Floats = mean
    if method == "majority":
        voted = share
    elif method == "weighted":
        voted = _weighted_mean(probabilities, confidence(probabilities, head.kind))
    score = head.calibrate(voted, method)
    best_first = np.lexsort((-mean, -score))  # stable: what ties in both keeps the head's order
    return [
        VotedTag(
            head.name,
            head.labels[i],
            head.categories[i],
            score=float(score[i]),
            share=float(share[i]),
        )
        for i in best_first
    ]


def _votes(probabilities: Floats, kind: Kind) -> Floats:
    """Who votes for what, as 0 and 1: (windows, labels). A tie goes to the earlier label."""
    votes: Floats = np.eye(probabilities.shape[1])[probabilities.argmax(axis=1)]
    if kind == "multi":
        votes = (probabilities > MULTI_LABEL_VOTE_ABOVE).astype(np.float64)
    return votes


def _weighted_mean(probabilities: Floats, weights: Floats) -> Floats:
    """Mean over windows; where no window is sure of anything, all count the same."""
    if weights.sum() == 0.0:
        weights = np.ones_like(weights)
    result: Floats = np.average(probabilities, axis=0, weights=weights)
    return result


def _nats(p: Floats) -> Floats:
    """-p log p elementwise, with its limit 0 at p = 0."""
    nats: Floats = -p * np.log(np.where(p > 0.0, p, 1.0))
    return nats

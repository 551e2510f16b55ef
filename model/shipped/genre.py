"""The genre head: one linear layer over a network's embedding, chosen and measured by songs.

GTZAN's archive has log-mels of 639 labelled songs and audio of few, mostly two seconds. So the
archive's log-mels go through the network as blurred as they are, and a ridge regression over music
that exists in both forms says what their embeddings would have been of the audio itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from model.bundle import Bundle
from model.calibration import (
    CONFIDENT_COVERAGE,
    Calibration,
    chance_calibration_error,
    expected_calibration_error,
    fit_temperature,
    threshold_for_coverage,
)
from model.heads import Head
from model.measure import METHODS, Scores, Voted
from model.network import Musicnn, Tagger
from model.shipped.coarse import (
    ARCHIVE_FPS,
    COARSE_FPS,
    FINE_FPS,
    WINDOW_FRAMES,
    Floats,
    Translation,
    compress,
    sampled,
)
from model.shipped.music import Recording
from model.shipped.student import BATCH, clip_window, halved

Ints = NDArray[np.int64]
ARCHIVE_WEIGHT = 2.0  # of a window that is only known blurred
RIDGE = 300.0
STRENGTH = 0.003  # of the logistic regression's freedom
SHRINKAGE = 0.6  # of the discriminant analysis' covariance towards its diagonal
TEMPER = 3.0  # what its scores are too sure by
LOGISTIC_SHARE = 0.5
FOLDS = 10


@dataclass(frozen=True)
class Windows:
    """Embeddings `(windows, dims)` and, of each, whose it is: a position in `songs`."""

    embeddings: Floats
    owner: Ints
    songs: NDArray[np.str_]
    genres: Ints
    splits: NDArray[np.str_]

    def of(self, chosen: NDArray[np.bool_]) -> tuple[Floats, Ints, Ints]:
        """Embeddings, genres and owners of the windows of the chosen songs."""
        kept = chosen[self.owner]
        return self.embeddings[kept], self.genres[self.owner[kept]], self.owner[kept]


@torch.inference_mode()
def embed(network: Tagger, logmel: Floats) -> Floats:
    """The reference's or its student's embeddings of the reference's log-mels
    `(windows, WINDOW_FRAMES, 96)`."""
    return np.asarray(torch.cat([network.trunk(part) for part in _given(network, logmel)]).numpy())


def _given(network: Tagger, logmel: Floats) -> Sequence[Tensor]:
    """The reference's log-mels in batches, as the network's own front end makes them."""
    whole = torch.from_numpy(np.asarray(logmel, np.float32))
    as_heard = halved(whole) if network.front_end.config.frames < WINDOW_FRAMES else whole
    return torch.split(as_heard, BATCH)


def cut(recording: Recording) -> Floats:
    """A recording's windows of log-mels, end to end."""
    starts = range(0, max(1, len(recording.fine) - WINDOW_FRAMES + 1), WINDOW_FRAMES)
    windows = [recording.fine[at : at + WINDOW_FRAMES] for at in starts]
    return np.stack(windows).astype(np.float32)


def heard(network: Tagger, excerpts: Sequence[Recording], labels: Sequence[str]) -> Windows:
    """Embeddings of the excerpts of audio, in the windows that the worker would cut."""
    parts = [embed(network, cut(one)) for one in excerpts]
    return Windows(
        np.concatenate(parts),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        np.array([one.name for one in excerpts]),
        np.array([labels.index(one.genre or "") for one in excerpts]),
        np.array([one.split for one in excerpts]),
    )


def read(
    network: Tagger,
    archive: Any,
    clips: Sequence[Floats],
    translation: Translation,
    sharpen: Pipeline,
) -> Windows:
    """Embeddings of the archive's clips, brought to what audio would have given."""
    starts = np.arange(0.0, len(clips[0]) / ARCHIVE_FPS - 3.1, 3.0)
    parts = [
        embed(network, np.stack([clip_window(clip, at, translation) for at in starts]))
        for clip in clips
    ]
    return Windows(
        np.asarray(sharpen.predict(np.concatenate(parts)), np.float32),
        np.repeat(np.arange(len(clips)), len(starts)),
        archive["names"].astype(str),
        archive["y"].astype(np.int64),
        archive["split"].astype(str),
    )


def fit_sharpening(
    network: Tagger, recordings: Sequence[Recording], translation: Translation
) -> Pipeline:
    """Ridge regression from embeddings of blurred windows to those of the same windows as heard."""
    sharp, blurred = [], []
    for recording in recordings:
        windows = cut(recording)[:12]
        sharp.append(windows)
        times = np.arange(WINDOW_FRAMES) / FINE_FPS
        logmel = compress(recording.coarse[: round(40 * COARSE_FPS)].astype(np.float32))
        for index in range(len(windows)):
            at = (times + index * WINDOW_FRAMES / FINE_FPS) * COARSE_FPS
            blurred.append(translation(sampled(logmel, at)))
    source, target = embed(network, np.stack(blurred)), embed(network, np.concatenate(sharp))
    return make_pipeline(StandardScaler(), Ridge(alpha=RIDGE)).fit(source, target)


@dataclass(frozen=True)
class Linear:
    """A linear classifier: `weight` `(labels, dims)` and `bias` `(labels,)`."""

    weight: NDArray[np.floating]
    bias: NDArray[np.floating]

    def probabilities(self, embeddings: Floats) -> Floats:
        """Of each label, `(windows, labels)`."""
        logits = embeddings @ self.weight.T + self.bias
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True), dtype=np.float32)


def fit_head(
    audio: Windows,
    archive: Windows,
    chosen: NDArray[np.bool_],
    chosen_clips: NDArray[np.bool_],
    *,
    logistic_share: float = LOGISTIC_SHARE,
) -> Linear:
    """Logistic regression and linear discriminant analysis, their logits blended, which is linear
    again. A recording's windows weigh as the root of their number."""
    x, y, owner = audio.of(chosen)
    weight = 1 / np.sqrt(np.bincount(owner)[owner])
    more_x, more_y, _ = archive.of(chosen_clips)
    x, y = np.concatenate([x, more_x]), np.concatenate([y, more_y])
    weight = np.concatenate([weight, np.full(len(more_y), ARCHIVE_WEIGHT)])
    one, other = _logistic(x, y, weight), _discriminant(x, y, weight)
    rest = 1 - logistic_share
    return Linear(
        logistic_share * one.weight + rest * other.weight,
        logistic_share * one.bias + rest * other.bias,
    )


def _logistic(x: Floats, y: Ints, weight: NDArray[np.floating]) -> Linear:
    scaler = StandardScaler().fit(x)
    fitted = LogisticRegression(C=STRENGTH, max_iter=1_000).fit(scaler.transform(x), y, weight)
    scaled = fitted.coef_ / scaler.scale_
    return Linear(scaled, fitted.intercept_ - scaled @ scaler.mean_)


def _discriminant(x: Floats, y: Ints, weight: NDArray[np.floating]) -> Linear:
    """Linear discriminant analysis with weights, which scikit-learn's doesn't take."""
    labels = np.arange(y.max() + 1)
    means = np.stack([np.average(x[y == k], axis=0, weights=weight[y == k]) for k in labels])
    within = x - means[y]
    covariance = (within * (weight / weight.sum())[:, np.newaxis]).T @ within
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(np.diag(covariance))
    directions = np.linalg.solve(covariance, means.T).T
    return Linear(directions / TEMPER, -0.5 * (means * directions).sum(1) / TEMPER)


@dataclass(frozen=True)
class GenreHead:
    """The fitted head with its calibration, and figures for the card."""

    weight: Tensor
    bias: Tensor
    calibration: Calibration
    uncertain_threshold: float
    figures: dict[str, Any]


def learn(audio: Windows, archive: Windows, head: Head) -> GenreHead:
    """Measure by cross-validation over songs, calibrate on validation songs whose artists the fit
    has not heard, and fit on all."""
    held, clips = audio.splits == "valid", archive.splits == "valid"
    fitted = fit_head(audio, archive, ~held, ~clips)
    tracks = np.flatnonzero(held)
    truth = audio.genres[tracks]
    said = [fitted.probabilities(audio.embeddings[audio.owner == track]) for track in tracks]
    voted = {method: Voted.of(said, head, method).scores for method in METHODS}
    calibration = Calibration(
        temperature={
            method: round(fit_temperature(scores, truth), 4) for method, scores in voted.items()
        }
    )
    confidence = calibration.apply(voted["mean"], kind="single", method="mean").max(1)
    threshold = math.floor(1_000 * threshold_for_coverage(confidence, CONFIDENT_COVERAGE)) / 1_000
    right = voted["mean"].argmax(1) == truth
    crossed = _cross_calibrated(voted["mean"], truth, audio.songs[tracks])
    figures = {
        "tried": _tried(audio, archive),
        "validation": {
            "excerpts": len(tracks),
            "accuracy": {
                method: round(float((scores.argmax(1) == truth).mean()), 4)
                for method, scores in voted.items()
            },
            "ece": round(expected_calibration_error(crossed.max(1), right), 4),
            "ece_by_chance": round(chance_calibration_error(crossed.max(1)), 4),
            "accuracy_at_70_percent_coverage": round(
                float(right[confidence >= threshold].mean()), 4
            ),
            "nearest_neighbour_shares_genre": round(_neighbours(audio, tracks), 4),
            "archive_clips": int(clips.sum()),
            "archive_accuracy": round(_accuracy(fitted, archive, np.flatnonzero(clips)), 4),
        },
    }
    everything = fit_head(audio, archive, np.ones_like(held), np.ones_like(clips))
    return GenreHead(
        torch.tensor(everything.weight, dtype=torch.float32),
        torch.tensor(everything.bias, dtype=torch.float32),
        calibration,
        threshold,
        figures,
    )


def _tried(audio: Windows, archive: Windows) -> dict[str, dict[str, float]]:
    """Ways to a head, side by side: over folds by song, and from training to validation songs."""
    nothing = np.zeros(len(archive.songs), bool)
    ways = {
        "logistic regression, audio alone": (1.0, nothing),
        "logistic regression, archive too": (1.0, ~nothing),
        "discriminant analysis, archive too": (0.0, ~nothing),
        "both blended, archive too": (LOGISTIC_SHARE, ~nothing),
    }
    return {
        name: {
            "folds_by_song": _cross_validated(audio, archive, share, allowed),
            "unheard_artists": _unheard(audio, archive, share, allowed),
        }
        for name, (share, allowed) in ways.items()
    }


def _unheard(audio: Windows, archive: Windows, share: float, allowed: NDArray[np.bool_]) -> float:
    """Accuracy on validation excerpts after fitting on training songs."""
    held = audio.splits == "valid"
    clips = allowed & (archive.splits != "valid")
    fitted = fit_head(audio, archive, ~held, clips, logistic_share=share)
    return round(_accuracy(fitted, audio, np.flatnonzero(held)), 4)


def _cross_validated(
    audio: Windows, archive: Windows, share: float, allowed: NDArray[np.bool_]
) -> float:
    """Accuracy over all excerpts, fold by song."""
    hits = 0
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for _, tested in folds.split(audio.genres, audio.genres, audio.songs):
        out = np.isin(np.arange(len(audio.songs)), tested)
        clips = allowed & ~np.isin(archive.songs, audio.songs[out])
        fitted = fit_head(audio, archive, ~out, clips, logistic_share=share)
        hits += round(_accuracy(fitted, audio, tested) * len(tested))
    return round(hits / len(audio.songs), 4)


def _accuracy(fitted: Linear, windows: Windows, tracks: Ints) -> float:
    best = [
        fitted.probabilities(windows.embeddings[windows.owner == track]).mean(0).argmax()
        for track in tracks
    ]
    return float(np.mean(np.array(best) == windows.genres[tracks]))


def _cross_calibrated(scores: Scores, truth: Ints, songs: NDArray[np.str_]) -> Scores:
    """Scores of each half of the songs at the temperature of the other half."""
    half = np.array([sum(name.encode()) % 2 for name in songs])
    result = np.empty_like(scores)
    for side in (0, 1):
        fitted = fit_temperature(scores[half != side], truth[half != side])
        calibration = Calibration(temperature={"mean": fitted})
        result[half == side] = calibration.apply(scores[half == side], kind="single", method="mean")
    return result


def _neighbours(audio: Windows, tracks: Ints) -> float:
    """How often the nearest excerpt of another song, among `tracks`, has the same genre."""
    mean = np.stack([audio.embeddings[audio.owner == track].mean(0) for track in tracks])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    likeness = mean @ mean.T
    songs, genres = audio.songs[tracks], audio.genres[tracks]
    likeness[songs[:, None] == songs[None, :]] = -np.inf
    return float((genres[likeness.argmax(1)] == genres).mean())


def standardise(network: Tagger, sample: Floats) -> None:
    """Give every number of the embedding mean 0 and deviation 1 over `sample` `(windows, dims)`,
    so that distances weigh them alike; the heads change against it and answer as before."""
    trunk = network.trunk
    assert isinstance(trunk, Musicnn)
    mean = torch.from_numpy(sample.mean(0))
    deviation = torch.from_numpy(sample.std(0) + 1e-3)
    with torch.no_grad():
        trunk.scale.div_(deviation)
        trunk.shift.sub_(mean).div_(deviation)
        for layer in network.heads.values():
            assert isinstance(layer, nn.Linear)
            layer.bias.add_(layer.weight @ mean)
            layer.weight.mul_(deviation)


def compare_tags(
    student: Tagger, reference: Bundle, tracks: Sequence[Recording]
) -> dict[str, float]:
    """Mean tags of whole tracks: correlation with the reference's, and how many of its five best
    the student gives too."""
    both = np.stack(
        [
            np.stack([_tags(student, logmel), _tags(reference.network, logmel)])
            for logmel in map(cut, tracks)
        ]
    )
    best = np.argsort(both, axis=2)[:, :, -5:]
    shared = [len(set(mine.tolist()) & set(theirs.tolist())) for mine, theirs in best]
    return {
        "tracks": len(tracks),
        "correlation": round(float(np.corrcoef(both[:, 0].ravel(), both[:, 1].ravel())[0, 1]), 4),
        "of_five_best": round(float(np.mean(shared)), 2),
    }


@torch.inference_mode()
def _tags(network: Tagger, logmel: Floats) -> Floats:
    said = [network.logits(part)[0]["tags"].sigmoid() for part in _given(network, logmel)]
    return np.asarray(torch.cat(said).mean(0).numpy())

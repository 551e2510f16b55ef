"""Evaluation: what a bundle is worth on a data set, by window and by track, for every vote."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from model import learnt
from model.bundle import Bundle
from model.calibration import BINS, bins, chance_calibration_error, expected_calibration_error
from model.datasets.dataset import Dataset
from model.datasets.gtzan import fault_filtered_split
from model.heads import Head
from model.measure import METHODS, Voted, nll, window_hits
from model.pictures import Gallery, canvas, commonest, drawn_by_chance, scatter_by_class, tsne
from model.predict import HOP_S, Predictions, predict
from worker.settings import VoteMethod
from worker.vote import deciding_heads

RESAMPLES = 2_000
CURVE = tuple(share / 20 for share in range(1, 21))  # coverages
MAX_PICTURED_LABELS = 40
BLOCK = 2**24  # numbers at a time, where a table of them would grow with the square of the tracks


@dataclass(frozen=True)
class Evaluation:
    """Predictions and their figures; `report` is what `--json` prints."""

    predictions: Predictions
    voted: dict[VoteMethod, Voted]
    report: dict[str, Any]


def evaluate(
    bundle: Bundle,
    dataset: Dataset,
    split: str | None = None,
    *,
    hop_s: float = HOP_S,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Evaluation:
    """Measure `bundle` on the clips of `split`, or on all; see docs/evaluation.md for each figure.

    A data set without splits is dealt as training on it would, by the seed that `bundle` was
    trained with.

    Raises
    ------
    DatasetInvalid
    """
    dealt_by = bundle.training.get("seed")
    if split is not None and not dataset.splits and isinstance(dealt_by, int) and dealt_by >= 0:
        dataset = dataset.with_split(dealt_by)
    predictions = predict(bundle, dataset, split, hop_s=hop_s, progress=progress)
    head, targets = predictions.head, predictions.targets
    voted = {
        method: Voted.of(predictions.probabilities, head, method, predictions.voting)
        for method in METHODS
    }
    groups = np.unique([clip.group for clip in predictions.clips], return_inverse=True)[1]
    mean = voted["mean"]
    of_labels = _single if head.kind == "single" else _multi
    report = {
        "bundle": {"name": bundle.name, "version": bundle.version},
        "dataset": dataset.name,
        "split": split or "all",
        "input": predictions.heard,
        "caveats": _caveats(bundle, predictions),
        "hop_s": hop_s,
        "head": head.name,
        "kind": head.kind,
        "labels": list(head.labels),
        "tracks": len(targets),
        "groups": int(groups.max()) + 1,
        "skipped": {clip.name: clip.reason for clip in predictions.skipped},
        "window": _window(predictions, groups, seed),
        **_votes(voted, predictions, groups, seed),
        **_calibration(mean, predictions, _threshold(bundle, head), seed),
        "neighbours": {"same_label": _neighbours(predictions, groups)},
        **of_labels(mean, targets, head.labels),
    }
    return Evaluation(predictions, voted, report)


# What the figures don't say -------------------------------------------------------------------


def _caveats(bundle: Bundle, predictions: Predictions) -> list[str]:
    """Sentences on what these figures are no measure of."""
    found = []
    if predictions.heard == "audio resynthesised from log-mels":
        found.append(
            "The bundle's front end makes other log-mels than this archive holds. So these were "
            "made audible: blurred in pitch and time, phases and loudness guessed. These figures "
            "are no measure of the bundle on audio."
        )
    data = str(bundle.training.get("labels") or bundle.training.get("data") or "")
    sides, marks = learnt.sides(bundle.training.get("fit")), learnt.marks(bundle.training)
    known = fault_filtered_split() if "GTZAN" in data else {}
    heard = sum(
        known.get(clip.group) in sides or learnt.mark(clip.name) in marks
        for clip in predictions.clips
    )
    if heard:
        least = "at least " if len(marks) == learnt.MOST else ""
        found.append(
            f"By its card the bundle has learnt from {data}: {least}{heard} of these "
            f"{len(predictions.clips)} tracks are of such songs. These figures are no measure of "
            "it on music that is new to it."
        )
    return found


# Figures -------------------------------------------------------------------------------------


def _intervals(
    values: NDArray[np.float64], groups: NDArray[np.intp], seed: int
) -> list[list[float]]:
    """95 % bootstrap interval of the mean of each column of `values`, a row a track or window.

    Whole artists or recordings are drawn with replacement, so that several excerpts of one don't
    count as independent.
    """
    generator = np.random.default_rng(seed)
    count = int(groups.max()) + 1
    sums = np.stack([np.bincount(groups, column, count) for column in values.T], 1)
    sizes = np.bincount(groups, minlength=count)
    at_once = max(1, BLOCK // count)
    means = []
    for first in range(0, RESAMPLES, at_once):
        resamples = min(at_once, RESAMPLES - first)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
        means.append(drawn @ sums / (drawn @ sizes)[:, None])
    bounds = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return [[float(low), float(high)] for low, high in bounds.T]


def _window(predictions: Predictions, groups: NDArray[np.intp], seed: int) -> dict[str, Any]:
    """How often one window alone is right."""
    hits = window_hits(predictions.probabilities, predictions.targets).astype(np.float64)
    lengths = [len(windows) for windows in predictions.probabilities]
    return {
        "count": len(hits),
        "accuracy": float(hits.mean()),
        "interval": _intervals(hits[:, None], np.repeat(groups, lengths), seed)[0],
    }


def _votes(
    voted: dict[VoteMethod, Voted], predictions: Predictions, groups: NDArray[np.intp], seed: int
) -> dict[str, Any]:
    """How often each vote is right, and by how much two of them differ on the same tracks."""
    targets, kind = predictions.targets, predictions.head.kind
    hits = {method: given.hits(targets).astype(np.float64) for method, given in voted.items()}
    pairs = list(combinations(METHODS, 2))
    values = [*hits.values(), *(hits[first] - hits[second] for first, second in pairs)]
    intervals = _intervals(np.stack(values, 1), groups, seed)
    return {
        "track": {
            method: {
                "accuracy": float(hits[method].mean()),
                "interval": interval,
                "nll": nll(given.scores, targets, kind),
            }
            for (method, given), interval in zip(voted.items(), intervals, strict=False)
        },
        "paired": [
            _paired(first, second, hits[first], hits[second], interval)
            for (first, second), interval in zip(pairs, intervals[len(hits) :], strict=True)
        ],
    }


def _paired(
    first: str,
    second: str,
    hits: NDArray[np.float64],
    others: NDArray[np.float64],
    interval: list[float],
) -> dict[str, Any]:
    """Difference of two votes on the same tracks, with McNemar's exact test."""
    only_first, only_second = int((hits > others).sum()), int((hits < others).sum())
    differ = only_first + only_second
    return {
        "votes": [first, second],
        "difference": float((hits - others).mean()),
        "interval": interval,
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p": float(binomtest(only_first, differ).pvalue) if differ else 1.0,
    }


def _calibration(
    voted: Voted, predictions: Predictions, threshold: float | None, seed: int
) -> dict[str, Any]:
    """What a vote's scores are worth as probabilities."""
    confidence, right = voted.confidence, voted.hits(predictions.targets).astype(np.float64)
    return {
        "ece": expected_calibration_error(confidence, right),
        "ece_by_chance": chance_calibration_error(confidence, seed=seed),
        "nll": nll(voted.scores, predictions.targets, predictions.head.kind),
        "coverage": _coverage(confidence, right, threshold),
    }


def _threshold(bundle: Bundle, head: Head) -> float | None:
    """Below which a track is uncertain by this head; None where another one decides."""
    return bundle.uncertain_threshold if head in deciding_heads(bundle.heads) else None


def _coverage(
    confidence: NDArray[np.float64], right: NDArray[np.float64], threshold: float | None
) -> dict[str, Any]:
    """Accuracy of the most confident share, and of what the bundle doesn't call uncertain."""
    order = np.argsort(-confidence, kind="stable")
    curve = []
    for share in CURVE:
        kept = order[: max(1, round(share * len(order)))]
        curve.append({"coverage": share, "accuracy": float(right[kept].mean())})
    return {
        **_certain(confidence, right, threshold),
        "accuracy_at_70": next(p["accuracy"] for p in curve if p["coverage"] == 0.7),
        "curve": curve,
    }


def _certain(
    confidence: NDArray[np.float64], right: NDArray[np.float64], threshold: float | None
) -> dict[str, Any]:
    """How much is not uncertain, and its accuracy; nothing where another head decides that."""
    if threshold is None:
        return dict.fromkeys(("threshold", "certain", "accuracy_of_certain"))
    certain = confidence >= threshold
    return {
        "threshold": threshold,
        "certain": float(certain.mean()),
        "accuracy_of_certain": float(right[certain].mean()) if certain.any() else None,
    }


def _neighbours(predictions: Predictions, groups: NDArray[np.intp]) -> float | None:
    """Share of tracks whose nearest neighbour of another group shares a label."""
    if len(np.unique(groups)) < 2:
        return None
    tracks = len(groups)
    nearest = np.empty(tracks, dtype=np.intp)
    for rows in np.array_split(np.arange(tracks), -(-tracks * tracks // BLOCK)):
        likeness = predictions.embeddings[rows] @ predictions.embeddings.T
        likeness[groups[rows, None] == groups] = -np.inf
        nearest[rows] = likeness.argmax(1)
    shared = (predictions.targets * predictions.targets[nearest]).sum(1) > 0
    return float(shared.mean())


def _single(voted: Voted, targets: NDArray[np.float32], labels: tuple[str, ...]) -> dict[str, Any]:
    truth = targets.argmax(1)
    columns = np.arange(len(labels))
    present = np.unique(truth)
    by_label = f1_score(truth, voted.best, labels=columns, average=None, zero_division=0.0)
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (truth, voted.best), 1)
    return {
        "macro_f1": float(by_label[present].mean()),
        "f1": {labels[column]: float(by_label[column]) for column in present},
        "confusion": confusion.tolist(),
    }


def _multi(voted: Voted, targets: NDArray[np.float32], labels: tuple[str, ...]) -> dict[str, Any]:
    """ROC-AUC and PR-AUC of labels that some tracks have and some lack, and their plain means."""
    mixed = [c for c in range(len(labels)) if 0 < targets[:, c].sum() < len(targets)]
    roc = {labels[c]: float(roc_auc_score(targets[:, c], voted.scores[:, c])) for c in mixed}
    pr = {
        labels[c]: float(average_precision_score(targets[:, c], voted.scores[:, c])) for c in mixed
    }
    f1 = f1_score(targets > 0, voted.scores > 0.5, average=None, zero_division=0.0)
    return {
        "roc_auc": {"macro": _mean(roc), "labels": roc},
        "pr_auc": {"macro": _mean(pr), "labels": pr},
        "macro_f1": float(f1[mixed].mean()) if mixed else None,
        "f1": {labels[c]: float(f1[c]) for c in mixed},
    }


def _mean(values: dict[str, float]) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


# For people ----------------------------------------------------------------------------------


VOTES = ("vote", "accuracy", "95 % interval", "NLL")
PAIRED = ("votes, paired", "difference", "95 % interval", "only first / second right", "p")
FIGURES = ("figure", "value")


def measured(report: dict[str, Any]) -> str:
    """What was measured on how much."""
    return (
        f"{report['bundle']['name']} {report['bundle']['version']} on {report['dataset']}, "
        f"split {report['split']}: {report['tracks']} tracks, {report['window']['count']} windows"
    )


def vote_rows(report: dict[str, Any]) -> list[list[str]]:
    """What `VOTES` heads: one window, and each vote over the tracks."""
    return [
        ["one window", *_accuracy(report["window"]), ""],
        *(
            [f"track, {method}", *_accuracy(figures), f"{figures['nll']:.3f}"]
            for method, figures in report["track"].items()
        ),
    ]


def _accuracy(figures: dict[str, Any]) -> tuple[str, str]:
    low, high = figures["interval"]
    return f"{figures['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"


def paired_rows(report: dict[str, Any]) -> list[list[str]]:
    """What `PAIRED` heads: each pair of votes over the same tracks."""
    return [
        [
            " - ".join(pair["votes"]),
            f"{pair['difference']:+.1%}",
            f"{pair['interval'][0]:+.1%} to {pair['interval'][1]:+.1%}",
            f"{pair['only_first_right']} / {pair['only_second_right']}",
            f"{pair['p']:.2f}",
        ]
        for pair in report["paired"]
    ]


def figure_rows(report: dict[str, Any]) -> list[list[str]]:
    """What `FIGURES` heads: those of the mean vote."""
    sure = report["coverage"]
    certain = _percent(sure["certain"])
    return [
        ["expected calibration error", f"{report['ece']:.3f}"],
        ["the same by chance, of scores that are right", f"{report['ece_by_chance']:.3f}"],
        ["negative log-likelihood", f"{report['nll']:.3f}"],
        ["right at 70 % coverage", f"{sure['accuracy_at_70']:.1%}"],
        [f"not uncertain ({certain} of tracks)", _percent(sure["accuracy_of_certain"])],
        ["nearest neighbour shares a label", _percent(report["neighbours"]["same_label"])],
        ["macro F1", _percent(report["macro_f1"])],
        *(
            [title, "-" if (macro := report[curve]["macro"]) is None else f"{macro:.3f}"]
            for curve, title in curves(report).items()
        ),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def curves(report: dict[str, Any]) -> dict[str, str]:
    """Curves whose areas a report tells, and what people call them."""
    names = {"roc_auc": "ROC-AUC", "pr_auc": "PR-AUC"}
    return {curve: name for curve, name in names.items() if curve in report}


def label_cells(report: dict[str, Any], label: str) -> list[str]:
    """A label's F1 and the areas under its curves; "-" where the report has none."""
    of_label = [report["f1"], *(report[curve]["labels"] for curve in curves(report))]
    return [f"{figures[label]:.2f}" if label in figures else "-" for figures in of_label]


# Pictures ------------------------------------------------------------------------------------


def draw(evaluation: Evaluation, folder: Path) -> Path:
    """The report's tables, and pictures of scores and of tracks, in `folder`; the page's path."""
    report = evaluation.report
    gallery = Gallery(folder, f"{report['bundle']['name']} on {report['dataset']}")
    gallery.note(measured(report))
    for caveat in report["caveats"]:
        gallery.note(caveat)
    gallery.table("Accuracy", list(VOTES), vote_rows(report))
    gallery.table("Votes, paired", list(PAIRED), paired_rows(report))
    gallery.table("Figures", list(FIGURES), figure_rows(report))
    gallery.table(
        "By label",
        ["label", "F1", *curves(report).values()],
        [[label, *label_cells(report, label)] for label in report["f1"]],
    )
    _draw_scores(gallery, evaluation)
    _draw_tracks(gallery, evaluation.predictions)
    return gallery.write()


def _draw_scores(gallery: Gallery, evaluation: Evaluation) -> None:
    report, mean = evaluation.report, evaluation.voted["mean"]
    if report["kind"] == "single":
        gallery.picture(
            "confusion",
            _confusion(report),
            "Confusion",
            "Counts of tracks; the darker a cell, the larger its share of the row. At most "
            f"{MAX_PICTURED_LABELS} labels, the commonest.",
        )
    gallery.picture(
        "reliability",
        _reliability(mean.confidence, mean.hits(evaluation.predictions.targets)),
        "Reliability",
        f"Expected calibration error {report['ece']:.3f}; {report['ece_by_chance']:.3f} by chance "
        "alone, were every score right. Scores are right where bars end on the diagonal. Above a "
        "bar stands its number of tracks.",
    )
    gallery.picture(
        "coverage",
        _coverage_curve(report["coverage"]),
        "Accuracy against coverage",
        "How many are right of the share of tracks with the best scores. The dot: of those that "
        "are not uncertain.",
    )


def _draw_tracks(gallery: Gallery, predictions: Predictions) -> None:
    shown = drawn_by_chance(len(predictions.clips))
    classes = predictions.targets[shown].argmax(1)
    gallery.picture(
        "embeddings",
        scatter_by_class(tsne(predictions.embeddings[shown]), classes, predictions.head.labels),
        "Embeddings",
        f"t-SNE of {len(shown)} tracks' embeddings, coloured by their (first) label.",
    )
    longest = int(np.argmax([len(windows) for windows in predictions.probabilities]))
    gallery.picture(
        "taggram",
        _taggram(predictions.probabilities[longest], predictions.head.labels),
        f"Taggram of {predictions.clips[longest].name}",
        f"Windows from left to right. Its label: {', '.join(predictions.clips[longest].labels)}.",
    )


def _confusion(report: dict[str, Any]) -> Figure:
    counts = np.asarray(report["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shown = commonest(counts.sum(1), MAX_PICTURED_LABELS)
    counts, shares = counts[np.ix_(shown, shown)], shares[np.ix_(shown, shown)]
    labels = [report["labels"][column] for column in shown]
    side = max(6, 2 + 0.3 * len(labels))
    figure, axes = canvas(side + 1, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("said")
    axes.set_ylabel("true")
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    return figure


def _reliability(confidence: NDArray[np.float64], hits: NDArray[np.bool_]) -> Figure:
    figure, axes = canvas(6, 5)
    for number, inside in bins(confidence):
        middle = (number + 0.5) / BINS
        bar = axes.bar(middle, hits[inside].mean(), width=0.9 / BINS, color="C0")
        axes.bar_label(bar, [str(inside.sum())], padding=2)
    axes.plot([0, 1], [0, 1], "--", color="grey")
    axes.set(xlim=(0, 1), ylim=(0, 1.08), xlabel="score of the first tag", ylabel="share right")
    return figure


def _coverage_curve(coverage: dict[str, Any]) -> Figure:
    figure, axes = canvas(6, 4)
    points = np.array([[p["coverage"], p["accuracy"]] for p in coverage["curve"]])
    axes.plot(points[:, 0], points[:, 1])
    if coverage["accuracy_of_certain"] is not None:
        axes.plot(coverage["certain"], coverage["accuracy_of_certain"], "o")
    axes.set(xlim=(0, 1), xlabel="coverage", ylabel="accuracy")
    axes.grid(alpha=0.3)
    return figure


def _taggram(windows: NDArray[np.float32], labels: tuple[str, ...]) -> Figure:
    shown = np.sort(np.argsort(-windows.mean(0))[:MAX_PICTURED_LABELS])
    figure, axes = canvas(9, 1.5 + 0.22 * len(shown))
    image = axes.imshow(windows[:, shown].T, aspect="auto", cmap="magma", vmin=0, vmax=1)
    axes.set_yticks(range(len(shown)), [labels[column] for column in shown])
    axes.set_xlabel("window")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.colorbar(image, label="probability")
    return figure

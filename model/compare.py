"""Comparison: the approaches that people try first, side by side on one split.

Each approach is measured twice: on the data set's own split, which keeps artists (or recordings)
apart, and on a random split of the same size by segments, which doesn't. The difference is what
the random split flatters.
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedShuffleSplit,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional

from model.datasets.dataset import Dataset, left_out
from model.datasets.logmels import LogMelSource, open_source
from model.device import Precision, choose_device
from model.features import (
    FACTS,
    MFCCS,
    check_table,
    feature_table,
    mfccs,
    save_table,
    whole_clips,
)
from model.frontend import normalise
from model.heads import Head
from model.logmel_cnn import ARCHIVE_FRONT_END, LogMelCnnConfig, MemberConfig, build_logmel_cnn
from model.pictures import Gallery, canvas
from worker.errors import DatasetInvalid

QUICK_CLIPS = 6  # of each label and split
LEAST_CLIPS = {False: 24, True: 6}  # to learn from, by `quick`: the most neighbours of a fold
BATCH, CLIP_NORM = 32, 5.0
IMAGE_FRAMES, THREE_LAYER_FRAMES = 1_024, 599

Say = Callable[[str], None]
Rows = NDArray[np.intp]
Floats = NDArray[np.floating[Any]]
# Learns from some items and says scores `(items, labels)` of others.
Approach = Callable[[Rows, Rows], Floats]


@dataclass(frozen=True)
class Items:
    """What an approach classifies: clips, or segments of clips. All by item."""

    truth: NDArray[np.intp]
    clip: NDArray[np.intp]
    learn: NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One line of the comparison; shares of items or clips that are right."""

    approach: str
    items: str
    apart: float
    mixed: float
    track: float


def compare(
    dataset: Dataset,
    out: Path,
    *,
    table: Path | None = None,
    quick: bool = False,
    seed: int = 0,
    say: Say = lambda _: None,
) -> Path:
    """Measure every approach and write the page under `out`; its path.

    Raises
    ------
    DatasetInvalid
        A multi-label data set, or no split to learn and measure on.
    """
    if table is not None:
        check_table(table)
    if dataset.kind != "single":
        raise DatasetInvalid(f"{dataset.name} has several labels a clip; compare takes one")
    dataset = _chosen(dataset, seed, quick)
    source, dataset = open_source(dataset, ARCHIVE_FRONT_END, out / "logmels")
    for names, reason in left_out(dataset.skipped):
        say(f"skipped {names}: {reason}")
    _check_enough(dataset, quick)
    say(f"{dataset.name}: {len(dataset.clips)} clips; computing features")
    segments = feature_table(dataset, source)
    if table is not None:
        save_table(segments, table)
        say(f"features: {table}")
    rows = []
    for name, items, kind, approach in _approaches(dataset, source, segments, quick, seed):
        row = _measure(name, kind, items, approach, seed)
        say(
            f"{name}: {row.track:.1%} of clips; items apart {row.apart:.1%}, random {row.mixed:.1%}"
        )
        rows.append(row)
    return _page(rows, dataset, out, quick)


def _chosen(dataset: Dataset, seed: int, quick: bool) -> Dataset:
    """Clips to learn from and to measure on: `train` against `test`, or else against `valid`."""
    dataset = dataset if dataset.splits else dataset.with_split(seed)
    _check_enough(dataset, quick)
    measured = _measured(dataset)
    kept, counts = [], Counter[tuple[str, str]]()
    for index, clip in enumerate(dataset.clips):
        key = (clip.labels[0], str(clip.split))
        counts[key] += 1
        if clip.split in {"train", measured} and not (quick and counts[key] > QUICK_CLIPS):
            kept.append(index)
    return dataset.only(kept)


def _measured(dataset: Dataset) -> str:
    return "test" if "test" in dataset.splits else "valid"


def _check_enough(dataset: Dataset, quick: bool) -> None:
    """DatasetInvalid where there is too little to learn from or nothing to measure on."""
    measured = _measured(dataset)
    if not {"train", measured} <= set(dataset.splits):
        raise DatasetInvalid(
            f"{dataset.name} needs clips in train and in valid or test to compare on; it has some "
            f"in {', '.join(dataset.splits)} alone"
        )
    counts = Counter(clip.labels[0] for clip in dataset.clips if clip.split == "train")
    learnt = {label: counts[label] for label in sorted({clip.labels[0] for clip in dataset.clips})}
    least = LEAST_CLIPS[quick]
    if len(learnt) < 2 or min(learnt.values()) < 3 or counts.total() < least:
        raise DatasetInvalid(
            f"{dataset.name}: the grid search needs two labels and {least} clips to learn from, "
            f"3 of each label; in train, of those that can be read, it has {learnt}"
        )


# Measuring -----------------------------------------------------------------------------------


def _measure(name: str, kind: str, items: Items, approach: Approach, seed: int) -> Row:
    learn, test = np.flatnonzero(items.learn), np.flatnonzero(~items.learn)
    scores = approach(learn, test)
    apart = scores.argmax(1) == items.truth[test]
    clips = np.unique(items.clip[test])
    voted = np.stack([scores[items.clip[test] == clip].mean(0) for clip in clips])
    truth = np.array([items.truth[items.clip == clip][0] for clip in clips])
    # Every label on both sides, but where one side is too small for that.
    few = min(len(learn), len(test)) < len(np.unique(items.truth))
    split = ShuffleSplit if few else StratifiedShuffleSplit
    shuffled = split(1, test_size=len(test), random_state=seed)
    mixed_learn, mixed_test = next(shuffled.split(items.truth, items.truth))
    mixed = approach(mixed_learn, mixed_test).argmax(1) == items.truth[mixed_test]
    track = voted.argmax(1) == truth
    return Row(name, kind, float(apart.mean()), float(mixed.mean()), float(track.mean()))


def _approaches(
    dataset: Dataset, source: LogMelSource, segments: pd.DataFrame, quick: bool, seed: int
) -> list[tuple[str, Items, str, Approach]]:
    """Name, items, what an item is, and the approach."""
    found: list[tuple[str, Items, str, Approach]] = []
    for title, kind, table in (
        ("the clip", "clips", whole_clips(segments)),
        ("3 s", "segments", segments),
    ):
        values = table.drop(columns=list(FACTS)).to_numpy(np.float64)
        items = _items(dataset, table["name"].tolist())
        for name, model, grid in _classifiers(seed, quick):
            approach = partial(_searched, model, grid, values, items)
            found.append((f"features over {title}, {name}", items, kind, approach))
    clips = _items(dataset, [clip.name for clip in dataset.clips])
    every = range(len(dataset.clips))
    image = normalise(torch.stack([_resized(source, row, IMAGE_FRAMES) for row in every]))
    three = normalise(torch.stack([_resized(source, row, THREE_LAYER_FRAMES) for row in every]))
    cepstra = normalise(mfccs(three))
    labels, steps = len(dataset.labels), 10 if quick else 600
    windows = [source.windows(row) for row in every]
    names = [c.name for c, cut in zip(dataset.clips, windows, strict=True) for _ in cut]
    networks: list[tuple[str, Items, Tensor, Callable[[], nn.Module]]] = [
        ("image-style CNN, 128 x 1024 mel", clips, image, partial(image_cnn, labels)),
        ("three-layer CNN, 599 x 128 mel", clips, three, partial(ThreeLayerCnn, labels, 128)),
        ("three-layer CNN, 599 x 20 MFCC", clips, cepstra, partial(ThreeLayerCnn, labels, MFCCS)),
        (
            "window CNN, 3 s log-mel",
            _items(dataset, names),
            torch.cat(windows),
            partial(WindowCnn, dataset.labels),
        ),
    ]
    for name, items, plane, build in networks:
        kind = "clips" if items is clips else "segments"
        found.append((name, items, kind, partial(_learned, build, plane, items.truth, steps, seed)))
    return found


def _items(dataset: Dataset, names: list[str]) -> Items:
    places = {clip.name: row for row, clip in enumerate(dataset.clips)}
    clip = np.array([places[name] for name in names], dtype=np.intp)
    truth = np.array([dataset.labels.index(c.labels[0]) for c in dataset.clips], dtype=np.intp)
    learn = np.array([c.split == "train" for c in dataset.clips])
    return Items(truth[clip], clip, learn[clip])


# scikit-learn --------------------------------------------------------------------------------


def _classifiers(seed: int, quick: bool) -> list[tuple[str, BaseEstimator, dict[str, list[Any]]]]:
    trees = 20 if quick else 300
    found: list[tuple[str, BaseEstimator, dict[str, list[Any]]]] = [
        ("logistic regression", LogisticRegression(max_iter=2_000), {"C": [0.01, 0.1, 1.0]}),
        ("SVM", SVC(random_state=seed), {"C": [1.0, 10.0], "gamma": ["scale", 0.003]}),
        (
            "random forest",
            RandomForestClassifier(trees, random_state=seed),
            {"max_features": ["sqrt", 0.3]},
        ),
        (
            "gradient boosting",
            HistGradientBoostingClassifier(max_iter=10 if quick else 100, random_state=seed),
            {"learning_rate": [0.05, 0.1]},
        ),
        ("k nearest neighbours", KNeighborsClassifier(), {"n_neighbors": [3, 7, 15]}),
        (
            "MLP",
            MLPClassifier((128,), max_iter=30 if quick else 200, random_state=seed),
            {"alpha": [0.01, 1.0]},
        ),
    ]
    if quick:
        return [(name, model, {k: v[:1] for k, v in grid.items()}) for name, model, grid in found]
    return found


def _searched(  # noqa: PLR0917  (bound by `partial` but for the last two)
    model: BaseEstimator,
    grid: dict[str, list[Any]],
    values: Floats,
    items: Items,
    learn: Rows,
    test: Rows,
) -> Floats:
    """Scores under the grid's best point, found by cross-validation that keeps clips whole."""
    step = type(model).__name__.lower()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), model),
        {f"{step}__{name}": points for name, points in grid.items()},
        cv=StratifiedGroupKFold(3),
    )
    with warnings.catch_warnings():
        # A point of the grid that has not converged loses the search; that is what it is for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(values[learn], items.truth[learn], groups=items.clip[learn])
    best = search.best_estimator_
    if hasattr(best, "predict_proba"):
        raw = best.predict_proba(values[test])
    else:
        margins = best.decision_function(values[test])
        both = margins if margins.ndim == 2 else np.stack([-margins, margins], 1)
        raw = torch.from_numpy(both).softmax(1).numpy()
    scores = np.zeros((len(test), int(items.truth.max()) + 1))
    scores[:, best.classes_] = raw
    return scores


# Networks ------------------------------------------------------------------------------------


def image_cnn(labels: int) -> nn.Module:
    """A picture's network over a whole clip's spectrogram, halved six times."""
    layers: list[nn.Module] = []
    for before, after, size, stride in (
        (1, 16, 5, 2),
        (16, 32, 3, 1),
        (32, 64, 3, 1),
        (64, 64, 3, 1),
        (64, 64, 3, 1),
    ):
        convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        nn.Unflatten(1, (1, -1)),
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, labels),
    )


class ThreeLayerCnn(nn.Module):
    """Three 1-D convolutions over time across all bands, then mean and maximum, after Dieleman
    and Schrauwen: End-to-end learning for music audio, 2014."""

    def __init__(self, labels: int, bands: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (bands, 128, 128):
            layers += [nn.Conv1d(before, 128, 4), nn.ReLU(), nn.MaxPool1d(4)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, labels))

    def forward(self, plane: Tensor) -> Tensor:
        features = self.layers(plane.transpose(1, 2))
        return torch.as_tensor(self.out(torch.cat([features.mean(2), features.amax(2)], 1)))


class WindowCnn(nn.Module):
    """The network of `timbre model train`, one member, without its augmentation."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        super().__init__()
        config = LogMelCnnConfig(members=(MemberConfig(),)).model_dump(mode="json")
        head = Head(name="genre", kind="single", labels=labels, categories=labels)
        self.tagger = build_logmel_cnn(config, [head])

    def forward(self, logmel: Tensor) -> Tensor:
        return self.tagger.logits(logmel)[0]["genre"]


def _learned(  # noqa: PLR0917  (bound by `partial` but for the last two)
    build: Callable[[], nn.Module],
    plane: Tensor,
    truth: NDArray[np.intp],
    steps: int,
    seed: int,
    learn: Rows,
    test: Rows,
) -> Floats:
    """Plain training, the same for every network: as many batches, AdamW, half a cosine; in mixed
    precision where the machine has it."""
    torch.manual_seed(seed)
    device = choose_device("auto")
    network = build().to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    precision = Precision(device)
    wanted = torch.from_numpy(truth)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    known = torch.from_numpy(learn)
    for _ in range(steps):
        rows = known[torch.randint(len(known), (min(BATCH, len(known)),))]
        cut, asked = plane[rows].to(device), wanted[rows].to(device)
        with precision.cast():
            said = network(cut)
        loss = functional.cross_entropy(said.float(), asked, label_smoothing=0.1)
        precision.step(loss, network, optimizer, CLIP_NORM)
        schedule.step()
    network.eval()
    with torch.inference_mode():
        scores = [
            network(plane[rows].to(device)).softmax(1).cpu()
            for rows in torch.split(torch.from_numpy(test), BATCH)
        ]
    return torch.cat(scores).numpy()


def _resized(source: LogMelSource, row: int, frames: int) -> Tensor:
    """The whole clip as `(frames, mels)`, stretched over time where it has more or fewer."""
    return functional.interpolate(source.whole(row).T[None], size=frames, mode="linear")[0].T


# The page ------------------------------------------------------------------------------------


def _page(rows: list[Row], dataset: Dataset, out: Path, quick: bool) -> Path:
    gallery = Gallery(out, f"Approaches on {dataset.name}")
    learnt, asked = (len(dataset.indices(split)) for split in ("train", _measured(dataset)))
    gallery.note(f"Learnt from {learnt} clips, measured on {asked}.")
    if quick:
        gallery.note("A quick run: too few clips and too short a training to compare by.")
    figure, axes = canvas(9, 1 + 0.32 * len(rows))
    places = np.arange(len(rows))[::-1]
    axes.barh(places + 0.2, [row.mixed for row in rows], 0.38, label="random split by segments")
    axes.barh(
        places - 0.2, [row.apart for row in rows], 0.38, label=f"split by {dataset.grouped_by}"
    )
    axes.set_yticks(places, [row.approach for row in rows])
    axes.set(xlim=(0, 1), xlabel="share of items (clips or segments) that are right")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    gallery.picture(
        "compare",
        figure,
        "How far a random split flatters",
        "Where segments of one song are on both sides, an approach that remembers the song looks "
        "as if it knew the genre.",
    )
    gallery.table(
        "Figures",
        ["approach", "items", f"items, split by {dataset.grouped_by}", "items, random", "clips"],
        [
            [row.approach, row.items, f"{row.apart:.1%}", f"{row.mixed:.1%}", f"{row.track:.1%}"]
            for row in rows
        ],
    )
    told = [asdict(row) for row in rows]
    (out / "compare.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return gallery.write()

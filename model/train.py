"""Training: a data set and a recipe in, a bundle out. Reads top to bottom.

A run has two parts. The rehearsal learns from the training songs alone and is measured on the
validation songs: that gives honest figures, the calibration and the threshold of `uncertain`. The
final fit then learns from both with the same recipe; nothing is chosen after the rehearsal.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from model import learnt
from model.augment import Augmentation, Augmenter
from model.bundle import (
    LONGEST_WINDOW_S,
    SHORTEST_WINDOW_S,
    Bundle,
    all_finite,
    check_cost,
    make_bundle_folder,
)
from model.calibration import (
    CONFIDENT_COVERAGE,
    Calibration,
    fit_temperature,
    threshold_for_coverage,
)
from model.checkpoint import Checkpoint, State
from model.datasets.dataset import Dataset, left_out, odd_labels
from model.datasets.logmels import LogMelSource, open_source
from model.device import Precision, choose_device
from model.folder import alone_in, make_folder
from model.frontend import LogMelConfig
from model.heads import Head
from model.invalid import first_fault
from model.logmel_cnn import BATCH, MAX_EMBEDDING_DIM, LogMelCnnConfig, narrowed
from model.measure import METHODS, Voted, nll, window_accuracy
from model.network import Tagger, build
from worker.errors import DatasetInvalid, SettingsInvalid

Fit = Literal["all", "train"]
CHECKPOINTS = 50  # of a part of a run
VALIDATIONS = 8
NARROWING_CLIPS, NARROWING_WINDOWS = 128, 10  # that say which directions embeddings keep


class Recipe(BaseModel):
    """All that decides a training run but the data and the seed.

    A pass draws one window from every clip. `average` is the decay of the weights' moving average,
    which is what is kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    passes: float = Field(250, gt=0)
    batch: int = Field(64, ge=2)
    learning_rate: float = Field(2e-3, gt=0, le=1)
    weight_decay: float = Field(0.5, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    warm_up: float = Field(0.05, ge=0, lt=1)
    average: float = Field(0.998, ge=0, lt=1)
    clip_norm: float = Field(5.0, gt=0)
    augmentation: Augmentation = Augmentation()
    network: LogMelCnnConfig = LogMelCnnConfig()


FINE_TUNING = Recipe(passes=60, learning_rate=3e-4, weight_decay=0.05, average=0.99)


def load_recipe(path: Path | None, passes: float | None, *, fine_tuning: bool) -> Recipe:
    """The default recipe with what the JSON file at `path` and `passes` say otherwise."""
    base = (FINE_TUNING if fine_tuning else Recipe()).model_dump()
    try:
        other = json.loads(path.read_text(encoding="utf-8-sig")) if path else {}
        if not isinstance(other, dict):
            raise SettingsInvalid(f"the recipe {path} must be a JSON object: names and values")
        if passes is not None:
            other["passes"] = passes
        return Recipe.model_validate(_changed(base, other))
    except ValidationError as error:
        raise SettingsInvalid(f"the recipe can't be used: {first_fault(error)}") from error
    except (OSError, ValueError) as error:
        raise SettingsInvalid(f"the recipe {path} can't be read as JSON: {error}") from error


def _changed(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `other` names, however deep, said otherwise."""
    changed = base | other
    for name, value in other.items():
        before = base.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            changed[name] = _changed(before, value)
    return changed


@dataclass(frozen=True)
class Progress:
    """What a run tells while it runs: how far it is, and figures now and then."""

    step: Callable[[str, int, int, float], None] = lambda *_: None
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Plan:
    """A network to be trained, and what its bundle will say of itself."""

    kind: str
    config: dict[str, Any]
    front_end: LogMelConfig
    head: Head
    window_s: float
    start: Bundle | None

    def network(self) -> Tagger:
        """The network before training: random, or the start's with a new head."""
        network = build(self.kind, self.config, [self.head])
        if self.start is not None:
            theirs = self.start.network
            network.trunk = copy.deepcopy(theirs.trunk).requires_grad_(True)
            same = [head for head in self.start.heads if head.labels == self.head.labels]
            if same:
                network.heads[self.head.name].load_state_dict(
                    theirs.heads[same[0].name].state_dict()
                )
        return network


def train(
    dataset: Dataset,
    out: Path,
    *,
    recipe: Recipe | None = None,
    start: Bundle | None = None,
    fit: Fit = "all",
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Train on `dataset` and write the bundle to `out`.

    Parameters
    ----------
    start
        Fine-tune this bundle's trunk under a new head; from scratch where None.
    fit
        What the bundle's weights learn from: "all" for train and validation together after the
        rehearsal, "train" for the training songs alone.
    work
        Where log-mels of audio and the checkpoint are kept; `out` with `.work` where None.

    Raises
    ------
    DatasetInvalid, SplitLeaks
    CheckpointInvalid
        `resume` without a checkpoint, or with that of another run.
    BundleInvalid
        A network that computes more than a bundle's may.
    SettingsInvalid
        A folder that can't be written to, or in which another run is at work.
    """
    recipe = recipe or (Recipe() if start is None else FINE_TUNING)
    progress = progress or Progress()
    work = work or Path(f"{out.absolute()}.work")
    where = choose_device(device)
    make_bundle_folder(out)
    make_folder(work)
    with alone_in(work):
        dataset = _with_splits(dataset, seed)
        plan = _plan(dataset, recipe, start)
        with torch.device("meta"):  # or it would be refused once it has learnt
            check_cost(out, build(plan.kind, plan.config, [plan.head]))
        source, dataset = _opened(dataset, plan.front_end, work / "logmels", progress)
        songs, held = dataset.indices("train"), dataset.indices("valid")
        targets = dataset.targets()
        checkpoint = Checkpoint(
            work / "checkpoint.pt", _fingerprint(dataset, recipe, plan, seed, fit)
        )
        if resume:
            checkpoint.require()
        else:
            checkpoint.forget()

        trainer = Trainer(plan, recipe, source, targets, seed, where, checkpoint, progress)
        validate = Validation(source, targets, held, plan.head, where)
        network, config = trainer.fit("rehearsal", songs, validate)
        calibration, threshold, figures = _calibrated(
            plan.head, validate.probabilities(network), targets[held]
        )
        if fit == "all":
            network, config = trainer.fit("final", np.concatenate([songs, held]))

        bundle = Bundle(
            name=_bundle_name(out),
            heads=(plan.head.model_copy(update={"calibration": calibration}),),
            sample_rate_hz=plan.front_end.sample_rate_hz,
            window_s=plan.window_s,
            embedding_dim=network.embedding_dim,
            uncertain_threshold=threshold,
            kind=plan.kind,
            config=config,
            network=network.cpu(),
            training=_training(dataset, recipe, start, seed, fit),
            figures=figures,
        )
        saved = bundle.save(out, card=_card(bundle, dataset))
        checkpoint.forget()
        return saved


# The loop ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """Everything that both parts of a run share."""

    plan: Plan
    recipe: Recipe
    source: LogMelSource
    targets: NDArray[np.float32]
    seed: int
    device: torch.device
    checkpoint: Checkpoint
    progress: Progress

    def fit(
        self, part: str, songs: NDArray[np.intp], validate: "Validation | None" = None
    ) -> tuple[Tagger, dict[str, Any]]:
        """Learn from `songs`: the moving average of a network's weights, with its config."""
        recipe = self.recipe
        torch.manual_seed(self.seed)
        torch.backends.cudnn.deterministic = True  # or gradients are added up in any order
        network = self.plan.network().to(self.device).train()
        average = copy.deepcopy(network).requires_grad_(False)
        optimizer = _optimizer(network, recipe)
        generator = torch.Generator()
        augment = Augmenter(recipe.augmentation, self.plan.front_end, generator, self.device)
        wanted = torch.from_numpy(self.targets)
        precision = Precision(self.device)
        state = State(network, average, optimizer, precision)
        batch = min(recipe.batch, len(songs))
        steps = max(1, int(recipe.passes * len(songs) / batch))
        every = max(1, steps // VALIDATIONS)
        losses: list[float] = []
        for step in range(self.checkpoint.restore(part, state), steps):
            # Seeded by step, so that a resumed run draws what an uninterrupted one would have.
            generator.manual_seed(self.seed * 1_000_003 + step)
            torch.manual_seed(self.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, steps, recipe.warm_up)
            rows = torch.from_numpy(songs)[_batch_rows(step, batch, len(songs), self.seed)]
            places = torch.rand(batch, generator=generator)
            excerpts = self.source.excerpts(rows, augment.span, places).to(self.device)
            logmel, target = augment(excerpts, wanted[rows].to(self.device))
            with precision.cast():
                loss = _loss(network, self.plan.head, logmel, target, recipe.label_smoothing)
            precision.step(loss, network, optimizer, recipe.clip_norm)
            done = step + 1
            _follow(average, network, min(recipe.average, done / (done + 9)))
            losses.append(loss.item())
            self.progress.step(part, done, steps, losses[-1])
            if done % every == 0:
                told = validate.told(average) if validate else "no songs held back"
                mean = sum(losses) / len(losses)
                self.progress.say(f"{part} {done / steps:4.0%}  loss {mean:.3f}  {told}")
                losses.clear()
            if done % max(1, steps // CHECKPOINTS) == 0 or done == steps:
                if not all_finite(average.state_dict().values()):
                    raise SettingsInvalid(
                        f"{part}: weights have grown without bounds by step {done} of {steps}; "
                        "lower the recipe's learning_rate"
                    )
                self.checkpoint.keep(part, done, state)
        return self._finished(average.eval(), songs)

    def _finished(self, network: Tagger, songs: NDArray[np.intp]) -> tuple[Tagger, dict[str, Any]]:
        """A trained network as its bundle holds it: no larger an embedding than bundles may have,
        whose directions are those of `songs`."""
        plan = self.plan
        if network.embedding_dim <= MAX_EMBEDDING_DIM:
            return network, plan.config
        chosen = songs[:: -(-len(songs) // NARROWING_CLIPS)]
        logmels = torch.cat([self.source.windows(int(row))[:NARROWING_WINDOWS] for row in chosen])
        config = LogMelCnnConfig.model_validate(plan.config)
        smaller, config = narrowed(network, config, plan.head, logmels)
        return smaller, config.model_dump(mode="json")


def _loss(network: Tagger, head: Head, logmel: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each member on its own, so that members differ and their mean gains."""
    members = getattr(network.trunk, "side_by_side", 1)
    embedding = network.trunk(logmel).float().reshape(len(logmel), members, -1) * members
    layer = network.heads[head.name]
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.reshape(len(layer.weight), members, -1)
    logits = torch.einsum("wmd,lmd->wml", embedding, weight) + layer.bias
    target = target[:, None].expand_as(logits)
    if head.kind == "multi":
        return functional.binary_cross_entropy_with_logits(logits, target)
    smoothed = target * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(smoothed * logits.log_softmax(-1)).sum(-1).mean()


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019); biases and norms don't decay."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _schedule(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warm = max(1, int(steps * warm_up))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batch_rows(step: int, batch: int, songs: int, seed: int) -> Tensor:
    """Rows of one batch out of an endless row of shuffled passes."""
    places = torch.arange(step * batch, (step + 1) * batch)
    shuffled = {
        number: torch.randperm(
            songs, generator=torch.Generator().manual_seed(seed * 1_000_003 + number)
        )
        for number in {int(place) // songs for place in places}
    }
    return torch.stack([shuffled[int(place) // songs][int(place) % songs] for place in places])


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the average towards the weights and the batch norms' statistics."""
    moving = average.state_dict()
    for name, current in network.state_dict().items():
        if current.is_floating_point():
            moving[name].lerp_(current, 1 - decay)


# Validation and calibration ------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """The songs held back, whole, in consecutive windows."""

    source: LogMelSource
    targets: NDArray[np.float32]
    rows: NDArray[np.intp]
    head: Head
    device: torch.device

    @torch.inference_mode()
    def probabilities(self, network: Tagger) -> list[NDArray[np.float64]]:
        """By song, `(windows, labels)`; no more windows are held than a song and a batch have."""
        network.eval()
        lengths: list[int] = []
        said = [
            network.from_logmel(batch.to(self.device)).probabilities[self.head.name].cpu()
            for batch in self._batches(lengths)
        ]
        return np.split(torch.cat(said).double().numpy(), np.cumsum(lengths)[:-1])

    def _batches(self, lengths: list[int]) -> Iterator[Tensor]:
        """The windows of all songs, `BATCH` at a time; how many a song has goes to `lengths`."""
        front_end = self.source.front_end
        waiting = torch.empty(0, front_end.frames, front_end.n_mels)
        for row in self.rows:
            windows = self.source.windows(int(row))
            lengths.append(len(windows))
            *full, waiting = torch.split(torch.cat([waiting, windows]), BATCH)
            yield from full
        yield waiting

    def told(self, network: Tagger) -> str:
        """Figures in a line, in the precision that it learns in."""
        with Precision(self.device).cast():
            songs = self.probabilities(network)
        wanted = self.targets[self.rows]
        voted = Voted.of(songs, self.head, "mean")
        loss = f"NLL {nll(voted.scores, wanted, self.head.kind):.4f}"
        if self.head.kind == "multi":
            return f"valid: {loss}"
        windows = window_accuracy(songs, wanted)
        tracks = voted.accuracy(wanted)
        return f"valid: {windows:.1%} of windows, {tracks:.1%} of tracks, {loss}"


def _calibrated(
    head: Head, songs: Sequence[NDArray[np.float64]], targets: NDArray[np.float32]
) -> tuple[Calibration, float, dict[str, Any]]:
    """Temperature by voting method and threshold, fitted on songs that weren't learnt from."""
    voted = {method: Voted.of(songs, head, method) for method in METHODS}
    wanted = targets.argmax(1) if head.kind == "single" else targets
    calibration = Calibration(
        temperature={method: fit_temperature(v.scores, wanted) for method, v in voted.items()}
    )
    scores = calibration.apply(voted["mean"].scores, kind=head.kind, method="mean")
    figures = {
        "measured_on": f"{len(songs)} validation songs, by the rehearsal",
        "window_accuracy": window_accuracy(songs, targets),
        "track_accuracy": {method: given.accuracy(targets) for method, given in voted.items()},
    }
    return calibration, threshold_for_coverage(scores.max(1), CONFIDENT_COVERAGE), figures


# Before the loop -----------------------------------------------------------------------------


def _with_splits(dataset: Dataset, seed: int) -> Dataset:
    """The data set's own split, or one made by artist or recording; it needs train and valid."""
    if not dataset.splits:
        return dataset.with_split(seed)
    if "train" not in dataset.splits:
        raise DatasetInvalid(
            f"{dataset.name} has only {', '.join(dataset.splits)}: there is nothing to train on"
        )
    if "valid" in dataset.splits:
        return dataset.check_split()
    inside = replace(dataset, clips=tuple(c for c in dataset.clips if c.split == "train"))
    side = {clip.name: clip.split for clip in inside.with_split(seed, (0.8, 0.2, 0.0)).clips}
    return replace(
        dataset,
        clips=tuple(replace(clip, split=side.get(clip.name, clip.split)) for clip in dataset.clips),
    )


def _opened(
    dataset: Dataset, front_end: LogMelConfig, cache: Path, progress: Progress
) -> tuple[LogMelSource, Dataset]:
    """The clips' log-mels, and the data set of those that can be read; it has both sides."""
    source, dataset = open_source(
        dataset, front_end, cache, lambda n, all_: progress.step("decode", n, all_, 0)
    )
    for names, reason in left_out(dataset.skipped):
        progress.say(f"skipped {names}: {reason}")
    for told in odd_labels(dataset):
        progress.say(told)
    for side in ("train", "valid"):
        if side not in dataset.splits:
            raise DatasetInvalid(
                f"{dataset.name}: no readable clip is in split {side!r}; a run needs clips to "
                f"learn from and others, of another {dataset.grouped_by}, to measure on. Without a "
                f"split of its own, three {dataset.grouped_by}s of a label are enough"
            )
    return source, dataset


def _plan(dataset: Dataset, recipe: Recipe, start: Bundle | None) -> Plan:
    single = dataset.kind == "single"
    try:
        head = Head(
            name="genre" if single else "tags",
            kind=dataset.kind,
            labels=dataset.labels,
            categories=("genre",) * len(dataset.labels),
        )
    except ValidationError as error:
        raise DatasetInvalid(
            f"{dataset.name}: labels that no model can have: {first_fault(error, 'all')}"
        ) from error
    if single and len(dataset.labels) < 2:
        raise DatasetInvalid(
            f"{dataset.name} has one label, {dataset.labels[0]!r}, and nothing to tell it from; of "
            "a folder per genre, name the folder right above those of the genres"
        )
    if start is not None:
        heard = start.network.front_end.config
        return Plan(start.kind, start.config, heard, head, start.window_s, start)
    front_end = recipe.network.front_end
    window_s = round(front_end.frames * front_end.hop / front_end.sample_rate_hz, 1)
    if not SHORTEST_WINDOW_S <= window_s <= LONGEST_WINDOW_S:
        raise SettingsInvalid(
            f"the recipe's front end hears {window_s} s at a time, and a bundle hears "
            f"{SHORTEST_WINDOW_S} to {LONGEST_WINDOW_S} s"
        )
    return Plan(
        "logmel_cnn", recipe.network.model_dump(mode="json"), front_end, head, window_s, None
    )


def _fingerprint(dataset: Dataset, recipe: Recipe, plan: Plan, seed: int, fit: Fit) -> str:
    told = {
        "clips": [(clip.name, clip.labels, clip.split) for clip in dataset.clips],
        "recipe": recipe.model_dump(mode="json"),
        "network": [plan.kind, plan.config],
        "start": plan.start.version if plan.start else None,
        "seed": seed,
        "fit": fit,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


# The bundle ----------------------------------------------------------------------------------


def _bundle_name(out: Path) -> str:
    """The folder's name, in the letters that a bundle's name may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip("-._")[:64] or "bundle"


def _training(
    dataset: Dataset, recipe: Recipe, start: Bundle | None, seed: int, fit: Fit
) -> dict[str, Any]:
    """What a bundle tells of how it was trained."""
    songs = [clip.name for clip in dataset.clips if clip.split in learnt.sides(fit)]
    return {
        "data": dataset.name,
        "licence": dataset.licence,
        "start": f"{start.name} {start.version}" if start else "from scratch",
        "songs": len(songs),
        "fit": fit,
        "seed": seed,
        "recipe": recipe.model_dump(mode="json"),
        learnt.KEY: learnt.record(songs, start.training if start else {}),
    }


def _card(bundle: Bundle, dataset: Dataset) -> str:
    """The model card."""
    figures = bundle.figures["track_accuracy"]
    told = "\n".join(f"| {method} | {accuracy:.1%} |" for method, accuracy in figures.items())
    songs, held = len(dataset.indices("train")), len(dataset.indices("valid"))
    these = "those and the validation songs" if bundle.training["fit"] == "all" else "those alone"
    return f"""# {bundle.name}

A Timbre bundle made by `timbre model train` ({bundle.training["start"]}).

- Task: {dataset.kind}-label, {len(dataset.labels)} labels: {", ".join(dataset.labels)}.
- Data: {dataset.name}; {songs} clips to train, {held} to validate, split by {dataset.grouped_by}.
- Licence of the data: {dataset.licence}. The weights were learnt from it: what it allows is what
  they may be used for.
- Network: `{bundle.kind}` over {bundle.window_s} s of {bundle.sample_rate_hz} Hz audio, front end
  included; embeddings of {bundle.embedding_dim} numbers.
- Seed {bundle.training["seed"]}; the whole recipe stands in `model.json` under `training`.

A rehearsal learnt from the training songs alone and was measured on the validation songs. Its
calibration is the bundle's. The weights here learnt from {these}.

| vote | validation tracks whose first tag is right |
|---|---|
{told}

`uncertain` is set below a score of {bundle.uncertain_threshold:.3f}, which {CONFIDENT_COVERAGE:.0%}
of the validation tracks reach.
"""

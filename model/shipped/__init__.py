"""The shipped bundles, made from nothing by one command: `timbre model recipe --out DIR`.

1. Fetch musicnn's wheel, and Debian's game music to learn from.
2. Fold the reference, and ask it about windows of all that music.
3. Teach the student, a cheaper network, those answers.
4. Fit a genre head on the embeddings of each, calibrate it, and write bundles and cards: the
   reference is `default`, the student `fast`.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bundle import Bundle, make_bundle_folder
from model.folder import make_folder
from model.heads import Head
from model.musicnn import REQUIREMENT, fetch_wheel, folded, licence, read_checkpoint
from model.network import MusicnnConfig, Tagger, build
from model.shipped import coarse, genre, music
from model.shipped.card import card
from model.shipped.coarse import Floats, Translation
from model.shipped.genre import GenreHead
from model.shipped.music import Recording
from model.shipped.student import Lessons, Plan, of_archive, start, teach, varied

log = logging.getLogger(__name__)

ORIGIN = {
    "origin": f"{REQUIREMENT}, MSD_musicnn, ISC licence (LICENSE.musicnn.md)",
    "labels": "GTZAN, fault-filtered split, training and validation songs",
    "labels_licence": "recordings without copyright clearance: research use by custom",
}
LOG_MELS = "logmels"  # where in the folder of work

# Windows to learn from; of each the plan's batches have their part, in this order.
EXCERPT_WINDOWS, GAME_WINDOWS, ARCHIVE_WINDOWS = 12_000, 8_000, 4_000
PLAN = Plan(steps=1_400, learning_rate=3e-4, batch=(34, 20, 10))
PLAN_WITHOUT_GAME = replace(PLAN, batch=PLAN.batch[::2])


@dataclass(frozen=True)
class Material:
    """What there is to learn from: game music, GTZAN's excerpts of audio, and its archive, whose
    `clips` are in decibels. `tracks` are only measured on."""

    game: Sequence[Recording]
    tracks: Sequence[Recording]
    excerpts: Sequence[Recording]
    archive: dict[str, Any]
    clips: Sequence[Floats]
    translation: Translation

    @classmethod
    def gather(cls, data: Path, work: Path) -> "Material":
        """What is in `data` and, downloaded to `work`, in Debian; log-mels are kept in `work`."""
        cache = work / LOG_MELS
        cache.mkdir(exist_ok=True)
        game = list(music.recordings(music.debian_music(work), cache))
        tracks = list(music.recordings(music.shared_tracks(data / "audio"), cache))
        excerpts = music.excerpts(data / "gtzan", cache)
        archive = _archive(data / "gtzan" / "logmel30s.npz")
        clips = [coarse.archive_decibels(clip) for clip in archive["X"]]
        translation = Translation.fit([(one.fine, one.coarse) for one in excerpts])
        return cls(game, tracks, excerpts, archive, clips, translation)

    @property
    def head(self) -> Head:
        """The head to be learnt: GTZAN's genres, in the archive's order."""
        labels = tuple(str(name) for name in self.archive["genres"])
        return Head(name="genre", kind="single", labels=labels, categories=("genre",) * len(labels))

    def lessons(self, reference: Bundle, rng: np.random.Generator) -> list[Lessons]:
        """What the reference says of each source of music, in the order of the plan's batch."""
        windows = [varied(self.excerpts, EXCERPT_WINDOWS, rng)]
        if self.game:
            windows.append(varied(self.game, GAME_WINDOWS, rng))
        windows.append(of_archive(self.clips, self.translation, ARCHIVE_WINDOWS, rng))
        return [Lessons.ask(reference, source) for source in windows]

    def genre_head(self, network: Tagger) -> GenreHead:
        """The head fitted to `network`, whose embedding is standardised for it."""
        head = self.head
        genre.standardise(network, genre.heard(network, self.excerpts, head.labels).embeddings)
        sharpen = genre.fit_sharpening(network, [*self.excerpts, *self.game], self.translation)
        return genre.learn(
            genre.heard(network, self.excerpts, head.labels),
            genre.read(network, self.archive, self.clips, self.translation, sharpen),
            head,
        )


def build_shipped(out: Path, *, data: Path, work: Path, seed: int = 0) -> tuple[Bundle, Bundle]:
    """Make the shipped bundles in `out/default` and `out/fast`; gives them as loaded from there.

    `data` is the folder of shared data (`gtzan/` and `audio/`), `work` keeps downloads and
    log-mels for the next time.
    """
    began = time.monotonic()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    make_folder(work)
    for name in ("default", "fast"):
        make_bundle_folder(out / name)
    wheel = fetch_wheel(work)
    reference = folded(read_checkpoint(wheel, "MSD_musicnn"))
    at_hand = (work / LOG_MELS).exists()
    log.info("decoding")
    material = Material.gather(data, work)

    log.info("asking the reference, %.0f s in", time.monotonic() - began)
    lessons = material.lessons(reference, rng)
    log.info("teaching the student, %.0f s in", time.monotonic() - began)
    student, config = start(reference)
    teach(student, lessons, PLAN if material.game else PLAN_WITHOUT_GAME, rng)
    tracks = material.tracks
    likeness = (
        {"tags_against_reference": genre.compare_tags(student, reference, tracks)} if tracks else {}
    )

    def finish(
        name: str, network: Tagger, config: MusicnnConfig, more: dict[str, Any], **training: object
    ) -> Bundle:
        """Fit a network's genre head and write the bundle; `more` are figures."""
        log.info("fitting the genre head of %s, %.0f s in", name, time.monotonic() - began)
        fitted = material.genre_head(network)
        figures = {
            **fitted.figures,
            **more,
            "recipe_s": round(time.monotonic() - began),
            "log_mels_at_hand": at_hand,
        }
        log.info("measured: %s", json.dumps(figures))
        bundle = replace(
            _with_genres(reference, network, config, material.head, fitted),
            name=f"timbre-{name}",
            training={**ORIGIN, "music": _told(material.game), "seed": seed, **training},
            figures=figures,
        )
        folder = out / name
        (folder / "LICENSE.musicnn.md").write_text(licence(wheel), encoding="utf-8")
        return bundle.save(folder, card=card(bundle))

    fast = finish(
        "fast", student, config, likeness, windows=sum(len(source.tags) for source in lessons)
    )
    whole = MusicnnConfig.model_validate(reference.config)
    return finish("default", reference.network, whole, {}), fast


def _with_genres(
    reference: Bundle, network: Tagger, config: MusicnnConfig, head: Head, fitted: GenreHead
) -> Bundle:
    """`network` as a bundle: the genre head before those of the reference."""
    heads = (head.model_copy(update={"calibration": fitted.calibration}), *reference.heads)
    settings = config.model_dump(mode="json")
    whole = build("musicnn", settings, heads)
    weights = {**network.state_dict(), "heads.genre.weight": fitted.weight}
    whole.load_state_dict({**weights, "heads.genre.bias": fitted.bias})
    return replace(
        reference,
        heads=heads,
        embedding_dim=config.embedding_dim,
        uncertain_threshold=fitted.uncertain_threshold,
        config=settings,
        network=whole,
    )


def _archive(path: Path) -> dict[str, Any]:
    with np.load(path) as stored:
        return {name: stored[name] for name in ("X", "y", "names", "split", "genres")}


def _told(game: Sequence[Recording]) -> str:
    hours = sum(len(one.fine) for one in game) / coarse.FINE_FPS / 3_600
    return f"{hours:.1f} h of Debian's game music ({', '.join(music.PACKAGES)})"

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bundle import Bundle, make_bundle_folder
from model.folder import make_folder
from model.heads import Head
from model.musicnn import REQUIREMENT, fetch_wheel, folded, licence, read_checkpoint
from model.network import MusicnnConfig, Tagger, build
from model.recipe import coarse, genre, music
from model.recipe.card import card
from model.recipe.student import Lessons, Plan, of_archive, start, teach, varied

log = logging.getLogger(__name__)

ORIGIN = {
    "origin": f"{REQUIREMENT}, MSD_musicnn, ISC licence (LICENSE.musicnn.md)",
    "labels": "GTZAN, fault-filtered split, training and validation songs",
    "labels_licence": "recordings without copyright clearance: research use by custom",
}


# Windows to learn from; of each the plan's batches have their part, in this order.
EXCERPT_WINDOWS, GAME_WINDOWS, ARCHIVE_WINDOWS = 12_000, 8_000, 4_000
PLAN = Plan(steps=1_400, learning_rate=3e-4, batch=(34, 20, 10))


def build_shipped(out: Path, *, data: Path, work: Path, seed: int = 0) -> tuple[Bundle, Bundle]:
    """Make the shipped bundles in `out/default` and `out/fast`; gives them as loaded from there.

    `data` is the folder of shared data (`gtzan/` and `audio/`), `work` keeps downloads and
    log-mels for the next time.
    """
    began = time.monotonic()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    _make_folders(out, work)
    wheel = fetch_wheel(work)
    reference = folded(read_checkpoint(wheel, "MSD_musicnn"))
    assert isinstance(reference.network, Tagger)
    cache = work / "logmels"
    at_hand = cache.exists()
    log.info("decoding")
    game = list(music.recordings(music.debian_music(work), cache))
    tracks = list(music.recordings(music.shared_tracks(data / "audio"), cache))
    excerpts = music.excerpts(data / "gtzan", cache)
    archive = _archive(data / "gtzan" / "logmel30s.npz")
    clips = [coarse.archive_decibels(clip) for clip in archive["X"]]
    translation = coarse.Translation.fit([(one.fine, one.coarse) for one in excerpts])

    log.info("asking the reference, %.0f s in", time.monotonic() - began)
    windows = [varied(excerpts, EXCERPT_WINDOWS, rng)]
    if game:
        windows.append(varied(game, GAME_WINDOWS, rng))
    windows.append(of_archive(clips, translation, ARCHIVE_WINDOWS, rng))
    lessons = [Lessons.ask(reference, source) for source in windows]
    log.info("teaching the student, %.0f s in", time.monotonic() - began)
    student, config = start(reference)
    plan = PLAN if game else replace(PLAN, batch=PLAN.batch[::2])
    teach(student, lessons, plan, rng)
    likeness = (
        {"tags_against_reference": genre.compare_tags(student, reference, tracks)} if tracks else {}
    )

    labels = tuple(str(name) for name in archive["genres"])
    head = Head(name="genre", kind="single", labels=labels, categories=("genre",) * len(labels))

    def finish(
        name: str, network: Tagger, config: MusicnnConfig, more: dict[str, Any], **training: object
    ) -> Bundle:
        """Fit a network's genre head and write the bundle; `more` are figures."""
        log.info("fitting the genre head of %s, %.0f s in", name, time.monotonic() - began)
        genre.standardise(network, genre.heard(network, excerpts, labels).embeddings)
        sharpen = genre.fit_sharpening(network, [*excerpts, *game], translation)
        genres = genre.learn(
            genre.heard(network, excerpts, labels),
            genre.read(network, archive, clips, translation, sharpen),
            head,
        )
        figures = {
            **genres.figures,
            **more,
            "recipe_s": round(time.monotonic() - began),
            "log_mels_at_hand": at_hand,
        }
        log.info("measured: %s", json.dumps(figures))
        heads = (head.model_copy(update={"calibration": genres.calibration}), *reference.heads)
        settings = config.model_dump(mode="json")
        whole = build("musicnn", settings, heads)
        weights = {**network.state_dict(), "heads.genre.weight": genres.weight}
        whole.load_state_dict({**weights, "heads.genre.bias": genres.bias})
        bundle = Bundle(
            name=f"timbre-{name}",
            heads=heads,
            sample_rate_hz=reference.sample_rate_hz,
            window_s=reference.window_s,
            embedding_dim=config.embedding_dim,
            uncertain_threshold=genres.uncertain_threshold,
            kind="musicnn",
            config=settings,
            network=whole,
            training={**ORIGIN, "music": _told(game), "seed": seed, **training},
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


def _make_folders(out: Path, work: Path) -> None:
    make_folder(work)
    for name in ("default", "fast"):
        make_bundle_folder(out / name)


def _archive(path: Path) -> dict[str, Any]:
    with np.load(path) as stored:
        return {name: stored[name] for name in ("X", "y", "names", "split", "genres")}


def _told(game: Sequence[music.Recording]) -> str:
    hours = sum(len(one.fine) for one in game) / coarse.FINE_FPS / 3_600
    return f"{hours:.1f} h of Debian's game music ({', '.join(music.PACKAGES)})"

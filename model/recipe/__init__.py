"""The default bundle, made from nothing by one command: `timbre model recipe --out DIR`.

1. Fetch musicnn's wheel, and Debian's game music to learn from.
2. Fold the reference, and ask it about windows of all that music.
3. Teach the student, a cheaper network, those answers.
4. Fit the genre head on the student's embeddings, calibrate it, and write bundle and card.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bundle import Bundle
from model.heads import Head
from model.musicnn import REQUIREMENT, fetch_wheel, folded, licence, read_checkpoint
from model.network import build
from model.recipe import coarse, genre, music
from model.recipe.card import card
from model.recipe.student import Lessons, Plan, of_archive, start, teach, varied

__all__ = ["Scale", "build_default"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scale:
    """How much to learn from: windows of excerpts, of game music, of the archive; and the plan."""

    excerpt_windows: int = 12_000
    game_windows: int = 8_000
    archive_windows: int = 4_000
    plan: Plan = field(default=Plan(steps=1_400, learning_rate=3e-4, batch=(34, 20, 10)))


def build_default(
    out: Path, *, data: Path, work: Path, seed: int = 0, scale: Scale | None = None
) -> Bundle:
    """Make the default bundle in `out` and give it back as loaded from there.

    `data` is the folder of shared data (`gtzan/` and `audio/`), `work` keeps downloads and
    log-mels for the next time.
    """
    began = time.monotonic()
    scale = scale or Scale()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    work.mkdir(parents=True, exist_ok=True)
    wheel = fetch_wheel(work)
    reference = folded(read_checkpoint(wheel, "MSD_musicnn"))
    cache = work / "logmels"
    at_hand = cache.exists()
    log.info("decoding")
    game = list(music.recordings(music.debian_music(work), cache))
    tracks = list(music.recordings(music.shared_tracks(data / "audio"), cache))
    excerpts = music.excerpts(data / "gtzan", cache)
    with np.load(data / "gtzan" / "logmel30s.npz") as stored:
        archive = {name: stored[name] for name in ("X", "y", "names", "split", "genres")}
    clips = [coarse.archive_decibels(clip) for clip in archive["X"]]
    translation = coarse.Translation.fit([(one.fine, one.coarse) for one in excerpts])

    log.info("asking the reference, %.0f s in", time.monotonic() - began)
    windows = [varied(excerpts, scale.excerpt_windows, rng)]
    if game:
        windows.append(varied(game, scale.game_windows, rng))
    windows.append(of_archive(clips, translation, scale.archive_windows, rng))
    lessons = [Lessons.ask(reference, source) for source in windows]
    log.info("teaching the student, %.0f s in", time.monotonic() - began)
    student, config = start(reference)
    plan = scale.plan if game else replace(scale.plan, batch=scale.plan.batch[::2])
    teach(student, lessons, plan, rng)

    log.info("fitting the genre head, %.0f s in", time.monotonic() - began)
    labels = tuple(str(name) for name in archive["genres"])
    head = Head(name="genre", kind="single", labels=labels, categories=("genre",) * len(labels))
    genre.standardise(student, genre.heard(student, excerpts, labels).embeddings)
    sharpen = genre.fit_sharpening(student, [*excerpts, *game], translation)
    genres = genre.learn(
        genre.heard(student, excerpts, labels),
        genre.read(student, archive, clips, translation, sharpen),
        head,
    )
    heads = (head.model_copy(update={"calibration": genres.calibration}), *reference.heads)
    settings = config.model_dump(mode="json")
    network = build("musicnn", settings, heads)
    weights = {**student.state_dict(), "heads.genre.weight": genres.weight}
    network.load_state_dict({**weights, "heads.genre.bias": genres.bias})
    figures = dict(genres.figures)
    if tracks:
        figures["tags_against_reference"] = genre.compare_tags(student, reference, tracks)
    figures["recipe_s"] = round(time.monotonic() - began)
    figures["log_mels_at_hand"] = at_hand
    log.info("measured: %s", json.dumps(figures))
    bundle = Bundle(
        name="timbre-default",
        heads=heads,
        sample_rate_hz=reference.sample_rate_hz,
        window_s=reference.window_s,
        embedding_dim=config.embedding_dim,
        uncertain_threshold=genres.uncertain_threshold,
        kind="musicnn",
        config=settings,
        network=network,
        training=_training(seed, game, lessons),
        figures=figures,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "LICENSE.musicnn.md").write_text(licence(wheel), encoding="utf-8")
    return bundle.save(out, card=card(bundle))


def _training(
    seed: int, game: Sequence[music.Recording], lessons: Sequence[Lessons]
) -> dict[str, Any]:
    hours = sum(len(one.fine) for one in game) / coarse.FINE_FPS / 3_600
    return {
        "origin": f"{REQUIREMENT}, MSD_musicnn, ISC licence (LICENSE.musicnn.md)",
        "labels": "GTZAN, fault-filtered split, training and validation songs",
        "labels_licence": "recordings without copyright clearance: research use by custom",
        "music": f"{hours:.1f} h of Debian's game music ({', '.join(music.PACKAGES)})",
        "windows": sum(len(source.tags) for source in lessons),
        "seed": seed,
    }

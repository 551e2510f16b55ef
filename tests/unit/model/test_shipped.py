import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from model.bundle import Bundle
from model.calibration import Calibration
from model.datasets.logmels import logmel_of
from model.frontend import LogMel, LogMelConfig
from model.heads import Head
from model.musicnn import folded
from model.network import MusicnnConfig
from model.shipped import PLAN, PLAN_WITHOUT_GAME, Material, _with_genres, coarse, genre, music
from model.shipped.music import Recording
from model.shipped.student import (
    Lessons,
    Plan,
    clip_window,
    equalised,
    excerpt,
    halved,
    of_archive,
    start,
    teach,
    varied,
)
from tests.audio import encode
from tests.unit.model.music import RATE_HZ, chords
from tests.unit.model.test_musicnn import checkpoint

LABELS = ("low", "high")


@pytest.fixture(scope="module")
def reference() -> Bundle:
    return folded(checkpoint())


def sound(seed: int, duration_s: float = 6.0) -> NDArray[np.float32]:
    windows = chords(round(duration_s / 3), seed=seed)
    return np.asarray(windows.flatten().numpy())


def recording(seed: int, *, duration_s: float = 6.0) -> Recording:
    samples = sound(seed, duration_s)
    label = LABELS[seed % 2]
    split = "valid" if seed % 4 > 1 else "train"
    fine = logmel_of(samples, coarse.FINE)
    return Recording(f"{seed}", fine, coarse.coarse(samples), label, split)


def test_log_mels_of_a_whole_recording_are_those_of_its_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = sound(0, 9.0)
    monkeypatch.setattr("model.datasets.logmels.BLOCK_S", 1.6)  # several, whose seams must not show

    whole = logmel_of(samples, coarse.FINE)

    assert len(whole) == len(samples) // 256 + 1
    # Three seconds are no whole number of frames: windows are held against multiples of the hop.
    front_end = LogMel(LogMelConfig())
    for first in (0, 150, 300):
        cut = torch.from_numpy(samples[first * 256 : first * 256 + 3 * RATE_HZ])[None]
        made = front_end(cut)[0].numpy()
        inner = slice(2, 180)  # at its ends a window is padded with zeros
        np.testing.assert_allclose(whole[first : first + 187][inner], made[inner], atol=5e-3)


def test_coarse_log_mels_have_the_archives_frame_rate() -> None:
    made = coarse.coarse(sound(0, 6.0))

    assert made.shape == (int(6 * coarse.COARSE_FPS) + 1, coarse.BANDS)
    assert pytest.approx(coarse.ARCHIVE_FPS, rel=1e-3) == coarse.COARSE_FPS


def test_coarse_log_mels_translate_into_the_front_ends_bands() -> None:
    recordings = [recording(seed) for seed in range(4)]
    translation = coarse.Translation.fit([(one.fine, one.coarse) for one in recordings])

    frames = np.arange(20, 300)
    at = frames / coarse.FINE_FPS * coarse.COARSE_FPS
    blurred = translation(
        coarse.sampled(coarse.compress(recordings[0].coarse.astype(np.float32)), at)
    )

    assert blurred.shape == (280, 96)
    sharp = recordings[0].fine[frames].astype(np.float32)
    assert np.abs(blurred - sharp).mean() < 0.2  # a delay of one frame makes it 0.3
    assert blurred.min() >= 0


def test_an_archives_clip_becomes_decibels_over_time() -> None:
    clip = np.full((128, 722), 200, np.uint8)

    decibels = coarse.archive_decibels(clip)

    assert decibels.shape == (722, coarse.BANDS)
    assert decibels[0, 0] == pytest.approx(200 * 0.304 - 50)
    clip[:, :20] = 0  # cut off
    cut = coarse.archive_decibels(clip)
    assert cut[[0, -1], 0] == pytest.approx([-51, 200 * 80 / 255 - 51])
    compressed = coarse.compress(np.array([-40, 0, 10], np.float32))
    assert 10**compressed == pytest.approx([2, 10_001, 100_001], rel=1e-4)


def test_a_window_of_an_archives_clip_is_what_sounds_there() -> None:
    clip = np.random.default_rng(0).normal(-30, 5, (722, coarse.BANDS)).astype(np.float32)
    translation = coarse.Translation(np.eye(coarse.BANDS + 1, 96, dtype=np.float32))
    for start_s in (0.0, 7.3, 26.0):
        seconds = start_s + np.arange(coarse.WINDOW_FRAMES) / coarse.FINE_FPS
        whole = coarse.sampled(coarse.compress(clip), seconds * coarse.ARCHIVE_FPS)
        made = clip_window(clip, start_s, translation)
        np.testing.assert_allclose(made, whole[:, :96], atol=1e-4)


def test_excerpts_begin_anywhere_also_where_a_recording_is_no_longer_than_they_are() -> None:
    rng = np.random.default_rng(0)
    for frames, starts in ((coarse.WINDOW_FRAMES + 5, 6), (coarse.WINDOW_FRAMES, 150)):
        fine = np.repeat(np.arange(frames, dtype=np.float16)[:, None], 96, 1)
        windows = [excerpt(Recording("a", fine, fine), rng) for _ in range(500)]
        assert {window.shape for window in windows} == {(coarse.WINDOW_FRAMES, 96)}
        assert len({float(window[0, 0]) for window in windows}) >= starts
        for window in windows:
            assert len(set(window[:, 0].tolist())) == coarse.WINDOW_FRAMES


def test_an_equaliser_changes_power_by_decibels_alike_in_every_frame() -> None:
    rng = np.random.default_rng(0)
    logmel = rng.uniform(0.5, 6, (20, 96)).astype(np.float32)
    power, changes = 10 ** logmel.astype(float) - 1, []
    for _ in range(300):
        made = np.maximum(10 ** equalised(logmel, rng).astype(float) - 1, 1e-4)
        changes.append(10 * np.log10(made / power))
    low, high = np.stack(changes)[..., 20], np.stack(changes)[..., 95]
    assert np.abs(low - low.mean(1, keepdims=True)).max() < 0.2
    assert 4 < low.std() < 6
    assert (high < -30).mean() == pytest.approx(0.15, abs=0.05), "as a thrifty codec leaves it"


def test_every_window_of_an_excerpt_is_known_for_its(reference: Bundle) -> None:
    excerpts = [recording(seed, duration_s=duration_s) for seed, duration_s in ((1, 3), (2, 9))]
    heard = genre.heard(reference.network, excerpts, LABELS)
    assert heard.owner.tolist() == [0, 1, 1, 1]
    assert heard.genres.tolist() == [1, 0]
    last = torch.from_numpy(excerpts[1].fine[374:561].astype(np.float32))[None]
    with torch.inference_mode():
        said = reference.network.logits(last)[1]
    torch.testing.assert_close(torch.from_numpy(heard.embeddings[3:]), said, atol=1e-4, rtol=1e-4)


def test_the_student_learns_to_answer_as_the_reference_does(reference: Bundle) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    lessons = Lessons.ask(reference, varied([recording(seed) for seed in range(4)], 48, rng))
    student, _ = start(reference)
    torch.nn.init.zeros_(student.get_parameter("heads.tags.weight"))

    def distances() -> NDArray[np.float64]:
        with torch.inference_mode():
            said, embedding = student.logits(torch.from_numpy(lessons.logmel).float())
        tags = said["tags"].sigmoid().numpy()
        both = (embedding.numpy(), lessons.embedding), (tags, lessons.tags)
        return np.array([np.square(mine - wanted).mean() for mine, wanted in both])

    before = distances()
    teach(student, [lessons], Plan(steps=30, learning_rate=1e-3, batch=(16,)), rng)

    assert (distances() < 0.5 * before).all()
    assert np.float32(1e-39) / np.float32(2) > 0, "only meanwhile are denormal numbers taken for 0"


def test_the_students_front_end_makes_every_second_frame_of_the_references(
    reference: Bundle,
) -> None:
    student, config = start(reference)
    samples = chords(2)

    made = student.front_end(samples)

    assert made.shape == (2, config.front_end.frames, 96)
    torch.testing.assert_close(made, halved(reference.network.front_end(samples)))


def test_an_untrained_student_has_the_references_taps_where_they_stand(reference: Bundle) -> None:
    student, _ = start(reference)
    mine, theirs = student.state_dict(), reference.network.state_dict()

    def moment(taps: torch.Tensor, lead: int, frames: int) -> torch.Tensor:
        """Where taps `(filters, channels, taps, ...)` stand by weight, in the reference's frames
        from the one that they are for."""
        places = frames * (torch.arange(taps.shape[2]) - lead)
        return torch.einsum("oit...,t->oi...", taps, places.float())

    for layer in range(3):
        name = f"trunk.mid.{layer}.conv.weight"
        assert mine[name].shape[2] == 5
        torch.testing.assert_close(mine[name].sum(2), theirs[name].sum(2))
        torch.testing.assert_close(moment(mine[name], 2, 2), moment(theirs[name], 3, 1))
    for branch in range(5):
        name = f"trunk.front.{branch}.weight"
        taps = theirs[name]
        few, many = ((kernel.shape[2] - 1) // 2 for kernel in (mine[name], taps))
        torch.testing.assert_close(mine[name].sum(2), taps.sum(2))
        later = taps[:, :, 0::2].sum(2)  # one between two of the student's frames, by one
        torch.testing.assert_close(moment(mine[name], few, 2), moment(taps, many, 1) + later)


def test_a_student_is_left_with_the_moving_average_of_its_weights(reference: Bundle) -> None:
    rng = np.random.default_rng(0)
    lessons = Lessons.ask(reference, varied([recording(0)], 8, rng))
    student, _ = start(reference)
    bias = student.get_parameter("heads.tags.bias")
    states: list[torch.Tensor] = []
    student.trunk.register_forward_pre_hook(lambda *_: states.append(bias.detach().clone()))
    teach(student, [lessons], Plan(steps=8, learning_rate=0.1, batch=(8,)), rng)

    average = states[0]
    for state in (*states[1:], states[-1]):  # the last step is next to none
        average = average.lerp(state, 0.5)
    torch.testing.assert_close(bias, average, atol=1e-4, rtol=0)
    assert (states[-1] - average).abs().max() > 0.003


def test_lessons_vary_in_tempo_and_pitch_and_some_are_mixtures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.shipped.student.equalised", lambda window, _: window)
    low, high = (np.zeros((400, 96), np.float16) for _ in range(2))
    low[:, 40], high[:, 70] = 4, 4
    for frame in range(3):
        low[frame::25, 10] = 4  # a beat, three frames long
    both = [Recording(name, fine, fine) for name, fine in (("low", low), ("high", high))]
    count = 600
    windows = np.stack(list(varied(both, count, np.random.default_rng(0))))
    assert windows.shape == (count, coarse.WINDOW_FRAMES, 96)

    tones = windows.mean(1)
    mixed = (tones[:, 30:50].max(1) > 0.1) & (tones[:, 60:80].max(1) > 0.1)
    assert mixed.mean() == pytest.approx(0.35 / 2, abs=0.05), "of two that differ"
    alone = tones[~mixed]
    peaks = np.where(alone[:, 30:50].max(1) > 0.1, alone[:, 30:50].argmax(1), 40)
    assert set(peaks.tolist()) == {8, 9, 10, 11, 12, 40}
    beats = windows[~mixed & (tones[:, 40] > 3.9)][..., 10] > 2  # as high as they were
    spacings = [np.diff(np.flatnonzero(np.diff(beat.astype(int)) == 1)) for beat in beats]
    medians = np.array([np.median(spacing) for spacing in spacings])
    changed = (np.abs(medians - 25) > 1) & (medians > 19) & (medians < 32)
    assert changed.mean() > 0.25


def test_lessons_from_an_archive_are_windows_of_its_clips_each_through_an_equaliser() -> None:
    clip = np.full((722, coarse.BANDS), -20, np.float32)
    translation = coarse.Translation(np.eye(coarse.BANDS + 1, 96, dtype=np.float32))
    windows = np.stack(list(of_archive([clip], translation, 20, np.random.default_rng(0))))
    assert windows.shape == (20, coarse.WINDOW_FRAMES, 96)
    assert np.ptp(windows, axis=1).max() < 1e-3, "alike in every frame"
    assert windows[:, 0].std(0).min() > 0.1, "but in every window"


def test_one_seed_gives_one_student(reference: Bundle) -> None:
    def train() -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(3)
        torch.manual_seed(3)
        lessons = Lessons.ask(reference, varied([recording(0)], 12, rng))
        student, _ = start(reference)
        teach(student, [lessons], Plan(steps=5, learning_rate=1e-3, batch=(8,)), rng)
        return dict(student.state_dict())

    first, second = train(), train()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-6, rtol=1e-5)


def test_standardising_the_embedding_leaves_the_answers(reference: Bundle) -> None:
    student, _ = start(reference)
    logmel = student.front_end(chords(3))
    with torch.inference_mode():
        before, embedding = student.logits(logmel)
    genre.standardise(student, embedding.numpy())
    with torch.inference_mode():
        after, standard = student.logits(logmel)

    torch.testing.assert_close(after["tags"], before["tags"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(standard.mean(0), torch.zeros(200), atol=1e-3, rtol=0)


def windows(count: int, *, apart: float = 4.0, dims: int = 80) -> genre.Windows:
    """Three genres that lie `apart`, two windows an excerpt, two excerpts a song."""
    rng = np.random.default_rng(0)
    songs = np.arange(count) // 2
    genres, owner = songs % 3, np.repeat(np.arange(count), 2)
    heard = rng.normal(size=(count, dims))[songs[owner]] + rng.normal(0, 0.1, (2 * count, dims))
    heard[np.arange(2 * count), genres[owner]] += apart
    embeddings = (heard * np.geomspace(0.1, 10, dims) + 5).astype(np.float32)
    splits = np.where(songs // 3 % 3, "train", "valid")
    return genre.Windows(embeddings, owner, songs.astype(str), genres, splits)


HEAD = Head(name="genre", kind="single", labels=tuple("abc"), categories=("genre",) * 3)


def test_the_head_is_measured_and_fitted_on_all() -> None:
    audio, archive = windows(60), windows(40)

    learnt = genre.learn(audio, archive, HEAD)

    assert learnt.weight.shape == (3, 80)
    assert learnt.figures["validation"]["accuracy"]["mean"] > 0.8
    assert learnt.figures["validation"]["accuracy_at_70_percent_coverage"] > 0.9
    assert len(learnt.figures["tried"]) == 4
    assert set(learnt.calibration.temperature) == {"mean", "majority", "weighted"}
    assert 0.5 < learnt.uncertain_threshold <= 1
    everything = genre.fit_head(audio, archive, np.ones(60, bool), np.ones(40, bool))
    torch.testing.assert_close(learnt.weight, torch.from_numpy(everything.weight).float())


def test_the_head_is_measured_on_songs_that_it_has_not_heard() -> None:
    noise = windows(120, apart=0.0, dims=400)

    figures = genre.learn(noise, noise, HEAD).figures

    validation = figures["validation"]
    assert max(validation["accuracy"].values()) < 0.7
    assert validation["archive_accuracy"] < 0.7
    assert validation["nearest_neighbour_shares_genre"] < 0.7
    assert all(max(tried.values()) < 0.7 for tried in figures["tried"].values())


def test_scores_of_a_song_are_calibrated_by_others() -> None:
    scores = np.array([[0.6, 0.4]] * 4)
    truth, songs = np.array([0, 0, 1, 1]), np.array(["a", "a", "b", "b"])

    calibrated = genre._cross_calibrated(scores, truth, songs)

    assert calibrated[0, 0] < 0.6 < calibrated[2, 0]


def test_a_window_of_twice_the_weight_counts_as_two() -> None:
    x, y, owner = windows(60, apart=1.0).of(np.ones(60, bool))
    twice = owner < 20
    doubled = np.concatenate([x, x[twice]]), np.concatenate([y, y[twice]])

    weighed = genre._discriminant(x, y, 1.0 + twice).probabilities(x)
    np.testing.assert_allclose(
        weighed, genre._discriminant(*doubled, np.ones(160)).probabilities(x), atol=1e-3
    )
    regression = LogisticRegression(C=genre.STRENGTH, max_iter=1_000)
    scikit_learns = make_pipeline(StandardScaler(), regression).fit(
        x, y, logisticregression__sample_weight=1.0 + twice
    )
    np.testing.assert_allclose(
        genre._logistic(x, y, 1.0 + twice).probabilities(x),
        scikit_learns.predict_proba(x),
        atol=1e-3,
    )


def test_tags_like_the_references_correlate_with_it_and_others_do_not(reference: Bundle) -> None:
    student, _ = start(reference)

    alike = genre.compare_tags(student, reference, [recording(0)])
    torch.manual_seed(0)
    torch.nn.init.normal_(student.get_parameter("heads.tags.weight"))
    unlike = genre.compare_tags(student, reference, [recording(0)])

    assert alike["correlation"] > 0.98
    assert alike["of_five_best"] == 5
    assert abs(unlike["correlation"]) < 0.5


def test_excerpts_are_what_the_manifest_says_and_repeated_where_shorter_than_a_window(
    tmp_path: Path,
) -> None:
    for name, duration_s in (("short", 2), ("long", 4)):
        samples = sound(0)[: duration_s * RATE_HZ, None]
        encode(tmp_path / f"{name}.wav", samples, RATE_HZ, muxer="wav", codec="pcm_s16le")
    (tmp_path / "manifest.csv").write_text(
        "path,genre,filtered_split,song\nshort.wav,low,valid,a\nlong.wav,high,train,b\n"
    )
    short, long = music.excerpts(tmp_path, tmp_path)
    assert (short.name, short.genre, short.split) == ("a", "low", "valid")
    assert (long.name, long.genre, long.split) == ("b", "high", "train")
    assert (len(short.fine), len(long.fine)) == (188, 251)
    np.testing.assert_array_equal(short.fine[2:123], long.fine[2:123])
    np.testing.assert_allclose(short.fine[127:186], short.fine[2:61], atol=0.01)


def test_the_student_is_taught_by_all_that_there_is_in_the_order_of_the_plan(
    reference: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("EXCERPT", 3), ("GAME", 2), ("ARCHIVE", 1)):
        monkeypatch.setattr(f"model.shipped.{name}_WINDOWS", count)
    translation = coarse.Translation(np.eye(coarse.BANDS + 1, 96, dtype=np.float32))
    clip = np.full((722, coarse.BANDS), -20, np.float32)
    whole = Material([recording(0)], [], [recording(1)], {}, [clip], translation)
    for material, counts in ((whole, [3, 2, 1]), (replace(whole, game=[]), [3, 1])):
        lessons = material.lessons(reference, np.random.default_rng(0))
        assert [len(source.tags) for source in lessons] == counts
    assert PLAN_WITHOUT_GAME.batch == (PLAN.batch[0], PLAN.batch[2])


def test_a_shipped_bundle_answers_with_its_genre_head_and_with_the_references_tags(
    reference: Bundle,
) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 200, generator=rng), torch.randn(3, generator=rng)
    fitted = genre.GenreHead(weight, bias, Calibration(temperature={"mean": 2.0}), 0.4, {})
    config = MusicnnConfig.model_validate(reference.config)
    made = _with_genres(reference, reference.network, config, HEAD, fitted)
    assert [(head.name, head.labels) for head in made.heads[:1]] == [("genre", HEAD.labels)]
    assert made.heads[1:] == reference.heads
    assert made.heads[0].calibration == fitted.calibration
    assert made.uncertain_threshold == 0.4
    with torch.inference_mode():
        said, before = made.network(chords(2)), reference.network(chords(2))
    torch.testing.assert_close(said.probabilities["tags"], before.probabilities["tags"])
    wanted = (before.embedding @ weight.T + bias).softmax(1)
    torch.testing.assert_close(said.probabilities["genre"], wanted, atol=1e-4, rtol=1e-3)


def test_without_apt_the_recipe_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with caplog.at_level(logging.WARNING):
        assert music.debian_music(tmp_path) == []

    assert "no apt here" in caplog.text
    assert "wesnoth" in caplog.text


def test_the_same_music_in_two_files_is_taken_once(tmp_path: Path) -> None:
    folder = tmp_path / "tracks"
    folder.mkdir()
    for name in ("a.ogg", "b.ogg"):
        (folder / name).write_bytes(b"x" * music.MIN_BYTES)
    (folder / "jingle.ogg").write_bytes(b"x")

    assert [file.name for file in music.shared_tracks(tmp_path)] == ["a.ogg"]

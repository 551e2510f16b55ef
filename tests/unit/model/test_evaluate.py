"""Evaluation: figures by hand, every vote paired, archives and audio, single and multi-label."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from model import learnt
from model.bundle import Bundle
from model.datasets import load
from model.datasets.dataset import Dataset
from model.evaluate import (
    MAX_PICTURED_LABELS,
    _confusion,
    _coverage,
    _coverage_curve,
    _intervals,
    _multi,
    _neighbours,
    _paired,
    _reliability,
    _single,
    _taggram,
    draw,
    evaluate,
)
from model.heads import Head
from model.logmel_cnn import LogMelCnnConfig, MemberConfig, build_logmel_cnn
from model.measure import Voted, nll, window_accuracy
from model.pictures import Gallery, tsne
from model.predict import Predictions
from tests import collections_of_music as music
from tests.audio import encode
from worker.errors import DatasetInvalid

HEAD = Head(name="genre", kind="single", labels=music.GENRES, categories=("genre", "genre"))


def bundle(folder: Path, *heads: Head) -> Bundle:
    """An untrained bundle over the archive's front end."""
    torch.manual_seed(0)
    config = LogMelCnnConfig(channels=(8, 16), stem_stride=(4, 4), members=(MemberConfig(),))
    raw = config.model_dump(mode="json")
    return Bundle(
        name="untrained",
        heads=heads,
        sample_rate_hz=22_050,
        window_s=3.0,
        embedding_dim=32,
        uncertain_threshold=0.5,
        kind="logmel_cnn",
        config=raw,
        network=build_logmel_cnn(raw, heads),
    ).save(folder, card="# untrained\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One of two genres."""
    return bundle(tmp_path_factory.mktemp("bundle"), HEAD)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Of 12 clips, eight of them to train."""
    return load(music.archive(tmp_path_factory.mktemp("archive") / "a.npz"))


def test_report_has_every_figure(model: Bundle, archive: Dataset) -> None:
    report = json.loads(json.dumps(evaluate(model, archive).report))
    assert report["tracks"] == 12
    assert report["window"]["count"] == 36
    low, high = report["window"]["interval"]
    assert 0 <= low <= report["window"]["accuracy"] <= high <= 1
    for method in ("mean", "majority", "weighted"):
        figures = report["track"][method]
        low, high = figures["interval"]
        assert 0 <= low <= figures["accuracy"] <= high <= 1
        assert figures["nll"] > 0
    assert len(report["paired"]) == 3
    assert np.sum(report["confusion"]) == 12
    assert set(report["f1"]) == set(music.GENRES)
    assert 0 <= report["ece"] <= 1
    assert 0 < report["ece_by_chance"] < 0.5
    assert report["coverage"]["curve"][-1] == {
        "coverage": 1.0,
        "accuracy": report["track"]["mean"]["accuracy"],
    }
    assert 0 <= report["neighbours"]["same_label"] <= 1


def test_split_is_optional_and_an_unknown_one_is_refused(
    model: Bundle, archive: Dataset, tmp_path: Path
) -> None:
    assert evaluate(model, archive, "valid").report["tracks"] == 4
    with pytest.raises(DatasetInvalid, match="train, valid"):
        evaluate(model, archive, "test")
    bare = load(music.archive(tmp_path / "bare.npz", optional=False))
    assert evaluate(model, bare).report["tracks"] == 12


def test_windows_may_overlap_in_archives_and_audio(
    model: Bundle, archive: Dataset, tmp_path: Path
) -> None:
    closer = evaluate(model, archive, hop_s=1.5).report  # 241 frames, of which 72 are a window
    assert (closer["window"]["count"], closer["hop_s"]) == (12 * 5, 1.5)
    closest = evaluate(model, archive, hop_s=0.01).report  # less than a frame
    assert closest["window"]["count"] == 12 * (241 - 72 + 1)
    audio = load(music.folders(tmp_path / "own", 1))  # 6.5 s
    assert evaluate(model, audio, hop_s=1.75).report["window"]["count"] == 2 * 3


def test_one_seed_gives_one_report(model: Bundle, archive: Dataset) -> None:
    assert evaluate(model, archive).report == evaluate(model, archive).report


def test_audio_goes_the_workers_way_and_what_fails_is_named(model: Bundle, tmp_path: Path) -> None:
    root = music.folders(tmp_path / "own", 2)
    (root / "blues" / "broken.mp3").write_bytes(b"\0" * 500)
    silence = np.zeros((22_050 * 4, 2), np.float32)
    encode(root / "blues" / "silent.wav", silence, 22_050, muxer="wav", codec="pcm_s16le")
    evaluation = evaluate(model, load(root))
    assert evaluation.report["tracks"] == 4
    assert evaluation.report["window"]["count"] == 8  # 6.5 s: two windows, a tail too short
    assert set(evaluation.report["skipped"]) == {"blues/broken.mp3", "blues/silent.wav"}


def test_pictures_and_page_are_drawn(
    model: Bundle, archive: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Axes] = {}
    picture = Gallery.picture

    def noted(self: Gallery, name: str, figure: Figure, title: str, caption: str) -> None:
        drawn[name] = figure.axes[0]
        picture(self, name, figure, title, caption)

    monkeypatch.setattr(Gallery, "picture", noted)
    evaluation = evaluate(model, archive)
    tracks = evaluation.predictions
    longest = np.tile(tracks.probabilities[7], (2, 1))
    windows = [*tracks.probabilities[:7], longest, *tracks.probabilities[8:]]
    evaluation = dataclasses.replace(
        evaluation, predictions=dataclasses.replace(tracks, probabilities=windows)
    )
    page = draw(evaluation, tmp_path / "out")
    told = page.read_text()
    assert "split all: 12 tracks, " in told
    for name in ("confusion", "reliability", "coverage", "embeddings", "taggram"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 2_000
        assert f'src="{name}.png"' in told
    assert all(
        f"<td>{figure}</td>" in told
        for figure in ("one window", "track, majority", "expected calibration error", "macro F1")
    )
    assert "Taggram of metal.00007" in told
    assert "Its label: metal." in told
    np.testing.assert_array_equal(drawn["taggram"].images[0].get_array(), longest.T)
    points = tsne(tracks.embeddings)
    for dots, label in zip(drawn["embeddings"].collections, tracks.targets.T, strict=True):
        np.testing.assert_allclose(np.asarray(dots.get_offsets()), points[label == 1], rtol=1e-3)


def test_of_many_labels_the_confusion_shows_the_commonest() -> None:
    counts = np.diag(np.r_[np.ones(60, int), np.full(MAX_PICTURED_LABELS, 2)])
    labels = [f"label {number}" for number in range(len(counts))]
    axes = _confusion({"confusion": counts.tolist(), "labels": labels}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == labels[60:]
    assert len(axes.texts) == MAX_PICTURED_LABELS


def test_pictures_name_what_they_show_where_they_show_it() -> None:
    axes = _confusion({"confusion": [[1, 3], [0, 0]], "labels": ["a", "b"]}).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("said", "true")
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "1",
        (1, 0): "3",
    }
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.25, 0.75], [0, 0]]
    windows = np.tile(np.linspace(0, 1, 60, dtype=np.float32), (3, 1))
    axes = _taggram(windows, tuple(map(str, range(60)))).axes[0]
    shown = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert shown == [*range(60 - MAX_PICTURED_LABELS, 60)]
    np.testing.assert_array_equal(axes.images[0].get_array(), windows[:, shown].T)
    assert all(tick % 1 == 0 for tick in _taggram(windows[:1, :2], ("a", "b")).axes[0].get_xticks())


def test_the_reliability_diagram_has_a_bar_as_high_as_its_scores_are_right() -> None:
    confidence, right = np.array([0.31, 0.35, 0.39, 0.95]), np.array([True, False, False, True])
    axes = _reliability(confidence, right).axes[0]
    bars = {
        round(bar.get_x() + bar.get_width() / 2, 2): bar.get_height()
        for bar in axes.patches
        if isinstance(bar, Rectangle)
    }
    assert bars == pytest.approx({0.35: 1 / 3, 0.95: 1.0})
    assert [text.get_text() for text in axes.texts] == ["3", "1"]
    assert np.asarray(axes.lines[0].get_xydata()).tolist() == [[0, 0], [1, 1]]


def test_the_curve_of_coverage_is_that_of_the_report() -> None:
    report = _coverage(np.array([0.9, 0.8, 0.6, 0.3]), np.array([1.0, 1.0, 0.0, 0.0]), 0.7)
    curve, dot = _coverage_curve(report).axes[0].lines
    points = [[point["coverage"], point["accuracy"]] for point in report["curve"]]
    assert np.asarray(curve.get_xydata()).tolist() == points
    assert np.asarray(dot.get_xydata()).tolist() == [[0.5, 1.0]]


def test_uncertain_is_told_by_the_bundles_own_threshold(model: Bundle, archive: Dataset) -> None:
    report = evaluate(dataclasses.replace(model, uncertain_threshold=0.999), archive).report
    coverage = report["coverage"]
    assert (coverage["threshold"], coverage["certain"]) == (0.999, 0.0)
    assert coverage["accuracy_of_certain"] is None


def test_multi_label_has_areas_under_curves(tmp_path: Path) -> None:
    dataset = load(music.manifest(tmp_path, several=True))
    head = Head(name="tags", kind="multi", labels=dataset.labels, categories=("genre",) * 3)
    evaluation = evaluate(bundle(tmp_path / "b", head), dataset)
    report = json.loads(json.dumps(evaluation.report))
    assert set(report["roc_auc"]["labels"]) == {"blues", "loud", "metal"}
    assert 0 <= report["pr_auc"]["macro"] <= 1
    assert "confusion" not in report
    told = draw(evaluation, tmp_path / "out").read_text(encoding="utf-8")
    areas = [f"{report[curve]['labels']['loud']:.2f}" for curve in ("roc_auc", "pr_auc")]
    assert f"<td>{areas[0]}</td><td>{areas[1]}</td>" in told


def test_tags_beside_a_genre_head_say_nothing_of_uncertain(tmp_path: Path) -> None:
    dataset = load(music.manifest(tmp_path, several=True))
    tags = Head(name="tags", kind="multi", labels=dataset.labels, categories=("genre",) * 3)
    alone = evaluate(bundle(tmp_path / "alone", tags), dataset).report["coverage"]
    assert (alone["threshold"], alone["certain"]) == (0.5, 1.0)
    evaluation = evaluate(bundle(tmp_path / "beside", HEAD, tags), dataset)
    beside = evaluation.report["coverage"]
    assert beside["threshold"] is beside["certain"] is beside["accuracy_of_certain"] is None
    page = draw(evaluation, tmp_path / "out").read_text(encoding="utf-8")
    assert "<td>not uncertain (- of tracks)</td><td>-</td>" in page


def test_labels_that_no_head_knows_are_refused(model: Bundle, archive: Dataset) -> None:
    other = HEAD.model_copy(update={"labels": ("blues", "polka")})
    with pytest.raises(DatasetInvalid, match="metal"):
        evaluate(dataclasses.replace(model, heads=(other,)), archive)


def test_log_mels_of_another_front_end_are_made_audible_and_the_report_says_so(
    model: Bundle, archive: Dataset
) -> None:
    assert archive.logmels is not None
    own = evaluate(model, archive).report
    assert (own["input"], own["caveats"]) == ("log-mels", [])
    other = dataclasses.replace(archive, logmels=dataclasses.replace(archive.logmels, hop=1_024))
    report = evaluate(model, other).report
    assert report["input"] == "audio resynthesised from log-mels"
    assert report["window"]["count"] == 12 * 4  # 11.1 s: three windows, and one of the tail
    [caveat] = report["caveats"]
    assert "no measure of the bundle on audio" in caveat


def test_log_mels_that_are_neither_are_refused(model: Bundle, archive: Dataset) -> None:
    assert archive.logmels is not None
    fewer = dataclasses.replace(archive.logmels, values=archive.logmels.values[:, :96])
    with pytest.raises(DatasetInvalid, match="96 mels as uint8, others than this bundle's"):
        evaluate(model, dataclasses.replace(archive, logmels=fewer))


@pytest.mark.parametrize(("fit", "learnt"), [("all", 12), ("train", 8)])
def test_songs_that_the_card_names_are_a_caveat(
    model: Bundle, tmp_path: Path, fit: str, learnt: int
) -> None:
    taught = dataclasses.replace(model, training={"data": "GTZAN", "fit": fit})
    dataset = load(music.gtzan(tmp_path / "music"))
    report = evaluate(taught, dataset).report
    assert report["input"] == "audio"
    [caveat] = report["caveats"]
    assert f"{learnt} of these 14 tracks" in caveat
    assert evaluate(taught, dataset, "test").report["caveats"] == []


@pytest.mark.parametrize("seed", [0, 3])
def test_a_catalogue_without_a_split_is_measured_as_training_dealt_it(
    model: Bundle, tmp_path: Path, seed: int
) -> None:
    dataset = load(music.folders(tmp_path / "mine", 7))
    dealt = dataset.with_split(seed)
    taught = dataclasses.replace(
        model,
        training={
            "data": "mine",
            "seed": seed,
            "learnt": learnt.record((c.name for c in dealt.clips if c.split != "test"), {}),
        },
    )
    asked = evaluate(taught, dataset, "test")
    assert [clip.name for clip in asked.predictions.clips] == [
        clip.name for clip in dealt.clips if clip.split == "test"
    ]
    assert asked.report["caveats"] == []
    [caveat] = evaluate(taught, dataset).report["caveats"]
    assert f"from mine: {14 - asked.report['tracks']} of these 14 tracks" in caveat


def test_what_a_bundle_has_learnt_from_is_kept_in_short_and_handed_on() -> None:
    names = [f"{number}" for number in range(100_000)]
    told = {"learnt": learnt.record(names, {})}
    assert len(told["learnt"]) < 300_000
    assert len(learnt.marks(told)) == learnt.MOST
    assert learnt.marks(told) < {learnt.mark(name) for name in names}
    old = {"learnt": learnt.record(["blues.00029"], {})}
    assert old == {"learnt": "833OsQ=="}, "as bundles have it"
    new = os.fsdecode(b"\xe9")
    tuned = learnt.marks({"learnt": learnt.record([new], old)})
    assert tuned == {learnt.mark("blues.00029"), learnt.mark(new)}
    for damaged in (None, 7, "ä", "AAA=", "no base64"):
        assert not learnt.marks({"learnt": damaged})


def test_window_accuracy_and_likelihood_by_hand() -> None:
    tracks = [np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([[0.2, 0.8]])]
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert window_accuracy(tracks, targets) == pytest.approx(2 / 3)
    voted = Voted.of(tracks, HEAD, "mean")
    np.testing.assert_allclose(voted.scores, [[0.65, 0.35], [0.2, 0.8]])
    assert voted.hits(targets).tolist() == [True, True]
    split = [np.array([[0.6, 0.4], [0.6, 0.4], [0.0, 1.0]])]
    shares = Voted.of(split, HEAD, "majority")
    assert (shares.scores.tolist(), shares.best.tolist()) == ([[2 / 3, 1 / 3]], [0])
    assert Voted.of(split, HEAD, "weighted").scores[0, 1] > 0.9
    assert nll(voted.scores, targets, "single") == pytest.approx(-np.log([0.65, 0.8]).mean())
    three, first = np.array([[0.5, 0.3, 0.2]]), np.array([[1.0, 0.0, 0.0]])
    assert nll(three, first, "single") == pytest.approx(np.log(2))
    assert nll(three, first, "multi") == pytest.approx(-np.log([0.5, 0.7, 0.8]).mean())
    for kind in ("single", "multi"):
        assert np.isfinite(nll(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), kind))


def test_a_window_is_right_by_any_of_its_tracks_labels() -> None:
    tracks = [np.array([[0.9, 0.1, 0.2], [0.1, 0.2, 0.8], [0.2, 0.6, 0.1]])]
    assert window_accuracy(tracks, np.array([[1.0, 0.0, 1.0]])) == pytest.approx(2 / 3)


def test_windows_that_do_not_vote_change_nothing() -> None:
    windows = np.array([[0.9, 0.1], [0.0, 1.0]])
    voted = Voted.of([windows], HEAD, "mean", [np.array([True, False])])
    np.testing.assert_allclose(voted.scores, [[0.9, 0.1]])


def test_figures_by_label_by_hand() -> None:
    scores = np.array([[0.9, 0.2, 0.7], [0.6, 0.7, 0.6], [0.4, 0.6, 0.9], [0.3, 0.1, 0.8]])
    targets = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]], np.float32)
    found = _multi(Voted(scores, scores.argmax(1)), targets, ("a", "b", "c"))
    assert found["roc_auc"] == {"macro": 0.875, "labels": {"a": 0.75, "b": 1.0}}
    assert found["pr_auc"]["labels"] == pytest.approx({"a": 5 / 6, "b": 1.0})
    assert found["f1"] == pytest.approx({"a": 1 / 2, "b": 2 / 3})
    assert found["macro_f1"] == pytest.approx(7 / 12)
    truth = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    found = _single(Voted(scores, np.array([0, 1, 1, 2])), truth, ("a", "b", "c"))
    assert found["confusion"] == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert found["f1"] == pytest.approx({"a": 2 / 3, "b": 1 / 2})
    assert found["macro_f1"] == pytest.approx(7 / 12)


def test_the_nearest_neighbour_is_sought_among_other_recordings() -> None:
    angles = np.radians([0, 1, 20, 90, 80])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    targets = np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 0]]
    predictions = Predictions(HEAD, "audio", (), targets, [], [], embeddings, ())
    assert _neighbours(predictions, np.array([0, 0, 1, 2, 3])) == 0.2


def test_paired_votes_count_who_alone_is_right() -> None:
    first, second = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 0, 1])
    pair = _paired("mean", "majority", first, second, [-0.5, 1.0])
    assert (pair["only_first_right"], pair["only_second_right"]) == (2, 1)
    assert pair["difference"] == 0.25
    assert pair["p"] == 1.0


def test_excerpts_of_one_recording_are_resampled_together() -> None:
    values = np.stack([np.tile([0.0, 1.0], 50), np.ones(100), np.repeat([0.0, 1.0], 50)], 1)
    apart, ones, _ = _intervals(values, np.arange(100), 0)
    together, _, halves = _intervals(values, np.repeat(np.arange(2), 50), 0)
    assert apart == pytest.approx([0.41, 0.6])
    assert ones == [1.0, 1.0]
    assert together == pytest.approx([0.5, 0.5])
    assert halves == pytest.approx([0.0, 1.0])


def test_a_long_track_counts_in_the_interval_of_windows_by_its_windows() -> None:
    right = np.repeat([[1.0], [0.0]], [9, 1], axis=0)  # nine windows of one track, one of another
    ((low, high),) = _intervals(right, np.repeat([0, 1], [9, 1]), 0)
    assert (low, high) == (0.0, 1.0)
    ((low, high),) = _intervals(
        np.tile(right, (100, 1)), np.repeat(np.arange(200), [9, 1] * 100), 0
    )
    assert low < 0.9 < high
    assert high - low < 0.06


def test_figures_do_not_depend_on_how_much_is_computed_at_once(
    model: Bundle, archive: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(model, archive)
    values, groups = np.random.default_rng(0).random((40, 3)), np.arange(40) % 13
    intervals = _intervals(values, groups, 0)
    monkeypatch.setattr("model.evaluate.BLOCK", 64)
    np.testing.assert_allclose(_intervals(values, groups, 0), intervals)
    same = _neighbours(whole.predictions, np.arange(12))
    assert whole.report["neighbours"]["same_label"] == same


def test_coverage_keeps_the_most_confident() -> None:
    confidence = np.array([0.9, 0.8, 0.6, 0.3])
    right = np.array([1.0, 1.0, 0.0, 0.0])
    found = _coverage(confidence, right, 0.5)
    assert found["certain"] == 0.75
    assert found["accuracy_of_certain"] == pytest.approx(2 / 3)
    by_share = {point["coverage"]: point["accuracy"] for point in found["curve"]}
    assert by_share[0.5] == 1.0
    assert by_share[1.0] == 0.5

"""`timbre model` over files, start to end: compare, explore, train, evaluate, info."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from model.cli import _bar, app
from model.compare import Items, Row, _learned, _measure, _page, _searched, compare
from model.datasets import load
from model.explore import MOST_LINES
from tests import collections_of_music as music
from tests.integration.model.conftest import Command
from worker.errors import DatasetInvalid
from worker.settings import WindowSettings


def timbre_model(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def pictures(folder: Path) -> set[str]:
    """Names of the pictures that the folder's page shows; each is there and is a PNG."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)\.png"', page)
    for name in shown:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    return set(shown)


def test_compare_lays_approaches_side_by_side_from_audio(tmp_path: Path) -> None:
    table = tmp_path / "features.parquet"
    root = music.gtzan(tmp_path / "music")
    timbre_model("compare", "-d", root, "-o", tmp_path / "out", "--features", table, "--quick")
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())
    classifiers = (
        "logistic regression",
        "SVM",
        "random forest",
        "gradient boosting",
        "k nearest neighbours",
        "MLP",
    )
    networks = (
        "image-style CNN, 128 x 1024 mel",
        "three-layer CNN, 599 x 128 mel",
        "three-layer CNN, 599 x 20 MFCC",
        "window CNN, 3 s log-mel",
    )
    assert [row["approach"] for row in rows] == [
        *(f"features over the clip, {name}" for name in classifiers),
        *(f"features over 3 s, {name}" for name in classifiers),
        *networks,
    ]
    assert {row["items"] for row in rows} == {"clips", "segments"}
    assert all(0 <= row[key] <= 1 for row in rows for key in ("apart", "mixed", "track"))
    best = {row["approach"]: row["track"] for row in rows}
    assert best["features over 3 s, logistic regression"] == 1.0
    assert pictures(tmp_path / "out") == {"compare"}
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert all(f"<td>{row['approach']}</td>" in page for row in rows)
    assert "features over the clip, logistic regression" in page
    assert "A quick run: too few clips" in page
    features = pd.read_parquet(table)
    assert {"mfcc_00_mean", "chroma_11_std", "centroid_mean", "rolloff_mean"} <= set(features)
    assert {"zero_crossings_mean", "tempo", "name", "label"} <= set(features)
    assert features["segment"].max() == 1


def test_compare_says_when_there_is_too_little_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match="24 clips"):
        timbre_model("compare", "-d", music.archive(tmp_path / "a.npz"), "-o", tmp_path / "out")


def test_compare_counts_only_clips_that_can_be_read(tmp_path: Path) -> None:
    root = music.manifest(tmp_path)
    for file in sorted((root.parent / "blues").iterdir())[:2]:
        file.write_bytes(b"no audio but others " + file.name.encode())
    said: list[str] = []
    with pytest.raises(DatasetInvalid, match=r"of those that can be read, it has .*'blues': 1"):
        compare(load(root), tmp_path / "out", quick=True, say=said.append)
    assert any(re.match("skipped blues/.+, blues/.+: ", line) for line in said), said


def test_compare_takes_archives_and_asks_for_two_labels_that_clips_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes: list[tuple[int, ...]] = []

    def noted(build: Any, plane: torch.Tensor, *others: Any) -> Any:
        planes.append(tuple(plane.shape[1:]))
        return _learned(build, plane, *others)

    monkeypatch.setattr("model.compare._learned", noted)
    archive = music.archive(tmp_path / "a.npz", clips=24)
    with np.load(archive) as stored:
        held = dict(stored)
    np.savez(archive, **(held | {"genres": np.array([*music.GENRES, "polka"])}))
    table = tmp_path / "features.csv"
    timbre_model("compare", "-d", archive, "-o", tmp_path / "out", "--features", table, "--quick")
    columns = pd.read_csv(table).columns
    assert planes[::2] == [(1_024, 128), (599, 128), (599, 20), (72, 128)]
    assert "mfcc_19_std" in columns
    assert "chroma_00_mean" not in columns, "an archive has log-mels alone"
    np.savez(archive, **(held | {"y": np.zeros(24, np.uint8)}))
    with pytest.raises(DatasetInvalid, match="needs two labels"):
        timbre_model("compare", "-d", archive, "-o", tmp_path / "out", "--quick")


def test_the_page_of_a_comparison_says_on_how_much_it_stands(tmp_path: Path) -> None:
    dataset = load(music.archive(tmp_path / "a.npz"))
    rows = [Row("all-knowing", "segments", apart=0.25, mixed=0.75, track=1.0)]
    told = _page(rows, dataset, tmp_path, quick=False).read_text()
    assert "Learnt from 8 clips, measured on 4." in told
    assert "quick" not in told
    figures = ("all-knowing", "segments", "25.0%", "75.0%", "100.0%")
    assert "".join(f"<td>{cell}</td>" for cell in figures) in told


def test_compare_measures_on_fewer_clips_than_there_are_labels() -> None:
    clips = np.arange(24)
    items = Items(clips % 2, clips, clips < 23)
    row = _measure("all-knowing", "clips", items, lambda _, test: np.eye(2)[test % 2], 0)
    assert (row.apart, row.mixed, row.track) == (1, 1, 1)


def test_compare_shows_how_far_a_random_split_flatters_who_remembers_recordings() -> None:
    clips = np.repeat(np.arange(40), 5)  # five segments each
    items = Items(clips % 2, clips, clips < 30)

    def remembering(learn: np.ndarray, test: np.ndarray) -> np.ndarray:
        heard = np.isin(clips[test], clips[learn])
        said = np.where(heard, items.truth[test], 1 - items.truth[test])
        return np.asarray(np.eye(2)[said])

    row = _measure("remembering", "segments", items, remembering, 0)
    assert (row.apart, row.track) == (0, 0)
    assert row.mixed > 0.9


def test_a_grid_search_takes_the_point_that_is_right_on_clips_it_has_not_met() -> None:
    generator = np.random.default_rng(0)
    clips = np.arange(60)
    items = Items(clips % 2, clips, clips < 40)
    values = (generator.normal(0, 1, 60) + 1.5 * items.truth)[:, None]
    learn, test = clips[:40], clips[40:]
    for grid in ([1, 15], [15, 1]):
        found = _searched(KNeighborsClassifier(), {"n_neighbors": grid}, values, items, learn, test)
        assert found.shape == (20, 2)
        assert len(set(found[:, 0].tolist())) > 2, "one neighbour says 0 or 1"


def test_explore_draws_audio_and_archives(tmp_path: Path) -> None:
    timbre_model("explore", "-d", music.folders(tmp_path / "own"), "-o", tmp_path / "audio")
    drawn = {"balance", "durations", "waveforms", "spectrograms", "tsne_mel", "tsne_mfcc"}
    assert pictures(tmp_path / "audio") == drawn
    assert "Left out" not in (tmp_path / "audio" / "index.html").read_text()
    archive = music.archive(tmp_path / "a.npz")
    timbre_model("explore", "-d", archive, "-o", tmp_path / "archive", "--quick")
    assert pictures(tmp_path / "archive") == drawn - {"waveforms"}
    assert "GTZAN" in (tmp_path / "archive" / "index.html").read_text()
    with np.load(archive) as stored:
        np.savez(archive, **(dict(stored) | {"X": stored["X"][:, :, :1]}))  # 41 ms a clip
    timbre_model("explore", "-d", archive, "-o", tmp_path / "short")


def test_of_very_many_labels_explore_pictures_the_commonest(tmp_path: Path) -> None:
    archive, count = tmp_path / "a.npz", MOST_LINES + 100
    names = np.array([f"label {number}" for number in range(count)])
    pixels = np.random.default_rng(0).integers(0, 255, (count, 128, 2)).astype(np.uint8)
    np.savez(archive, X=pixels, y=np.arange(count), names=names, genres=names)
    timbre_model("explore", "-d", archive, "-o", tmp_path / "out", "--quick")
    for name in ("balance", "durations"):
        height = matplotlib.image.imread(tmp_path / "out" / f"{name}.png").shape[0]
        assert height < 110 * (2 + 0.25 * MOST_LINES)


def test_a_bar_in_a_terminal_begins_with_what_it_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    with _bar() as bar:
        bar.add_task("clips", total=2)
    assert "\x1b[2Kclips  " in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [("train", "-o", "x", "--seed", 2**32), ("evaluate", "--hop", "inf")]
)
def test_numbers_that_no_run_can_take_are_refused_at_once(options: tuple[object, ...]) -> None:
    invoked = CliRunner().invoke(app, [*map(str, options), "-d", "absent"])
    assert invoked.exit_code == 2


def test_train_evaluate_and_info_by_command(tmp_path: Path) -> None:
    archive, recipe = music.archive(tmp_path / "a.npz"), tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"batch": 8, "network": {"channels": [8, 16]}}))
    bundle = tmp_path / "own"
    timbre_model("train", "-d", archive, "-o", bundle, "--recipe", recipe, "--passes", 4)
    report = json.loads(
        timbre_model("evaluate", bundle, "-d", archive, "--split", "valid", "--json")
    )
    assert report["tracks"] == 4
    assert report["track"]["mean"]["accuracy"] >= 0
    told = timbre_model("evaluate", bundle, "-d", archive, "-o", tmp_path / "out")
    assert "majority" in told
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tracks"] == 12
    info = json.loads(timbre_model("info", bundle, "--json"))
    assert info["training"]["recipe"]["passes"] == 4
    told = timbre_model("info", bundle)
    assert told.startswith("own, version ")
    assert "training.seed: 0" in told
    assert "learnt" not in told


def test_train_takes_its_options_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Command
) -> None:
    folder, bundle = music.fma(tmp_path / "music"), tmp_path / "own"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"network": {"members": [{}], "channels": [8]}}))
    command = ("train", "-d", folder, "-o", bundle, "--passes", 1, "--recipe", recipe)
    assert refused(*command, "--resume") == (
        f"timbre: there is no {bundle}.work/checkpoint.pt to resume from; leave out --resume\n"
    )
    assert refused(*command, "--device", "tpu") == (
        "timbre: the device 'tpu' is none of auto, cpu and cuda\n"
    )
    options = ("--layout", "fma-all", "--fit", "train", "--seed", 7)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = CliRunner().invoke(app, [*map(str, (*command, *options))]).stderr
    assert re.search(r"rehearsal \S+ +\d+/\d+ +[\d:-]+ +loss \d\.\d{3}", shown)
    assert re.search(r"rehearsal +\d+%  loss \d\.\d{3}  valid: NLL \d\.\d{4}", shown)
    info = json.loads(timbre_model("info", bundle, "--json"))
    assert (info["training"]["seed"], info["training"]["fit"]) == (7, "train")
    assert info["heads"][0]["kind"] == "multi"


def test_the_table_of_many_labels_leaves_out_who_was_taken_for_whom(tmp_path: Path) -> None:
    archive, recipe = tmp_path / "a.npz", tmp_path / "recipe.json"
    genres = np.array([f"genre {number}" for number in range(60)])
    names = np.array([f"song {number}" for number in range(240)])
    pixels = np.random.default_rng(0).integers(0, 255, (240, 128, 72)).astype(np.uint8)
    np.savez(archive, X=pixels, y=np.arange(240) % 60, names=names, genres=genres)
    recipe.write_text(json.dumps({"network": {"members": [{}], "channels": [8]}}))
    bundle = tmp_path / "own"
    timbre_model("train", "-d", archive, "-o", bundle, "--recipe", recipe, "--passes", 0.1)
    told = timbre_model("evaluate", bundle, "-d", archive)
    assert re.search(r"│ 59 │ genre 59 │ \d\.\d\d │\n", told)


def test_the_table_names_every_label_that_it_has_a_column_for(tmp_path: Path) -> None:
    told = timbre_model("evaluate", "-d", music.manifest(tmp_path), "--split", "test")
    assert re.search(r"│ 4 │ hiphop +│ - +│", told)


def test_the_default_bundle_is_fine_tuned_on_ones_own_folders(tmp_path: Path) -> None:
    root = music.folders(tmp_path / "own", 6)
    timbre_model("train", "-d", root, "-o", tmp_path / "b", "--from", "default", "--passes", 2)
    info = json.loads(timbre_model("info", tmp_path / "b", "--json"))
    assert info["heads"][0]["labels"] == list(music.GENRES)
    assert info["training"]["start"].startswith("timbre-default ")
    assert info["network"]["kind"] == "musicnn"


def test_the_default_bundle_is_evaluated_on_an_archive_made_audible(tmp_path: Path) -> None:
    archive, out = music.archive(tmp_path / "a.npz"), tmp_path / "out"
    told = timbre_model("evaluate", "-d", archive, "-o", out)
    assert "no measure of the bundle on audio" in " ".join(told.split())
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(timbre_model("evaluate", "-d", archive, "--json"))
    assert report["hop_s"] == WindowSettings().hop_s
    assert report["bundle"]["name"] == "timbre-default"
    assert report["input"] == "audio resynthesised from log-mels"
    assert (report["tracks"], report["window"]["count"]) == (12, 12 * 3)
    assert len(report["labels"]) == 10
    page = (out / "index.html").read_text(encoding="utf-8")
    assert all(caveat in unescape(page) for caveat in report["caveats"])


def test_the_recipe_says_at_once_when_its_data_are_not_there(
    tmp_path: Path, refused: Command
) -> None:
    told = refused("recipe", "-o", tmp_path / "b", "--data", tmp_path, "--work", tmp_path / "work")
    assert "no gtzan/logmel30s.npz and no gtzan/manifest.csv" in told
    assert not (tmp_path / "work").exists()


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path, refused: Command) -> None:
    taken = tmp_path / "file"
    taken.write_bytes(b"")
    told = refused("export", "--onnx", taken / "model.onnx")
    assert told == f"timbre: {taken} can't be used: File exists\n"
    archive = music.archive(tmp_path / "a.npz", clips=24)
    for told in (
        refused("train", "--dataset", archive, "--out", taken),
        refused("train", "--dataset", archive, "--out", tmp_path / "b", "--work", taken),
        *(
            refused(name, "-d", "absent", "-o", taken)
            for name in ("evaluate", "compare", "explore")
        ),
        refused("compare", "-d", archive, "-o", tmp_path, "--features", taken / "table.csv"),
    ):
        assert told == f"timbre: {taken} can't be made a folder: File exists\n"
    told = refused("evaluate", "--dataset", "absent", "--out", "/proc")  # there, and of the kernel
    assert told.startswith("timbre: /proc can't be written to: ")
    told = refused("compare", "-d", archive, "-o", tmp_path, "--features", tmp_path / "table.xlsx")
    assert told == f"timbre: {tmp_path}/table.xlsx: features are saved as .csv or .parquet\n"


def test_a_bundle_overwrites_no_folder_of_something_else(tmp_path: Path, refused: Command) -> None:
    notes = tmp_path / "README.md"
    notes.write_text("mine")
    archive = music.archive(tmp_path / "a.npz", clips=24)
    told = refused("train", "--dataset", archive, "--out", tmp_path)
    assert told == (
        f"timbre: {tmp_path} is no bundle's folder, and its README.md would be overwritten: "
        "name another\n"
    )
    assert notes.read_text() == "mine"


def test_a_data_set_that_is_not_there_is_a_sentence(tmp_path: Path, refused: Command) -> None:
    told = refused("compare", "-d", tmp_path / "none", "-o", tmp_path / "out")
    assert told == f"timbre: {tmp_path}/none does not exist\n"

"""What `timbre model explore` draws."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from model.datasets.dataset import Clip, Dataset
from model.datasets.logmels import LogMelSource
from model.explore import _balance, _draw_features, _durations, _waveforms
from model.features import MFCCS
from model.logmel_cnn import ARCHIVE_FRONT_END
from model.pictures import Gallery
from tests.audio import encode_as


def test_a_waveforms_ticks_say_where_they_stand(tmp_path: Path) -> None:
    path = encode_as(tmp_path / "long.flac", duration_s=12.0)
    clip = Clip("long", ("jazz",), "artist", path=path)
    dataset = Dataset("one", "folders", "single", ("jazz",), (clip,), "artist", "none")

    figure = _waveforms(dataset, [0])
    figure.draw_without_rendering()

    ticks = figure.axes[-1].xaxis.get_major_ticks()
    assert len(ticks) > 5
    for tick in ticks:
        assert float(tick.label1.get_text().replace("\u2212", "-")) == tick.get_loc()


def test_balance_and_durations_are_drawn_by_label() -> None:
    told = (
        ("a", "jazz", "train"),
        ("b", "jazz", "test"),
        ("c", "jazz", "test"),
        ("d", "pop", None),
    )
    clips = tuple(Clip(name, (label,), name, split) for name, label, split in told)
    dataset = Dataset("four", "archive", "single", ("jazz", "pop"), clips, "recording", "none")

    axes = _balance(dataset, ["jazz", "pop"]).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches if isinstance(bar, Rectangle)]
    assert labels == ["jazz", "pop"]
    assert bars == [(0, 1), (0, 0), (1, 2), (0, 0), (3, 0), (0, 1)], "train, test and no split"

    hops = [np.zeros((round(s * 22_050 / 914), 128), np.float32) for s in (10, 20, 30, 5)]
    axes = _durations(dataset, LogMelSource(hops, ARCHIVE_FRONT_END), ["jazz", "pop"]).axes[0]
    medians = [np.asarray(line.get_xdata()) for line in axes.lines if line.get_color() == "C1"]
    assert [line.mean() for line in medians] == pytest.approx([20, 5], rel=0.01)


def test_clips_are_laid_out_by_mfcc_and_by_mel_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []

    def noted(vectors: np.ndarray, _: int) -> np.ndarray:
        widths.append(vectors.shape[1])
        return vectors[:, :2]

    monkeypatch.setattr("model.explore.tsne", noted)
    logmels = list(np.random.default_rng(0).normal(size=(3, 80, 128)).astype(np.float32))
    clips = tuple(Clip(name, ("jazz",), name) for name in "abc")
    dataset = Dataset("three", "archive", "single", ("jazz",), clips, "recording", "none")
    gallery = Gallery(tmp_path, "three")
    _draw_features(gallery, dataset, LogMelSource(logmels, ARCHIVE_FRONT_END), 0, print)

    assert widths == [2 * MFCCS, 2 * 128]
    for name, part in zip(("mfcc", "mel"), gallery.parts, strict=True):
        assert f"tsne_{name}.png" in part

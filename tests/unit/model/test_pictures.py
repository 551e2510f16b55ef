from pathlib import Path

import numpy as np

from model.pictures import MOST_NAMED, Gallery, scatter_by_class, tsne


def test_labels_are_drawn_and_told_as_they_are(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, "$\\x$ <script>")
    figure = scatter_by_class(np.zeros((1, 2)), np.zeros(1, np.intp), ("$\\x$ 音楽",))
    gallery.picture("labels", figure, "<script>", '"><script>')
    gallery.table("Left out", ["clip"], [["<script>"]])
    assert "<script>" not in gallery.write().read_text()


def test_of_many_classes_the_commonest_are_named() -> None:
    labels = tuple(f"label {number}" for number in range(161))
    classes = np.concatenate([np.arange(161), np.arange(100, 130)])
    figure = scatter_by_class(np.random.default_rng(0).random((191, 2)), classes, labels)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    told = [text.get_text() for text in legend.get_texts()]
    assert told == ["other", *labels[100 : 100 + MOST_NAMED]]
    drawn = figure.axes[0].collections[1:]  # the first are the others
    shapes = [np.asarray(dots.get_paths()[0].vertices).tobytes() for dots in drawn]
    colours = [np.asarray(dots.get_facecolor()).tobytes() for dots in drawn]
    assert len(set(zip(shapes, colours, strict=True))) == MOST_NAMED
    assert shapes[2] != shapes[3]  # green and red


def test_vectors_without_a_plane_to_lay_out_stay_at_one_place() -> None:
    assert not tsne(np.full((24, 16), 0.1, np.float32)).any()
    assert not tsne(np.linspace(0, 1, 24)[:, None]).any()
    assert tsne(np.random.default_rng(0).random((24, 2))).std() > 0

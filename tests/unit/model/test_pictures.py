from pathlib import Path

import numpy as np

from model.pictures import Gallery, scatter_by_class


def test_labels_are_drawn_and_told_as_they_are(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, "$\\x$ <script>")
    figure = scatter_by_class(np.zeros((1, 2)), np.zeros(1, np.intp), ("$\\x$",))
    gallery.picture("labels", figure, "<script>", '"><script>')
    gallery.table("Left out", ["clip"], [["<script>"]])
    assert "<script>" not in gallery.write().read_text()

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib.figure import Figure

from model.bundle import Bundle
from schemas.events import ModelRef, WindowCounts
from tests.audio import audio_facts
from worker.analysis import Analysis
from worker.commands.plot import _draw_panel, draw_taggrams


def test_a_picture_is_drawn_whatever_the_name_of_the_file(tmp_path: Path) -> None:
    bundle = Bundle.load()
    analysis = Analysis(
        audio=audio_facts(),
        tags=[],
        uncertain=False,
        windows=WindowCounts(total=1, silent=0),
        vote="mean",
        model=ModelRef(name="m", version="v"),
        taggram={head.name: [[0.5] * len(head.labels)] for head in bundle.heads},
        embedding=[1.0],
    )
    picture = tmp_path / "a.svg"
    draw_taggrams(picture, [("<Ke$ha $> $\\x$\x1b", analysis)], bundle, hop_s=3.0)
    drawn = ElementTree.parse(picture).getroot().itertext()
    assert any(r"<Ke$ha $> $\x$\u001b: genre" in text for text in drawn)


def test_a_silent_window_is_told_from_one_in_which_nothing_was_heard() -> None:
    panel = Figure().subplots()
    table = np.array([[0.9, 0.1], [0.0, 0.0], [0.2, 0.8]])
    _draw_panel(panel, table, ["jazz", "rock"], hop_s=3.0, duration_s=9.0)
    drawn: np.ndarray = np.ma.filled(np.ma.asarray(panel.images[0].get_array()), np.nan)
    assert np.isnan(drawn).all(axis=0).tolist() == [False, True, False]
    assert "silent" in panel.get_xlabel()

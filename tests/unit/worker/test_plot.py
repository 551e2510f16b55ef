import io
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from model.bundle import Bundle
from schemas.events import ModelRef, WindowCounts
from tests.audio import audio_facts
from worker.analysis import Analysis
from worker.commands.plot import _draw_panel, check_place, draw_taggrams
from worker.errors import SourceInvalid


def analysis(bundle: Bundle) -> Analysis:
    return Analysis(
        audio=audio_facts(),
        tags=[],
        uncertain=False,
        windows=WindowCounts(total=1, silent=0),
        vote="mean",
        model=ModelRef(name="m", version="v"),
        taggram={head.name: [[0.5] * len(head.labels)] for head in bundle.heads},
        embedding=[1.0],
    )


def titles(picture: Path) -> list[str]:
    return [text for text in ElementTree.parse(picture).getroot().itertext() if "genre: " in text]


def test_a_picture_is_drawn_whatever_the_name_of_the_file(tmp_path: Path) -> None:
    bundle = Bundle.load()
    picture = tmp_path / "a.svg"
    draw_taggrams(picture, [("<Ke$ha $> $\\x$\x1b", analysis(bundle))], bundle, hop_s=3.0)
    assert titles(picture) == [r"genre: <Ke$ha $> $\x$\u001b"]


def test_a_title_is_the_files_name_cut_where_it_is_long(tmp_path: Path) -> None:
    bundle = Bundle.load()
    names = [f"/music/{'x/' * 99}a.mp3", f"/music/{'夜' * 99}.mp3"]
    picture = tmp_path / "a.svg"
    draw_taggrams(picture, [(name, analysis(bundle)) for name in names], bundle, hop_s=3.0)
    short, long = titles(picture)
    assert short == "genre: a.mp3"
    assert long == f"genre: {'夜' * 39} …"


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_only_a_taggram_drawn_before_is_drawn_over(tmp_path: Path, name: str) -> None:
    bundle, picture = Bundle.load(), tmp_path / name
    check_place(picture)
    draw_taggrams(picture, [("夜.mp3", analysis(bundle))], bundle, hop_s=3.0)
    check_place(picture)
    Figure().savefig(picture)
    with pytest.raises(SourceInvalid, match="no taggram of Timbre's"):
        check_place(picture)
    with pytest.raises(SourceInvalid, match="nothing can be put there"):
        check_place(tmp_path / "absent" / name)


@pytest.mark.parametrize("duration_s", [1.0, 2.5, 10.0, 200.0])
def test_time_ends_with_the_track_and_no_tick_is_told_twice(duration_s: float) -> None:
    figure = Figure()
    panel = figure.subplots()
    table = np.full((math.ceil(duration_s / 3), 2), 0.5)
    _draw_panel(panel, table, ["jazz", "rock"], hop_s=3.0, duration_s=duration_s)
    assert panel.get_xlim() == (0.0, duration_s)
    figure.draw_without_rendering()
    shown = [label.get_text() for label in panel.get_xticklabels()]
    assert len(set(shown)) == len(shown)


def test_a_silent_window_is_told_from_one_in_which_nothing_was_heard() -> None:
    panel = Figure().subplots()
    table = np.array([[0.9, 0.1], [0.0, 0.0], [0.2, 0.8]])
    _draw_panel(panel, table, ["jazz", "rock"], hop_s=3.0, duration_s=9.0)
    drawn: np.ndarray = np.ma.filled(np.ma.asarray(panel.images[0].get_array()), np.nan)
    assert np.isnan(drawn).all(axis=0).tolist() == [False, True, False]
    assert "silent" in panel.get_xlabel()


def test_a_tail_in_no_window_is_blank_where_silence_is_grey() -> None:
    figure, drawn = Figure(), io.BytesIO()
    panel = figure.subplots()
    table = np.array([[0.9, 0.1], [0.0, 0.0], [0.2, 0.8]])
    _draw_panel(panel, table, ["jazz", "rock"], hop_s=3.0, duration_s=9.9)
    figure.savefig(drawn, format="rgba", dpi=figure.dpi)
    pixels = np.frombuffer(drawn.getvalue(), np.uint8).reshape(480, 640, 4)

    def colour(at_s: float) -> list[int]:
        x, y = panel.transData.transform((at_s, 1.0))
        return list(pixels[-round(y), round(x), :3])

    assert colour(4.5) == [204] * 3
    assert colour(9.5) == [255] * 3

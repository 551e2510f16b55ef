"""What `timbre model explore` draws."""

from pathlib import Path

from model.datasets.dataset import Clip, Dataset
from model.explore import _waveforms
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

import numpy as np
from matplotlib.figure import Figure

from worker.plot import _draw_panel


def test_a_silent_window_is_told_from_one_in_which_nothing_was_heard() -> None:
    panel = Figure().subplots()
    table = np.array([[0.9, 0.1], [0.0, 0.0], [0.2, 0.8]])
    _draw_panel(panel, table, ["jazz", "rock"], hop_s=3.0, duration_s=9.0)
    drawn: np.ndarray = np.ma.filled(np.ma.asarray(panel.images[0].get_array()), np.nan)
    assert np.isnan(drawn).all(axis=0).tolist() == [False, True, False]
    assert "silent" in panel.get_xlabel()

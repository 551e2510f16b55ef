import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.windows import Samples, WindowCutter, Windows, cut, is_silent, loudness_dbfs


def windows_of(samples: Samples, *, window: int, hop: int, min_tail: int = 1) -> Windows:
    return np.concatenate(list(cut([samples], WindowCutter(window, hop, min_tail))))


def starts(length: int, *, window: int, hop: int, min_tail: int = 1) -> list[float]:
    """Where the windows of a ramp of `length` samples start."""
    ramp = np.arange(length, dtype=np.float32)
    cutting = windows_of(ramp, window=window, hop=hop, min_tail=min_tail)
    assert (np.diff(cutting, axis=1) == 1).all(), "a window is consecutive audio"
    first: list[float] = cutting[:, 0].tolist()
    return first


def test_a_window_starts_every_hop() -> None:
    assert starts(12, window=4, hop=4) == [0, 4, 8]
    assert starts(12, window=4, hop=2) == [0, 2, 4, 6, 8]


def test_a_hop_larger_than_the_window_skips_audio() -> None:
    assert starts(18, window=4, hop=7) == [0, 7, 14]


def test_a_tail_gets_the_last_window_of_the_track() -> None:
    assert starts(10, window=4, hop=4, min_tail=2) == [0, 4, 6]
    assert starts(11, window=4, hop=7, min_tail=2) == [0, 7]
    assert starts(10, window=4, hop=7, min_tail=2) == [0, 6]


def test_a_tail_shorter_than_the_minimum_is_dropped() -> None:
    assert starts(10, window=4, hop=4, min_tail=3) == [0, 4]


def test_audio_that_a_window_has_covered_is_no_tail() -> None:
    assert starts(10, window=4, hop=3, min_tail=1) == [0, 3, 6]
    assert starts(11, window=4, hop=3, min_tail=1) == [0, 3, 6, 7]
    assert starts(7, window=4, hop=7, min_tail=0) == [0]


def test_a_track_shorter_than_a_window_is_repeated_to_fill_one() -> None:
    short = np.array([1, 2, 3], np.float32)

    cutting = windows_of(short, window=7, hop=7, min_tail=5)

    assert cutting.tolist() == [[1, 2, 3, 1, 2, 3, 1]]


def test_a_single_sample_fills_a_window() -> None:
    assert windows_of(np.ones(1, np.float32), window=4, hop=4).tolist() == [[1, 1, 1, 1]]


def test_no_audio_gives_no_window() -> None:
    assert windows_of(np.empty(0, np.float32), window=4, hop=4).shape == (0, 4)


@pytest.mark.parametrize(("window", "hop"), [(0, 1), (1, 0)])
def test_windows_and_hops_of_no_length_are_refused(window: int, hop: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        WindowCutter(window, hop, 0)


@given(
    pieces=st.lists(st.integers(0, 40), max_size=12),
    window=st.integers(1, 17),
    hop=st.integers(1, 25),
    min_tail=st.integers(0, 20),
)
@example(pieces=[4, 2], window=4, hop=4, min_tail=1)
def test_windows_are_the_same_however_the_samples_arrive(
    pieces: list[int], window: int, hop: int, min_tail: int
) -> None:
    track = np.arange(1, sum(pieces) + 1, dtype=np.float32)
    arriving = np.split(track, np.cumsum(pieces)[:-1]) if pieces else []
    cutter = WindowCutter(window, hop, min_tail)

    cutting = [windows.copy() for windows in cut(arriving, cutter)]

    assert np.array_equal(np.concatenate(cutting), _reference(track, window, hop, min_tail))


def _reference(track: Samples, window: int, hop: int, min_tail: int) -> Windows:
    """The rules of docs/audio.md said plainly, over a whole track."""
    if 0 < len(track) < window:
        return np.resize(track, (1, window))
    first = list(range(0, len(track) - window + 1, hop))
    reached = max(first[-1] + window, first[-1] + hop) if first else 0
    if first and len(track) - reached >= max(1, min_tail):
        first.append(len(track) - window)
    return np.array([track[start : start + window] for start in first]).reshape(-1, window)


def test_of_a_long_track_no_more_than_a_window_is_kept() -> None:
    cutter = WindowCutter(8, 4, 1)
    for _ in range(100):
        cutter.push(np.ones(3, np.float32))
        assert cutter._kept.size + sum(piece.size for piece in cutter._pieces) <= 8 + 3


def test_a_window_below_the_threshold_is_silent() -> None:
    loud = np.full(1000, 10 ** (-59 / 20), np.float32)
    quiet = np.full(1000, 10 ** (-61 / 20), np.float32)

    assert is_silent(np.stack([loud, quiet]), -60.0).tolist() == [False, True]


def test_loudness_is_the_root_mean_square_in_decibels_of_full_scale() -> None:
    square = np.resize(np.array([1, -1], np.float32), (1, 100))
    sine = np.sin(np.linspace(0, 20 * np.pi, 1000, endpoint=False), dtype=np.float32)[np.newaxis]

    assert loudness_dbfs(square)[0] == pytest.approx(0.0)
    assert loudness_dbfs(sine)[0] == pytest.approx(-3.01, abs=0.01)


def test_digital_silence_has_a_loudness_and_is_silent() -> None:
    nothing = np.zeros((2, 100), np.float32)

    assert np.isfinite(loudness_dbfs(nothing)).all()
    assert is_silent(nothing, -60.0).all()

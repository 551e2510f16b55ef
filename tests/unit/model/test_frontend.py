import librosa
import numpy as np
import pytest
import torch

from model.export import ConvolvedLogMel
from model.frontend import LogMel, LogMelConfig, normalise
from tests.unit.model.music import RATE_HZ, chords


def librosas(samples: np.ndarray, config: LogMelConfig) -> np.ndarray:
    mel = librosa.feature.melspectrogram(
        y=samples,
        sr=config.sample_rate_hz,
        n_fft=config.n_fft,
        hop_length=config.hop,
        n_mels=config.n_mels,
        fmax=config.f_max_hz,
        pad_mode="constant",
    )
    return np.asarray(np.log10(10_000 * mel.T[: config.frames] + 1))


def test_the_front_end_equals_librosas() -> None:
    config = LogMelConfig()
    windows = chords(3)

    made = LogMel(config)(windows)

    assert made.shape == (3, 187, 96)
    for window, logmel in zip(windows.numpy(), made.numpy(), strict=True):
        np.testing.assert_allclose(logmel, librosas(window, config), atol=1e-3)


@pytest.mark.parametrize("samples", [RATE_HZ, 3 * RATE_HZ, 4 * RATE_HZ])
def test_windows_of_any_length_give_the_stated_frames(samples: int) -> None:
    assert LogMel(LogMelConfig())(torch.zeros(2, samples)).shape == (2, 187, 96)


def test_the_front_end_stays_in_float32_under_autocast() -> None:
    front_end, windows = LogMel(LogMelConfig()), chords(1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = front_end(windows)

    assert made.dtype == torch.float32
    torch.testing.assert_close(made, front_end(windows))


def test_decibels_and_normalising_take_out_an_unknown_gain() -> None:
    config = LogMelConfig(compression="decibel", normalise=True)
    windows = chords(2) + 0.02 * torch.randn(2, 3 * RATE_HZ)

    loud, quiet = LogMel(config)(windows), LogMel(config)(0.1 * windows)

    torch.testing.assert_close(loud, quiet, atol=1e-3, rtol=0)
    assert loud.mean((1, 2)).abs().max() < 1e-4


def test_decibels_keep_the_range_that_librosas_do() -> None:
    unbounded = LogMelConfig(compression="decibel")
    windows = chords(2)

    made = LogMel(unbounded.model_copy(update={"range_db": 80.0}))(windows)

    for all_levels, logmel in zip(LogMel(unbounded)(windows).numpy(), made.numpy(), strict=True):
        power = 10 ** (all_levels.astype(np.float64) / 10)
        assert all_levels.min() < logmel.min()
        np.testing.assert_allclose(logmel, librosa.power_to_db(power, top_db=80.0), atol=1e-3)


def test_a_window_without_variation_normalises_to_zeros() -> None:
    assert normalise(torch.full((1, 10, 4), 3.0)).abs().max() == 0


def test_the_convolved_transform_equals_the_fast_one() -> None:
    front_end, windows = LogMel(LogMelConfig()), chords(2)

    torch.testing.assert_close(
        ConvolvedLogMel(front_end)(windows), front_end(windows), atol=1e-4, rtol=0
    )

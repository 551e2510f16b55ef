"""Augmentation: windows keep their shape and scale, and each effect does what it says."""

import librosa
import numpy as np
import pytest
import torch
from torch import Tensor

from model.augment import KNOTS, Augmentation, Augmenter
from model.frontend import LogMelConfig
from model.logmel_cnn import ARCHIVE_FRONT_END

NOTHING = Augmentation(
    pitch=0, tempo=0, equaliser=0, gain=0, time_mask=0, band_mask=0, band_masks=0, mixup=0
)
TARGETS = torch.eye(8)


def augmenter(
    front_end: LogMelConfig = ARCHIVE_FRONT_END, seed: int = 0, **effects: float
) -> Augmenter:
    recipe = NOTHING.model_copy(update=effects)
    return Augmenter(recipe, front_end, torch.Generator().manual_seed(seed), torch.device("cpu"))


def excerpts(frames: int, bands: int = 128) -> Tensor:
    return torch.randn(8, frames, bands, generator=torch.Generator().manual_seed(7)) * 20 + 100


def test_all_effects_keep_shape_and_normalisation() -> None:
    augment = Augmenter(
        Augmentation(), ARCHIVE_FRONT_END, torch.Generator().manual_seed(1), torch.device("cpu")
    )
    logmel, targets = augment(excerpts(augment.span), TARGETS)
    assert logmel.shape == (8, 72, 128)
    assert logmel.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_nothing_on_gives_the_normalised_excerpt() -> None:
    augment = augmenter()
    source = excerpts(augment.span)
    logmel, targets = augment(source, TARGETS)
    assert torch.equal(targets, TARGETS)
    assert abs(float(logmel.mean())) < 1e-4
    assert float(logmel.std()) == pytest.approx(1.0, abs=1e-2)


def test_one_seed_gives_one_result() -> None:
    first, second, other = (augmenter(seed=s, pitch=0.2, tempo=0.2, mixup=1.0) for s in (3, 3, 4))
    source = excerpts(first.span)
    assert torch.equal(first(source, TARGETS)[0], second(source, TARGETS)[0])
    assert not torch.equal(first(source, TARGETS)[0], other(source, TARGETS)[0])


def test_pitch_moves_a_partial_by_its_ratio() -> None:
    augment = augmenter(pitch=0.4)
    at = 70
    source = torch.zeros(8, augment.span, 128)
    source[:, :, at] = 1.0
    peaks = augment(source, TARGETS)[0].mean(1).argmax(1)
    ratios = augment.centres_hz[peaks] / augment.centres_hz[at]
    assert len(set(peaks.tolist())) > 3
    assert ((ratios > 1 / 1.45) & (ratios < 1.45)).all()


def test_bands_lie_where_librosas_do() -> None:
    hertz = librosa.mel_frequencies(128 + 2, fmax=ARCHIVE_FRONT_END.f_max_hz)[1:-1]
    np.testing.assert_allclose(augmenter().centres_hz.numpy(), hertz, rtol=1e-4)


def test_tempo_changes_by_a_ratio_of_each_windows_own() -> None:
    augment = augmenter(tempo=0.4)
    ramp = torch.arange(augment.span, dtype=torch.float32)[None, :, None].expand(8, -1, 128)
    rates = augment._change_tempo(ramp)[:, :, 0].diff()
    torch.testing.assert_close(rates, rates[:, :1].expand_as(rates), atol=2e-3, rtol=0)
    assert ((rates > 1 / 1.45) & (rates < 1.45)).all()
    assert rates[:, 0].std() > 0.05


def test_mixup_mixes_targets_as_it_mixes_windows() -> None:
    augment = augmenter(mixup=1.0)
    _, targets = augment(excerpts(augment.span), TARGETS)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert (targets.diagonal() >= 0.5).all()
    assert ((targets > 0).sum(1) <= 2).all()
    windows = torch.randn(8, 72, 128)
    mixed, shares = augment._mix(windows, TARGETS)
    assert (shares.diagonal() < 1).any()
    torch.testing.assert_close(mixed, torch.einsum("wo,otb->wtb", shares, windows))


def test_a_masked_stretch_of_time_takes_the_means_of_the_bands() -> None:
    augment = augmenter(time_mask=0.5)
    logmel, _ = augment(excerpts(augment.span), TARGETS)
    unchanging = (logmel[:, 1:] == logmel[:, :-1]).all(2)
    assert unchanging.any()
    assert int(unchanging.sum(1).max()) <= 36
    assert float(augment._stretch(4_000, 72, 0.5).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_a_masked_range_of_bands_is_hidden_in_every_frame() -> None:
    augment = augmenter(band_mask=0.5, band_masks=1)
    logmel, _ = augment(excerpts(augment.span), TARGETS)
    hidden = (logmel == 0).all(1)
    assert torch.equal(hidden, (logmel == 0).any(1))
    edges = hidden.int().diff(dim=1, prepend=torch.zeros(8, 1), append=torch.zeros(8, 1))
    assert (edges.abs().sum(1) <= 2).all(), "one range"
    assert len(set(hidden.sum(1).tolist())) > 3
    assert 0 < int(hidden.sum(1).max()) <= 64


def changes(**effects: float) -> Tensor:
    """What effects add to windows of a front end that doesn't normalise."""
    plain, augment = augmenter(LogMelConfig()), augmenter(LogMelConfig(), 0, **effects)
    source = excerpts(plain.span, 96)
    return augment(source, TARGETS)[0] - plain(source, TARGETS)[0]


def test_an_equaliser_adds_each_window_a_smooth_curve_over_the_bands() -> None:
    curves = changes(equaliser=0.3)
    torch.testing.assert_close(curves, curves[:, :1].expand_as(curves), atol=1e-3, rtol=0)
    curves = curves[:, 0]
    assert (curves.std(1) > 0.2).sum() >= 6
    assert len({round(float(level), 2) for level in curves[:, 0]}) == 8
    bends = curves.diff(dim=1).diff(dim=1).abs() > 1e-3
    assert (bends.sum(1) <= 2 * (KNOTS - 2)).all(), "straight between knots"


def test_gain_makes_a_whole_window_louder_or_quieter() -> None:
    gains = changes(gain=0.3)
    torch.testing.assert_close(gains, gains[:, :1, :1].expand_as(gains), atol=1e-3, rtol=0)
    assert 2 < float(gains[:, 0, 0].std()) < 15, "of deviations of 20"
    assert (gains[:, 0, 0] > 0).any()
    assert (gains[:, 0, 0] < 0).any()


def test_front_ends_that_do_not_normalise_keep_their_scale() -> None:
    plain = LogMelConfig()
    augment = augmenter(plain, gain=0.3)
    source = excerpts(augment.span, plain.n_mels)
    logmel, _ = augment(source, TARGETS)
    assert logmel.shape == (8, 187, 96)
    assert float(logmel.mean()) == pytest.approx(100, abs=10)
    assert float(logmel.std()) == pytest.approx(20, abs=5)

import numpy as np
import pytest
from pydantic import ValidationError

from model.calibration import (
    Calibration,
    Kind,
    chance_calibration_error,
    expected_calibration_error,
    fit_temperature,
    threshold_for_coverage,
)
from model.measure import nll


def drawn(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores too sharp or too flat by `temperature`, and classes drawn by what they should be."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4_000, 5))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    classes = np.array([rng.choice(5, p=row) for row in honest])
    scores = np.exp(logits * temperature)
    return scores / scores.sum(1, keepdims=True), classes


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_spoiled_the_scores_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_several_labels_is_found(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4_000, 3))
    truth = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    spoiled = 1 / (1 + np.exp(-logits * temperature))
    assert fit_temperature(spoiled, truth) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_the_temperature_found_suits_unanimous_votes_best(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(2_000) % 4
    voted = np.eye(4)[np.where(rng.random(2_000) < 0.99, truth, (truth + 1) % 4)]
    wanted = truth if kind == "single" else np.eye(4)[truth]

    def loss(temperature: float) -> float:
        calibration = Calibration(temperature={"majority": temperature})
        return nll(calibration.apply(voted, kind=kind, method="majority"), np.eye(4)[truth], kind)

    found = fit_temperature(voted, wanted)
    assert 0.2 < found < 5
    assert loss(found) < min(loss(0.9 * found), loss(1.1 * found))


def test_calibrating_brings_confidence_to_accuracy() -> None:
    scores, classes = drawn(2.5)
    right = scores.argmax(1) == classes
    calibrated = Calibration(temperature={"mean": fit_temperature(scores, classes)}).apply(
        scores, kind="single", method="mean"
    )

    assert expected_calibration_error(scores.max(1), right) > 0.1
    assert expected_calibration_error(calibrated.max(1), right) < 0.03
    np.testing.assert_allclose(calibrated.sum(1), 1)


def test_the_error_of_calibration_by_hand() -> None:
    confidence = np.array([0.05, 0.15, 0.19, 0.21, 0.85, 0.95, 1.0])
    right = np.array([0, 1, 0, 0, 1, 1, 0])
    gaps = [0.05, 2 * 0.33, 0.21, 0.15, 2 * 0.475]  # of the tenths that have any

    assert expected_calibration_error(confidence, right) == pytest.approx(sum(gaps) / 7)


def test_few_tracks_show_an_error_of_calibration_by_chance_and_many_do_not() -> None:
    confidence = np.random.default_rng(1).uniform(0.3, 1, 20_000)

    assert chance_calibration_error(np.ones(50)) == 0
    assert chance_calibration_error(np.full(100, 0.8)) == pytest.approx(0.0319, abs=0.002)
    assert chance_calibration_error(confidence[:150]) > 0.05
    assert chance_calibration_error(confidence, draws=50) < 0.01


def test_calibrating_never_changes_the_order() -> None:
    scores = np.array([0.2, 0.5, 0.3])
    calibrated = Calibration(temperature={"mean": 0.4}).apply(scores, kind="single", method="mean")

    assert calibrated.argsort().tolist() == scores.argsort().tolist()


def test_a_method_without_a_fit_is_left_as_it_is() -> None:
    scores = np.array([0.0, 1.0])

    for kind in ("single", "multi"):
        applied = Calibration().apply(scores, kind=kind, method="majority")
        assert applied.tolist() == [0.0, 1.0]


def test_a_unanimous_vote_is_not_calibrated_to_certainty() -> None:
    calibration = Calibration(temperature={"majority": 2.0})
    scores = calibration.apply(np.array([1.0, 0.0, 0.0]), kind="single", method="majority")

    assert scores[0] == pytest.approx(1 / (1 + 2 * 0.001**0.5)), "on which fits of bundles rest"
    both = calibration.apply(np.array([1.0, 0.0]), kind="multi", method="majority")
    assert 0.999 < both[0] < 1
    assert 0 < both[1] < 0.001


def test_multi_label_scores_move_towards_a_half() -> None:
    calibration = Calibration(temperature={"mean": 2.0})
    scores = calibration.apply(np.array([0.1, 0.5, 0.9]), kind="multi", method="mean")

    assert 0.1 < scores[0] < 0.5
    assert scores[1] == pytest.approx(0.5)
    assert scores[0] + scores[2] == pytest.approx(1)


@pytest.mark.parametrize("temperature", [1 / 20, 20.0])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_the_utmost_temperatures_still_give_scores(temperature: float, kind: Kind) -> None:
    scores = Calibration(temperature={"mean": temperature}).apply(
        np.full(4_096, 1 / 4_096), kind=kind, method="mean"
    )

    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.01, 100.0, np.nan, np.inf])
def test_a_temperature_that_breaks_scores_is_refused(temperature: float) -> None:
    with pytest.raises(ValidationError, match="temperature"):
        Calibration(temperature={"mean": temperature})


def test_a_threshold_for_coverage_keeps_that_share() -> None:
    confidence = np.linspace(0, 1, 101)

    assert (confidence >= threshold_for_coverage(confidence, 0.7)).mean() == pytest.approx(
        0.7, abs=0.01
    )

"""Scores that mean what they say: calibration of voted probabilities, and how to measure it."""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from worker.settings import VoteMethod

Kind = Literal["single", "multi"]
FLOOR = 1e-3  # a vote of zero windows is no proof of impossibility
NO_PROOF = 1e-9  # nor is one of all windows, or of none, a proof of a label's yes or no
BINS = 10  # of scores
CONFIDENT_COVERAGE = 0.7  # share of tracks that `uncertain` leaves
# A power of 20 keeps every score's within what a float holds, and `fit_temperature` looks no
# further than 5 times either way.
Temperature = Annotated[float, Field(ge=1 / 20, le=20, allow_inf_nan=False)]


class Calibration(BaseModel):
    """Temperature by voting method (Guo et al., 2017), fitted out of sample on voted scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: dict[VoteMethod, Temperature] = Field(default_factory=dict)

    def apply(self, voted: np.ndarray, *, kind: Kind, method: VoteMethod) -> np.ndarray:
        """Calibrated scores of `voted` `(..., labels)`; a method without a fit is left as it is."""
        temperature = self.temperature.get(method)
        scores = np.asarray(voted, dtype=np.float64)
        if temperature is None:
            return scores
        if kind == "multi":
            clipped = np.clip(scores, NO_PROOF, 1 - NO_PROOF)
            return np.asarray(1 / (1 + (1 / clipped - 1) ** (1 / temperature)))
        powered = np.maximum(scores, FLOOR) ** (1 / temperature)
        return np.asarray(powered / powered.sum(-1, keepdims=True))


def fit_temperature(voted: np.ndarray, target: np.ndarray) -> float:
    """Temperature of least negative log-likelihood: `voted` `(tracks, labels)`, `target` classes,
    or, where a track may have several labels, zeros and ones `(tracks, labels)`.

    A plain scan: one number, a few hundred tracks, and the same answer on every machine.
    """
    grid = np.exp(np.linspace(np.log(0.2), np.log(5.0), 241))
    if target.ndim == 2:
        clipped = np.clip(voted, NO_PROOF, 1 - NO_PROOF)
        wrong = np.log(1 / clipped - 1) * np.where(target > 0, 1, -1)  # log odds against the truth
        return float(grid[int(np.argmin([np.logaddexp(0, wrong / t).mean() for t in grid]))])
    rows = np.arange(len(target))
    logged = np.log(np.maximum(voted, FLOOR))
    losses = []
    for temperature in grid:
        powered = np.exp(logged / temperature)
        chosen = powered[rows, target] / powered.sum(1)
        losses.append(-np.log(chosen).mean())
    return float(grid[int(np.argmin(losses))])


def bins(confidence: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each of `BINS` equally wide bins that a score falls into: its number, and which scores do."""
    placed = np.minimum((confidence * BINS).astype(int), BINS - 1)
    for number in range(BINS):
        inside = placed == number
        if inside.any():
            yield number, inside


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over equally wide bins, weighted by their size."""
    error = 0.0
    for _, inside in bins(confidence):
        gap = abs(float(confidence[inside].mean()) - float(correct[inside].mean()))
        error += gap * float(inside.mean())
    return error


def chance_calibration_error(confidence: np.ndarray, *, draws: int = 1_000, seed: int = 0) -> float:
    """What `expected_calibration_error` comes to by chance alone, where confidence is what it says.

    Its mean when each track is right with just that probability (the consistency resampling of
    Broecker and Smith, 2007): few tracks never show an error of 0.
    """
    rng = np.random.default_rng(seed)
    errors = [
        expected_calibration_error(confidence, rng.random(len(confidence)) < confidence)
        for _ in range(draws)
    ]
    return float(np.mean(errors))


def threshold_for_coverage(confidence: np.ndarray, coverage: float) -> float:
    """Confidence that the most confident `coverage` of tracks reach or exceed."""
    return float(np.quantile(confidence, 1 - coverage))

"""What a model answers: named heads, each with its labels and its kind."""

import unicodedata
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from model.calibration import Calibration, Kind
from worker.settings import VoteMethod

CONTROL = frozenset({"Cc", "Zl", "Zp"})  # categories of characters that steer a terminal or a log


def _plain(label: str) -> str:
    if any(unicodedata.category(character) in CONTROL for character in label):
        raise ValueError("a label has a control character")
    return label


Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain)]


class Head(BaseModel):
    """One answer of a model.

    `single` heads give probabilities over mutually exclusive labels (softmax), `multi` heads one
    probability a label (sigmoid). `categories` says of each label what it is about: genre, mood,
    instrument, era, voice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")
    kind: Kind
    labels: tuple[Label, ...] = Field(min_length=1, max_length=4_096)
    categories: tuple[Label, ...]
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _labels_are_a_set(self) -> "Head":
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands twice")
        if len(self.categories) != len(self.labels):
            raise ValueError("every label needs its category")
        return self

    def calibrate(self, voted: np.ndarray, method: VoteMethod) -> np.ndarray:
        """Calibrated scores of voted scores `(labels,)`; applied after the vote, by its method."""
        return self.calibration.apply(voted, kind=self.kind, method=method)

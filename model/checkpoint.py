"""The file that an interrupted training run goes on from."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.device import Precision
from model.folder import write_whole
from worker.errors import CheckpointInvalid


@dataclass(frozen=True)
class State:
    """What a step changes."""

    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision

    def as_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def load(self, stored: dict[str, Any]) -> None:
        self.network.load_state_dict(stored["network"])
        self.average.load_state_dict(stored["average"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.precision.scaler.load_state_dict(stored["scaler"])


@dataclass(frozen=True)
class Checkpoint:
    """The file that a run goes on from. `run` tells its run from any other."""

    path: Path
    run: str

    def keep(self, part: str, step: int, state: State) -> None:
        """Both parts' states are in one file, so that the rehearsal isn't lost in the final fit."""
        new: dict[str, Any] = {"run": self.run, "parts": {}}
        stored = self._read() if self.path.is_file() else new
        stored["parts"][part] = {"step": step, **state.as_dict()}
        packed = BytesIO()
        torch.save(stored, packed)  # into a file that can't grow it says nothing of why
        write_whole(self.path, packed.getbuffer())

    def restore(self, part: str, state: State) -> int:
        """Load the part's state and say how many steps are done; 0 where it hasn't begun."""
        stored = self._read()["parts"].get(part) if self.path.is_file() else None
        if stored is None:
            return 0
        state.load(stored)
        return int(stored["step"])

    def require(self) -> None:
        """CheckpointInvalid unless the file is there and belongs to this run."""
        if not self.path.is_file():
            raise CheckpointInvalid(f"there is no {self.path} to resume from; leave out --resume")
        self._read()

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            stored = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises many kinds over a damaged file
            raise CheckpointInvalid(f"{self.path} is damaged: {error}") from error
        if not isinstance(stored, dict) or stored.get("run") != self.run:
            raise CheckpointInvalid(
                f"{self.path} is of another data set, recipe or seed; leave out --resume"
            )
        return stored

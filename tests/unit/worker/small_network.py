"""A network that the tests of the batcher and its engine can see through and hold up."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Answer:
    probabilities: dict[str, Tensor]
    embedding: Tensor


class SmallNet(nn.Module):
    """A real network, small: one convolution, mean and maximum over time, one dense layer.

    `order` holds the first samples of all windows as they come, `dtypes` in what they were
    computed; `go` holds it up when cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.conv = nn.Conv1d(1, 8, 9, stride=4)
            self.dense = nn.Linear(16, 3)
        self.order: list[list[float]] = []
        self.dtypes: set[torch.dtype] = set()
        self.go = threading.Event()
        self.go.set()

    @property
    def sizes(self) -> list[int]:
        """Windows by batch."""
        return [len(batch) for batch in self.order]

    def forward(self, samples: Tensor) -> Answer:
        self.order.append(samples[:, 0].tolist())
        self.misbehave(samples)
        assert self.go.wait(60)
        features = self.conv(samples.unsqueeze(1)).relu()
        self.dtypes.add(features.dtype)
        embedding = torch.cat([features.amax(-1), features.mean(-1)], 1)
        return Answer({"genre": self.dense(embedding).float().softmax(-1)}, embedding.float())

    def misbehave(self, samples: Tensor) -> None:
        pass

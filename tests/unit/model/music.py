"""Sound made of numbers for the model's tests: the same on every machine, and like music enough."""

import numpy as np
import torch
from torch import Tensor

RATE_HZ = 16_000
WINDOW = 3 * RATE_HZ


def chords(count: int = 3, *, seed: int = 0) -> Tensor:
    """`(count, WINDOW)` windows of decaying chords over a beat of noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(WINDOW) / RATE_HZ
    windows = []
    for _ in range(count):
        root_hz, tempo_s = rng.uniform(80, 330), rng.uniform(0.25, 0.7)
        within = time_s % tempo_s
        tones = sum(
            np.sin(2 * np.pi * root_hz * ratio * harmonic * time_s) / harmonic
            for ratio in (1.0, 1.26, 1.5)
            for harmonic in (1, 2, 3, 4)
        )
        beat = rng.normal(size=WINDOW) * np.exp(-within / 0.03)
        windows.append(0.1 * tones * np.exp(-within / 0.4) + 0.15 * beat)
    return torch.from_numpy(np.stack(windows).astype(np.float32))

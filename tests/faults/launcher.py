"""Starts a real worker on a network with a fault: `python -m tests.faults.launcher TRICK`.

A device that hangs or fails can't be had from outside, so the bundle's network is wrapped; all else
is the worker as it ships. Marked tracks are those of the audio server's `marked` fault: louder than
any music. The tricks: `hang` for ever at every marked window, `hang-once` a process, `fail` at
every one, `break` at the first and at all windows after it. What hangs says `HANGS` in the log.
"""

import sys
import threading
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.bundle import Bundle
from worker.app import run_worker
from worker.settings import load

MARK = 0.9
HANGS = "the device hangs on a marked window"
BREAKS = "CUDA error: an illegal memory access was encountered"


class Faulty(nn.Module):
    """The network, with a fault at marked windows `(windows, window_samples)`."""

    def __init__(self, network: nn.Module, trick: str) -> None:
        super().__init__()
        self.network = network
        self.kind, _, once = trick.partition("-")
        self.left = 1 if once else sys.maxsize
        self.broken = False

    def forward(self, samples: Tensor) -> object:
        marked = self.left > 0 and bool((samples.abs().mean(dim=1) > MARK).any())
        self.broken |= marked and self.kind == "break"
        if self.broken:
            raise torch.AcceleratorError(BREAKS)
        if marked:
            self.left -= 1
            if self.kind == "hang":
                print(HANGS, flush=True)
                threading.Event().wait()
            raise RuntimeError("the device failed on a marked window")
        return self.network(samples)


def main(trick: str) -> int:
    load_sound = Bundle.load

    def load_faulty(path: str | None = None) -> Bundle:
        bundle = load_sound(path)
        return replace(bundle, network=Faulty(bundle.network, trick))  # type: ignore[arg-type]

    Bundle.load = load_faulty  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    return run_worker(load())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

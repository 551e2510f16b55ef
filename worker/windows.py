"""Windows: how a track is cut, streaming, and which windows are silent.

A window starts every hop, from the first sample on. The tail is the audio that no window has
reached: it gets a window of its own, the last `window_samples` of the track, when it is at least
`min_tail_samples` long. A track shorter than a window is repeated until it fills one.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]  # shape (samples,)
Windows = NDArray[np.float32]  # shape (windows, window_samples)

# Of a window without any sound; the decibels of zero would be minus infinity.
SILENCE_FLOOR_DBFS = -200.0


class WindowCutter:
    """Cuts one track that arrives in pieces; how it is divided into pieces changes nothing.

    Parameters
    ----------
    window_samples
        Length of a window.
    hop_samples
        From the start of a window to the start of the next; larger than a window skips audio,
        smaller lets windows overlap.
    min_tail_samples
        A tail shorter than this is dropped, unless it is the whole track.
    """

    def __init__(self, window_samples: int, hop_samples: int, min_tail_samples: int) -> None:
        if window_samples < 1 or hop_samples < 1:
            raise ValueError("window_samples and hop_samples must be at least 1")
        self._window = window_samples
        self._hop = hop_samples
        self._min_tail = min_tail_samples
        self._kept = np.empty(0, np.float32)
        self._pieces: list[Samples] = []  # what follows the kept; joined a window's worth at once
        self._joined = 0
        self._seen = 0
        self._next_start = 0

    def push(self, samples: Samples) -> Windows:
        """The windows that `samples` complete; a view, so use it before the next call."""
        self._seen += samples.size
        self._pieces.append(samples)
        if self._seen < min(self._next_start, self._joined) + self._window:
            return np.empty((0, self._window), np.float32)
        self._join()
        windows = self._cut()
        self._forget()
        return windows

    def finish(self) -> Windows:
        """The track has ended: one more window, if the tail earns it."""
        self._join()
        if 0 < self._seen < self._window:
            return np.resize(self._kept, (1, self._window))
        last_end = self._next_start - self._hop + self._window
        tail = self._seen - max(self._next_start, last_end)
        if tail <= 0 or tail < self._min_tail:
            return np.empty((0, self._window), np.float32)
        return self._kept[np.newaxis, -self._window :]

    def _join(self) -> None:
        self._kept = np.concatenate((self._kept, *self._pieces))
        self._pieces.clear()
        self._joined = self._seen

    def _cut(self) -> Windows:
        first = self._next_start - (self._seen - self._kept.size)
        if self._kept.size - first < self._window:
            return np.empty((0, self._window), np.float32)
        every = np.lib.stride_tricks.sliding_window_view(self._kept[first:], self._window)
        windows = every[:: self._hop]
        self._next_start += len(windows) * self._hop
        return windows

    def _forget(self) -> None:
        """Keep what a coming window or the tail's may need."""
        needed = self._seen - min(self._next_start, self._seen - self._window)
        self._kept = self._kept[-needed:]


def cut(pieces: Iterable[Samples], cutter: WindowCutter) -> Iterator[Windows]:
    """Cut a track from its first piece to its tail."""
    for samples in pieces:
        yield cutter.push(samples)
    yield cutter.finish()


def loudness_dbfs(windows: Windows) -> NDArray[np.float32]:
    """Root mean square of each window in decibels of full scale, shape (windows,)."""
    power: NDArray[np.float32] = np.einsum("ij,ij->i", windows, windows) / windows.shape[1]
    floor = np.float32(10 ** (SILENCE_FLOOR_DBFS / 10))
    return np.float32(10) * np.log10(np.maximum(power, floor))


def is_silent(windows: Windows, silence_dbfs: float) -> NDArray[np.bool_]:
    """Whether each window lies below `silence_dbfs` and doesn't vote, shape (windows,)."""
    return loudness_dbfs(windows) < silence_dbfs

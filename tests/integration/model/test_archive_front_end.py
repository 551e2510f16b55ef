"""The front end of archive bundles, on audio, gives what the archive's log-mels are.

The archive's frames are columns of a picture of the whole clip: each is the nearest frame of a
spectrogram with a hop of 512 samples, so that they stand 914 samples apart on average and up to
256 off. The codec of the excerpts takes its part of the likeness too.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.datasets import load
from model.datasets.logmels import logmel_of
from model.frontend import LogMel, floored, normalise
from model.logmel_cnn import ARCHIVE_FRONT_END
from worker.decode.decoder import decode_samples

RATE_HZ, FRAMES = ARCHIVE_FRONT_END.sample_rate_hz, ARCHIVE_FRONT_END.frames
WINDOW_SAMPLES = 3 * RATE_HZ
PICTURE_HOP = 512
PICTURE_COLUMNS, MARGIN_COLUMNS = 724.28, 1.85  # read off the excerpts


@pytest.fixture(scope="module")
def songs(
    shared_data: Path,
) -> list[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    """Samples of whole clips, and their log-mels `(frames, mels)` in the archive."""
    archive = load(shared_data / "gtzan" / "logmel30s.npz")
    assert archive.logmels is not None
    rows = {clip.name: row for row, clip in enumerate(archive.clips)}
    files = sorted((shared_data / "gtzan" / "corpus").glob("*/*.x30.opus"))[::3]
    if not files:
        pytest.skip("no whole clips in ../shared/gtzan/corpus")
    return [
        (
            decode_samples(file, RATE_HZ),
            archive.logmels.values[rows[file.name.removesuffix(".x30.opus")]].T,
        )
        for file in files
    ]


def columns(samples: NDArray[np.float32]) -> NDArray[np.intp]:
    """Frame of the spectrogram by frame of the archive."""
    spectrogram = len(samples) // PICTURE_HOP + 1
    places = (np.arange(700) + MARGIN_COLUMNS) * spectrogram / PICTURE_COLUMNS
    return np.asarray(np.floor(places), dtype=np.intp)


def windows(stored: NDArray[np.uint8], first: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Every eighth window of the archive's, normalised, and its first frame."""
    for begin in range(first, 600, 8 * FRAMES):
        yield begin, normalise(torch.from_numpy(stored[begin : begin + FRAMES].astype(np.float32)))


def likeness(made: torch.Tensor, stored: torch.Tensor) -> float:
    return float(np.corrcoef(made.numpy().ravel(), stored.numpy().ravel())[0, 1])


def test_its_log_mels_are_the_archives_at_the_archives_own_frames(
    songs: list[tuple[NDArray[np.float32], NDArray[np.uint8]]],
) -> None:
    found = []
    for samples, stored in songs:
        fine = logmel_of(samples, ARCHIVE_FRONT_END.model_copy(update={"hop": PICTURE_HOP}))
        made = torch.from_numpy(fine[columns(samples)].astype(np.float32))
        made = floored(made, ARCHIVE_FRONT_END.range_db)
        found.append(likeness(made, torch.from_numpy(stored[:700].astype(np.float32))))
    assert np.median(found) >= 0.99
    assert min(found) >= 0.975


def test_a_window_of_audio_is_what_the_network_learnt_from(
    songs: list[tuple[NDArray[np.float32], NDArray[np.uint8]]],
) -> None:
    front_end = LogMel(ARCHIVE_FRONT_END)
    found = []
    for samples, stored in songs:
        starts = columns(samples) * PICTURE_HOP
        for begin, window in windows(stored, 4):
            cut = samples[starts[begin] : starts[begin] + WINDOW_SAMPLES]
            found.append(likeness(front_end(torch.from_numpy(cut[None]))[0], window))
    assert np.median(found) >= 0.975
    assert min(found) >= 0.95

"""The front end of archive bundles, on audio, gives what the archive's log-mels are."""

from pathlib import Path

import numpy as np
import pytest

from model.datasets import load
from model.datasets.logmels import logmel_of, samples_of
from model.logmel_cnn import ARCHIVE_FRONT_END

FRAMES = slice(2, 150)  # away from the edge, where the clip's padding is
BANDS = slice(0, 110)  # the excerpts' codec keeps little above


def test_log_mels_of_audio_are_those_of_the_archive(shared_data: Path) -> None:
    archive = load(shared_data / "gtzan" / "logmel30s.npz")
    assert archive.logmels is not None
    rows = {clip.name: row for row, clip in enumerate(archive.clips)}
    whole = sorted((shared_data / "gtzan" / "corpus").glob("*/*.x30.opus"))[::7]
    if not whole:
        pytest.skip("no whole clips in ../shared/gtzan/corpus")
    for file in whole:
        samples = samples_of(file, ARCHIVE_FRONT_END.sample_rate_hz)[: 22_050 * 8]
        row = rows[file.name.removesuffix(".x30.opus")]
        stored = archive.logmels.values[row].T[FRAMES, BANDS].ravel()
        # The archive begins a frame or two into the clip.
        likeness = [
            np.corrcoef(made[FRAMES, BANDS].astype(np.float64).ravel(), stored)[0, 1]
            for made in (
                logmel_of(samples[start:], ARCHIVE_FRONT_END) for start in range(1_300, 1_600, 50)
            )
        ]
        assert max(likeness) >= 0.95, file.name

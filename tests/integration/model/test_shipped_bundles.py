"""The shipped bundles through the worker's own decoder, windows and vote."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import Bundle, shipped
from tests.audio import encode
from worker.decode.decoder import decode_samples
from worker.vote import Verdict, vote
from worker.windows import WindowCutter, cut

# Container, codec, rate and channels that the same music comes in.
FORMS = [
    ("wav", "pcm_s16le", 44_100, 2),
    ("wav", "pcm_f32le", 16_000, 1),
    ("flac", "flac", 48_000, 2),
    ("ogg", "vorbis", 44_100, 2),
    ("ogg", "libopus", 48_000, 1),
    ("mp3", "libmp3lame", 44_100, 1),
    ("mp3", "libmp3lame", 32_000, 2),
    ("ipod", "aac", 44_100, 2),
    ("matroska", "aac", 48_000, 1),
    ("aiff", "pcm_s16be", 22_050, 2),
]


@pytest.fixture(scope="module")
def tracks(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Of each of three tracks the same 21 s in every form."""
    folder = tmp_path_factory.mktemp("forms")
    made = []
    for track in sorted((shared_data / "audio" / "tracks").glob("*.mp3"))[:3]:
        parts = {
            rate_hz: decode_samples(track, rate_hz)[40 * rate_hz : 61 * rate_hz, np.newaxis]
            for rate_hz in {rate_hz for *_, rate_hz, _ in FORMS}
        }
        made.append(
            [
                encode(
                    folder / f"{track.stem}-{number}",
                    np.repeat(parts[rate_hz], channels, axis=1),
                    rate_hz,
                    muxer=muxer,
                    codec=codec,
                )
                for number, (muxer, codec, rate_hz, channels) in enumerate(FORMS)
            ]
        )
    return made


@pytest.fixture(scope="module", params=shipped())
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.load(request.param)


def tagged(bundle: Bundle, path: Path) -> Verdict:
    """The tags of a file, as the worker gives them."""
    cutter = WindowCutter(bundle.window_samples, bundle.window_samples, bundle.sample_rate_hz)
    windows = np.concatenate(list(cut([decode_samples(path, bundle.sample_rate_hz)], cutter)))
    with torch.inference_mode():
        output = bundle.network(torch.from_numpy(windows))
    said = {name: scores.numpy() for name, scores in output.probabilities.items()}
    everyone = np.ones(len(output.embedding), bool)
    return vote(said, everyone, bundle.heads, uncertain_below=bundle.uncertain_threshold)


def test_genres_do_not_depend_on_container_rate_or_channels(
    bundle: Bundle, tracks: list[list[Path]]
) -> None:
    for files in tracks:
        best, heard, leads = [], [], []
        for file in files:
            verdict = tagged(bundle, file)
            best.append(verdict.tags[0].label)
            by_label = {(tag.head, tag.label): tag.score for tag in verdict.tags}
            heard.append([by_label[key] for key in sorted(by_label)])
            leads.append(verdict.tags[0].score - verdict.tags[1].score)
        if min(leads) > 0.1:  # else two genres are as good as each other
            assert len(set(best)) == 1, dict(zip(FORMS, best, strict=True))
        assert np.ptp(np.array(heard), axis=0).max() < 0.08

"""The published network itself: needs its wheel, which pip fetches once a session."""

from pathlib import Path

import librosa
import numpy as np
import pytest
import torch

from model.bundle import Bundle
from model.frontend import LogMel, LogMelConfig
from model.musicnn import (
    LABELS,
    Network,
    as_published,
    fetch_wheel,
    folded,
    licence,
    read_checkpoint,
)
from tests.integration.model.conftest import Command
from tests.unit.model.test_frontend import librosas
from worker.decode.decoder import decode_samples
from worker.errors import BundleInvalid

# From the wheel's own description, for its example with the network `MTT_musicnn`.
PUBLISHED = [
    "techno",
    "electronic",
    "synth",
    "fast",
    "beat",
    "drums",
    "no vocals",
    "no vocal",
    "dance",
    "ambient",
]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return fetch_wheel(tmp_path_factory.mktemp("musicnn"))
    except BundleInvalid as error:
        pytest.skip(f"no package index in reach: {error}")


@pytest.fixture(scope="session")
def example(shared_data: Path) -> np.ndarray:
    """Samples of the example that the wheel's description speaks of."""
    folder = shared_data / "audio" / "odd" / "musicnn" / "audio"
    return decode_samples(next(folder.glob("joram-*.mp3")), 16_000)


def published_patches(samples: np.ndarray) -> torch.Tensor:
    """Log-mels as the wheel's own code cuts them: one spectrogram, a patch every 187 frames."""
    mel = librosa.feature.melspectrogram(y=samples, sr=16_000, n_fft=512, hop_length=256, n_mels=96)
    logmel = np.log10(10_000 * mel.T + 1)
    starts = range(0, len(logmel) - 186, 187)
    return torch.from_numpy(np.stack([logmel[at : at + 187] for at in starts]))


def test_the_published_tags_come_out(wheel: Path, example: np.ndarray) -> None:
    network: Network = "MTT_musicnn"
    bundle = folded(read_checkpoint(wheel, network), network)
    with torch.inference_mode():
        tags = bundle.network.logits(published_patches(example))[0]["tags"].sigmoid().mean(0)

    best = tags.argsort(descending=True)[:10]
    assert [LABELS[network][index] for index in best] == PUBLISHED


@pytest.mark.parametrize("network", ["MSD_musicnn", "MTT_musicnn"])
def test_the_folded_network_equals_the_unfolded_one(
    wheel: Path, example: np.ndarray, network: Network
) -> None:
    checkpoint = read_checkpoint(wheel, network)
    tagger = folded(checkpoint, network).network
    patches = published_patches(example)[:5]
    with torch.inference_mode():
        logits, _ = as_published(checkpoint, patches)
        folded_logits, _ = tagger.logits(patches)

    torch.testing.assert_close(folded_logits["tags"].sigmoid(), logits.sigmoid(), atol=1e-5, rtol=0)


def test_most_filters_are_dead_and_gone(wheel: Path) -> None:
    bundle = folded(read_checkpoint(wheel, "MSD_musicnn"))

    assert [branch["filters"] for branch in bundle.config["branches"]] == [23, 14, 3, 7, 17]
    assert sum(weight.numel() for weight in bundle.network.parameters()) < 220_000


def test_the_front_end_equals_librosas_on_real_audio(shared_data: Path) -> None:
    front_end = LogMel(LogMelConfig())
    for track in sorted((shared_data / "audio" / "tracks").glob("*.mp3"))[:3]:
        samples = decode_samples(track, 16_000)
        for start_s in (0, 30, 60):
            window = samples[start_s * 16_000 :][: 3 * 16_000]
            made = front_end(torch.from_numpy(window.copy())[None])[0].numpy()
            np.testing.assert_allclose(made, librosas(window, front_end.config), atol=1e-3)


def test_importing_gives_a_bundle_with_its_licence(
    wheel: Path, tmp_path: Path, done: Command
) -> None:
    done("import", "musicnn", "--out", tmp_path / "msd")

    bundle = Bundle.load(tmp_path / "msd")
    [tags] = bundle.heads
    assert tags.labels == LABELS["MSD_musicnn"]
    assert (tmp_path / "msd" / "LICENSE.musicnn.md").read_text() == licence(wheel)
    assert "Universitat Pompeu Fabra" in (tmp_path / "msd" / "README.md").read_text()


def test_importing_overwrites_no_folder_of_something_else(tmp_path: Path, refused: Command) -> None:
    (tmp_path / "README.md").write_text("mine")

    assert refused("import", "musicnn", "--out", tmp_path) == (
        f"timbre: {tmp_path} is no bundle's folder, and its README.md would be overwritten: "
        "name another\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_without_a_package_index_a_sentence_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Command
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    told = refused("import", "musicnn", "--out", tmp_path / "msd")

    assert told.startswith("timbre: pip could not fetch musicnn")
    assert not any((tmp_path / "msd").iterdir())

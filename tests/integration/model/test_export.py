"""`timbre model export --onnx`, run as people run it, and what ONNX Runtime makes of the file."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model.bundle import Bundle
from model.datasets import load
from model.logmel_cnn import LogMelCnnConfig, MemberConfig
from model.train import Recipe, train
from tests import collections_of_music as music
from tests.integration.model.conftest import Command
from worker.decode.decoder import decode_samples

RECIPE = Recipe(
    passes=2,
    batch=8,
    network=LogMelCnnConfig(
        channels=(8, 16),
        members=(MemberConfig(balance=0.75), MemberConfig(kind="filters", balance=0.5)),
    ),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small bundle from scratch, its front end that of the log-mel archive."""
    folder = tmp_path_factory.mktemp("trained")
    train(load(music.archive(folder / "a.npz")), folder / "bundle", recipe=RECIPE)
    return str(folder / "bundle")


@pytest.fixture(scope="module", params=["default", "trained"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, done: Command
) -> tuple[Bundle, Path]:
    name = "default" if request.param == "default" else request.getfixturevalue("trained")
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    done("export", name, "--onnx", file)
    return Bundle.load(name), file


def test_onnx_runtime_answers_as_pytorch_does_on_real_audio(
    exported: tuple[Bundle, Path], shared_data: Path
) -> None:
    bundle, file = exported
    track = sorted((shared_data / "audio" / "tracks").glob("*.mp3"))[0]
    samples = decode_samples(track, bundle.sample_rate_hz)[: 20 * bundle.window_samples]
    windows = samples.reshape(-1, bundle.window_samples)
    windows[3] *= 0.01
    windows[4, : bundle.window_samples // 2] = 0.0
    windows[5] = 0.0
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for batch in (windows[:1], windows):
        with torch.inference_mode():
            expected = bundle.network(torch.from_numpy(batch.copy()))
        answered = dict(zip(names, session.run(None, {"samples": batch}), strict=True))
        for head, scores in expected.probabilities.items():
            np.testing.assert_allclose(answered[head], scores.numpy(), atol=1e-4)
        np.testing.assert_allclose(
            answered["embedding"], expected.embedding.numpy(), atol=1e-3, rtol=1e-3
        )


def test_the_file_says_which_model_it_is(exported: tuple[Bundle, Path]) -> None:
    bundle, file = exported
    facts = {entry.key: entry.value for entry in onnx.load(file).metadata_props}

    assert facts["version"] == bundle.version
    assert json.loads(facts["labels.genre"]) == list(bundle.heads[0].labels)


def test_what_is_no_bundle_is_refused(tmp_path: Path, refused: Command) -> None:
    told = refused("export", tmp_path / "none", "--onnx", tmp_path / "model.onnx")

    assert "neither a folder nor a shipped bundle" in told
    assert not (tmp_path / "model.onnx").exists()

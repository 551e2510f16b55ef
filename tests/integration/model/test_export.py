from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model.bundle import Bundle
from model.export import export_onnx
from worker.decoder import decode_samples


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(Bundle.load(), tmp_path_factory.mktemp("onnx") / "default.onnx")


def test_onnx_runtime_answers_as_pytorch_does_on_real_audio(
    exported: Path, shared_data: Path
) -> None:
    bundle = Bundle.load()
    track = sorted((shared_data / "audio" / "tracks").glob("*.mp3"))[0]
    samples = decode_samples(track, bundle.sample_rate_hz)[: 20 * bundle.window_samples]
    windows = samples.reshape(-1, bundle.window_samples)
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
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


def test_the_file_says_which_model_it_is(exported: Path) -> None:
    bundle = Bundle.load()
    facts = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}

    assert facts["version"] == bundle.version
    assert '"blues"' in facts["labels.genre"]

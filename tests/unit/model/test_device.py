import pytest
import torch

from model.device import Precision, choose_device
from worker.errors import SettingsInvalid


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_absent_is_refused_with_what_to_do() -> None:
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(SettingsInvalid, match="TIMBRE_BATCH__DEVICE, or --device"):
        choose_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_emulates_bfloat16_learns_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    with pytest.warns(UserWarning, match="CUDA is not available"):
        assert Precision(torch.device("cuda")).dtype is torch.float16

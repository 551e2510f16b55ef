import pytest
import torch

from model.device import choose_device
from worker.errors import SettingsInvalid


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_absent_is_refused_with_what_to_do() -> None:
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(SettingsInvalid, match="TIMBRE_BATCH__DEVICE, or --device"):
        choose_device("cuda")

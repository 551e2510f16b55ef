"""Which device a network runs on."""

import torch

from worker.errors import SettingsInvalid


def choose_device(wanted: str) -> torch.device:
    """The device of `wanted`: auto, cpu or cuda.

    Raises SettingsInvalid for any other, and for cuda where there is none.
    """
    if wanted not in {"auto", "cpu", "cuda"}:
        raise SettingsInvalid(f"the device {wanted!r} is none of auto, cpu and cuda")
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "cuda":
        raise SettingsInvalid(
            "The device is set to cuda (TIMBRE_BATCH__DEVICE, or --device), but PyTorch finds no "
            "CUDA device; check the driver and that the container may use the GPU, or set auto or "
            "cpu."
        )
    return torch.device("cpu")

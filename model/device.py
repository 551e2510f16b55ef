"""Which device a network runs on, and in which precision it learns there."""

import torch
from torch import Tensor, nn

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


class Precision:
    """Mixed precision where the device has it: bfloat16, or float16 with scaled gradients."""

    def __init__(self, device: torch.device) -> None:
        self.device = device.type
        self.dtype = torch.bfloat16
        self.enabled = True
        if self.device == "cpu":
            able = torch.cpu.get_capabilities()
            self.enabled = bool(able.get("amx_bf16") or able.get("avx512_bf16"))
        elif not torch.cuda.is_bf16_supported(including_emulation=False):
            self.dtype = torch.float16
        self.scaler = torch.GradScaler(self.device, enabled=self.dtype is torch.float16)

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.enabled)

    def step(
        self, loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        """Backwards, gradients clipped, one step."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

"""A bundle as one ONNX file, front end included: samples in, probabilities and embedding out."""

import copy
import json
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.bundle import Bundle
from model.frontend import LogMel
from model.network import Output

OPSET = 18


class ConvolvedLogMel(LogMel):
    """The same log-mels with the Fourier transform as a convolution, which every runtime has.

    Takes some hundred times the arithmetic of the fast transform, so it is for export only.
    """

    basis: Tensor

    def __init__(self, front_end: LogMel) -> None:
        super().__init__(front_end.config)
        size = self.config.n_fft
        angles = torch.outer(torch.arange(size // 2 + 1), torch.arange(size)).double()
        angles *= 2 * torch.pi / size
        waves = torch.cat([angles.cos(), angles.sin()]) * self.window.double()
        self.register_buffer("basis", waves.float().unsqueeze(1), persistent=False)

    def power(self, samples: Tensor) -> Tensor:
        padded = self.padded(samples).unsqueeze(1)
        real, imaginary = functional.conv1d(padded, self.basis, stride=self.config.hop).chunk(2, 1)
        power: Tensor = (real.square() + imaginary.square()).transpose(1, 2)
        return power


class _Flat(nn.Module):
    """The network with a tuple for its answer, heads in order and then the embedding."""

    def __init__(self, network: nn.Module, heads: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.names = heads

    def forward(self, samples: Tensor) -> tuple[Tensor, ...]:
        output: Output = self.network(samples)
        return (*(output.probabilities[name] for name in self.names), output.embedding)


def export_onnx(bundle: Bundle, path: Path) -> None:
    """Write `bundle` to `path` for ONNX Runtime and others; any number of windows at a time.

    The file's input is `samples` `(windows, window_samples)`, its outputs are named after the
    heads, and `embedding`. Labels and version stand in its metadata.
    """
    network = copy.deepcopy(bundle.network)
    network.front_end = ConvolvedLogMel(network.front_end)
    heads = tuple(head.name for head in bundle.heads)
    program = _traced(_Flat(network, heads).eval(), bundle.window_samples, [*heads, "embedding"])
    path.parent.mkdir(parents=True, exist_ok=True)
    model = program.model_proto
    facts = {
        "name": bundle.name,
        "version": bundle.version,
        "sample_rate_hz": str(bundle.sample_rate_hz),
        **{f"labels.{head.name}": json.dumps(head.labels) for head in bundle.heads},
    }
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)


def _traced(network: nn.Module, samples: int, outputs: list[str]) -> torch.onnx.ONNXProgram:
    example = torch.zeros(2, samples)
    windows = torch.export.Dim("windows", min=1)
    remarks = logging.getLogger("torch.onnx")
    level = remarks.level
    # The exporter's own remarks on its internals are nothing that a user could act on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remarks.setLevel(logging.ERROR)
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["samples"],
            output_names=outputs,
            dynamic_shapes={"samples": {0: windows}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        remarks.setLevel(level)
    assert program is not None
    return program

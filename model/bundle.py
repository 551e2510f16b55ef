"""A model as a folder: `model.safetensors`, `model.json` and its card, `README.md`.

Loading checks everything and executes nothing: weights are plain tensors, the network's kind is
looked up in a fixed list, every tensor must have the name, shape and type that the kind expects.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.folder import make_folder, write_whole
from model.heads import Head
from model.invalid import first_fault
from model.network import Tagger, build
from worker.errors import BundleInvalid, SettingsInvalid

SHIPPED = Path(__file__).parent / "bundles"
WEIGHTS, MANIFEST, CARD = "model.safetensors", "model.json", "README.md"
MAX_WEIGHTS_BYTES = 512 * 2**20
MAX_HEADER_BYTES = 2**20  # of the weights: a few dozen tensors take some KB
MAX_MANIFEST_BYTES = 2 * 2**20
SHORTEST_WINDOW_S, LONGEST_WINDOW_S = 0.1, 60.0
MAX_DIMENSIONS = 4
MAX_VALUES = 2**24  # of one tensor, for one window: 64 MiB; published networks have a seventh
MAX_GFLOP = 100  # for one window: seconds on a processor; published networks have 3


class NetworkSection(BaseModel):
    """Which network, in which shape; the front end is part of it."""

    model_config = ConfigDict(extra="forbid")

    kind: str = Field(max_length=64)
    config: dict[str, JsonValue]


class Manifest(BaseModel):
    """`model.json`. All but name, version, training and figures decides what the model answers."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    version: str = Field("", pattern=r"^([0-9a-f]{16})?$")
    sample_rate_hz: int = Field(ge=4_000, le=48_000)
    window_s: float = Field(ge=SHORTEST_WINDOW_S, le=LONGEST_WINDOW_S)
    embedding_dim: int = Field(ge=1, le=256)
    heads: list[Head] = Field(min_length=1, max_length=16)
    uncertain_threshold: float = Field(ge=0, le=1)
    short_track: Literal["tile"] = "tile"
    network: NetworkSection
    training: dict[str, JsonValue] = Field(default_factory=dict)
    figures: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _heads_can_be_told_apart(self) -> "Manifest":
        names = [head.name for head in self.heads]
        if len(set(names)) != len(names):
            raise ValueError("two heads have one name")
        # A network keeps its heads by name, where some names already mean something else.
        taken = [name for name in names if hasattr(nn.ModuleDict(), name)]
        if taken:
            raise ValueError(f"a head can't be called {taken[0]!r}: choose another name")
        return self


@dataclass(frozen=True)
class Bundle:
    """A loaded model. `training` and `figures` are for people and never change an answer."""

    name: str
    heads: tuple[Head, ...]
    sample_rate_hz: int
    window_s: float
    embedding_dim: int
    uncertain_threshold: float
    kind: str
    config: dict[str, Any]
    network: Tagger = field(repr=False)
    training: dict[str, Any] = field(default_factory=dict, repr=False)
    figures: dict[str, Any] = field(default_factory=dict, repr=False)
    version: str = ""

    @property
    def window_samples(self) -> int:
        return round(self.window_s * self.sample_rate_hz)

    @classmethod
    def load(cls, path: Path | str | None = None) -> "Bundle":
        """The bundle at `path`, or the shipped one of that name; the default where None.

        Raises BundleInvalid, saying what is wrong, for anything but a whole and sound bundle.
        """
        folder = _resolve(path)
        manifest = _read_manifest(folder)
        tensors = _read_tensors(folder / WEIGHTS)
        _check_values(folder, tensors)
        if _version(manifest, tensors) != manifest.version:
            raise BundleInvalid(
                f"{folder} is damaged or was edited: its content is not version "
                f"{manifest.version!r}; fetch or train it again"
            )
        return cls(
            name=manifest.name,
            heads=tuple(manifest.heads),
            sample_rate_hz=manifest.sample_rate_hz,
            window_s=manifest.window_s,
            embedding_dim=manifest.embedding_dim,
            uncertain_threshold=manifest.uncertain_threshold,
            kind=manifest.network.kind,
            config=dict(manifest.network.config),
            network=_network(folder, manifest, tensors),
            training=dict(manifest.training),
            figures=dict(manifest.figures),
            version=manifest.version,
        )

    def save(self, path: Path, *, card: str) -> "Bundle":
        """Write the folder with its model card, and give back the bundle as it loads from there."""
        manifest = Manifest(
            name=self.name,
            sample_rate_hz=self.sample_rate_hz,
            window_s=self.window_s,
            embedding_dim=self.embedding_dim,
            heads=list(self.heads),
            uncertain_threshold=self.uncertain_threshold,
            network=NetworkSection(kind=self.kind, config=self.config),
            training=self.training,
            figures=self.figures,
        )
        tensors = {
            name: tensor.detach().to("cpu", torch.float32).contiguous().clone()
            for name, tensor in self.network.state_dict().items()
        }
        manifest.version = _version(manifest, tensors)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / WEIGHTS, save_tensors(tensors))
        text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
        write_whole(path / MANIFEST, f"{text}\n".encode())
        write_whole(path / CARD, card.encode())
        return Bundle.load(path)


def make_bundle_folder(out: Path) -> None:
    """Make the folder that a bundle is to be saved to, before the work that leads to it.

    Raises SettingsInvalid where it can't be, or where saving would overwrite what is no bundle's.
    """
    make_folder(out)
    if (out / CARD).exists() and not (out / MANIFEST).exists():
        raise SettingsInvalid(
            f"{out} is no bundle's folder, and its {CARD} would be overwritten: name another"
        )


def shipped() -> Sequence[str]:
    """Names of the bundles that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / MANIFEST).is_file())


def _resolve(path: Path | str | None) -> Path:
    if path is None:
        return SHIPPED / "default"
    if (folder := Path(path)).is_dir():
        return folder
    if str(path) in shipped():
        return SHIPPED / path
    raise BundleInvalid(f"{path} is neither a folder nor a shipped bundle ({', '.join(shipped())})")


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise BundleInvalid(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise BundleInvalid(f"{path} can't be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise BundleInvalid(f"{path} is larger than {max_bytes} bytes")
    return raw


def _read_manifest(folder: Path) -> Manifest:
    raw = _read_bytes(folder / MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise BundleInvalid(f"{folder / MANIFEST}: {first_fault(error)}") from error
    try:
        json.dumps(manifest.model_dump(), allow_nan=False)
    except ValueError as error:
        raise BundleInvalid(f"{folder / MANIFEST}: a number is not finite") from error
    return manifest


def _read_tensors(path: Path) -> dict[str, Tensor]:
    raw = _read_bytes(path, MAX_WEIGHTS_BYTES)
    if int.from_bytes(raw[:8], "little") > MAX_HEADER_BYTES:
        raise BundleInvalid(
            f"{path} is not a safetensors file of a model: its header is longer than "
            f"{MAX_HEADER_BYTES} bytes"
        )
    try:
        return load_tensors(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleInvalid(f"{path} is not a safetensors file: {error}") from error


def _check_values(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Before anything is done with them: not every type that a file may hold can be worked with."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise BundleInvalid(
                f"{folder / WEIGHTS}: {name} is {tensor.dtype}, expected torch.float32"
            )
        if tensor.dim() > MAX_DIMENSIONS:
            raise BundleInvalid(f"{folder / WEIGHTS}: {name} has {tensor.dim()} dimensions")
        if not tensor.numel():  # its other sizes may be such as no array can have
            raise BundleInvalid(f"{folder / WEIGHTS}: {name} is empty")
        if not all_finite([tensor]):
            raise BundleInvalid(f"{folder / WEIGHTS}: {name} has values that are not finite")


def _network(folder: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> Tagger:
    try:
        # On `meta` a shape costs nothing, so that no config can ask for more than the file holds.
        with torch.device("meta"):
            network = build(manifest.network.kind, manifest.network.config, manifest.heads)
    except ValidationError as error:
        raise BundleInvalid(f"{folder / MANIFEST}: network: {first_fault(error)}") from error
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BundleInvalid(f"{folder / MANIFEST}: network: {error}") from error
    expected = network.state_dict()
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise BundleInvalid(f"{folder / WEIGHTS}: missing or unknown tensors: {', '.join(odd[:5])}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BundleInvalid(
                f"{folder / WEIGHTS}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected torch.float32 {tuple(expected[name].shape)}"
            )
    _check_rate(folder, manifest, network)
    if folder.parent != SHIPPED:  # it makes torch load its compiler, which takes a second
        check_cost(folder, network)
    network.load_state_dict(tensors, assign=True)
    _probe(folder, manifest, network)
    return network.eval().requires_grad_(False)


def _check_rate(folder: Path, manifest: Manifest, network: Tagger) -> None:
    rate_hz = network.front_end.config.sample_rate_hz
    if rate_hz != manifest.sample_rate_hz:
        raise BundleInvalid(
            f"{folder / MANIFEST}: sample_rate_hz is {manifest.sample_rate_hz}, "
            f"and the network's front end is for {rate_hz}"
        )


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many values the largest tensor has that is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.values = max(self.values, *sizes, 0)
        return made


def check_cost(folder: Path, network: Tagger) -> None:
    """One window through the network while it is on `meta`: few weights can ask for much memory or
    much time. Raises BundleInvalid."""
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415  # loads a compiler

    front_end = network.front_end.config
    largest = _Largest()
    largest.values = front_end.frames * front_end.n_fft
    try:
        with torch.no_grad(), largest, FlopCounterMode(display=False) as counter:
            network.eval().from_logmel(
                torch.zeros(1, front_end.frames, front_end.n_mels, device="meta")
            )
    except (RuntimeError, ValueError) as error:
        raise BundleInvalid(f"{folder}: the network can't take its own window: {error}") from error
    if largest.values > MAX_VALUES:
        raise BundleInvalid(
            f"{folder}: the network computes {largest.values:,} values at once for one window; "
            f"no more than {MAX_VALUES:,} are allowed"
        )
    gflop = counter.get_total_flops() / 1e9
    if gflop > MAX_GFLOP:
        raise BundleInvalid(
            f"{folder}: the network takes {gflop:,.0f} GFLOP for one window; "
            f"no more than {MAX_GFLOP} are allowed"
        )


def _probe(folder: Path, manifest: Manifest, network: Tagger) -> None:
    """One silent window through the network: what it says must be numbers, and as many as the
    manifest states."""
    samples = round(manifest.window_s * manifest.sample_rate_hz)
    try:
        with torch.inference_mode():
            output = network.eval()(torch.zeros(1, samples))
    except (RuntimeError, ValueError) as error:
        raise BundleInvalid(f"{folder}: the network can't take its own window: {error}") from error
    if tuple(output.embedding.shape) != (1, manifest.embedding_dim):
        raise BundleInvalid(f"{folder}: embedding_dim is not the network's")
    if not all_finite([output.embedding, *output.probabilities.values()]):
        raise BundleInvalid(f"{folder}: what the network says of silence is not finite")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value of any tensor is infinite or not a number."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _version(manifest: Manifest, tensors: dict[str, Tensor]) -> str:
    """Content hash over the weights and all of the manifest that decides an answer."""
    told = manifest.model_dump(mode="json", exclude={"name", "version", "training", "figures"})
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]

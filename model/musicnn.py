"""musicnn's published networks as bundles: fetched, read without TensorFlow, and folded.

Jordi Pons and Xavier Serra, "musicnn: pre-trained convolutional neural networks for music audio
tagging", ISMIR 2019 (late-breaking). ISC licence; nothing of the wheel is part of this project.
"""

import hashlib
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.bundle import Bundle, make_bundle_folder
from model.frontend import LogMelConfig
from model.heads import Head
from model.network import Branch, MusicnnConfig, build
from worker.errors import BundleInvalid

Network = Literal["MSD_musicnn", "MTT_musicnn"]
Checkpoint = Mapping[str, np.ndarray]

REQUIREMENT = "musicnn==0.1.0"
WHEEL_SHA256 = "f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa"
DEAD_BELOW = 1e-4  # a filter whose largest weight is smaller gives a constant
EPSILON = 1e-3  # of batch normalisation
FRONT_HEIGHTS = (38, 67, 1, 1, 1)


def _names(joined: str) -> tuple[str, ...]:
    return tuple(joined.split("|"))


# The networks' outputs in order, under the names that their authors gave them.
LABELS: dict[Network, tuple[str, ...]] = {
    "MSD_musicnn": _names(
        "rock|pop|alternative|indie|electronic|female vocalists|dance|00s|alternative rock|jazz|"
        "beautiful|metal|chillout|male vocalists|classic rock|soul|indie rock|Mellow|electronica|"
        "80s|folk|90s|chill|instrumental|punk|oldies|blues|hard rock|ambient|acoustic|experimental|"
        "female vocalist|guitar|Hip-Hop|70s|party|country|easy listening|sexy|catchy|funk|electro|"
        "heavy metal|Progressive rock|60s|rnb|indie pop|sad|House|happy"
    ),
    "MTT_musicnn": _names(
        "guitar|classical|slow|techno|strings|drums|electronic|rock|fast|piano|ambient|beat|violin|"
        "vocal|synth|female|indian|opera|male|singing|vocals|no vocals|harpsichord|loud|quiet|"
        "flute|woman|male vocal|no vocal|pop|soft|sitar|solo|man|classic|choir|voice|new age|dance|"
        "male voice|female vocal|beats|harp|cello|no voice|weird|country|metal|female voice|"
        "choral"
    ),
}
# What a label is about, where it isn't a genre.
CATEGORIES = {
    "mood": "beautiful|chillout|Mellow|chill|party|easy listening|sexy|catchy|sad|happy|"
    "slow|fast|loud|quiet|soft|weird",
    "instrument": "instrumental|acoustic|guitar|strings|drums|piano|beat|violin|synth|harpsichord|"
    "flute|sitar|solo|beats|harp|cello",
    "era": "oldies|00s|90s|80s|70s|60s",
    "voice": "female vocalists|male vocalists|female vocalist|vocal|female|male|singing|vocals|"
    "no vocals|woman|male vocal|no vocal|man|choir|voice|male voice|female vocal|no voice|"
    "female voice|choral",
}


def category(label: str) -> str:
    """Kind of a label: genre, mood, instrument, era or voice."""
    for name, labels in CATEGORIES.items():
        if label in _names(labels):
            return name
    return "genre"


def tags_head(network: Network = "MSD_musicnn") -> Head:
    """The fifty tags as a multi-label head."""
    labels = LABELS[network]
    return Head(
        name="tags", kind="multi", labels=labels, categories=tuple(category(x) for x in labels)
    )


def import_musicnn(out: Path) -> Bundle:
    """Fetch the published wheel and write its network for the Million Song Dataset, folded, as a
    bundle into `out`.

    Needs pip and a package index; raises BundleInvalid when the wheel can't be had.
    """
    make_bundle_folder(out)
    with TemporaryDirectory() as folder:
        wheel = fetch_wheel(Path(folder))
        bundle = folded(read_checkpoint(wheel, "MSD_musicnn"))
        text = licence(wheel)
    (out / "LICENSE.musicnn.md").write_text(text, encoding="utf-8")
    return bundle.save(out, card=_CARD.format(wheel=REQUIREMENT, licence=text))


def fetch_wheel(folder: Path) -> Path:
    """Download the pinned wheel without its dependencies; its hash is checked by pip and here."""
    pinned = folder / "musicnn.txt"
    pinned.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        why = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise BundleInvalid(f"pip could not fetch {REQUIREMENT}: {why}")
    wheel = next(folder.glob("musicnn-*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise BundleInvalid(f"{wheel.name} is not the published wheel")
    return wheel


def licence(wheel: Path) -> str:
    """The licence text that the wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("LICENSE.md"))
        return archive.read(name).decode("utf-8")


def read_checkpoint(wheel: Path, network: Network) -> dict[str, np.ndarray]:
    """All float32 tensors of a network in the wheel, by TensorFlow's names.

    TensorFlow's checkpoint is a sorted table (LevelDB's format) of protocol buffers that say where
    in the data file each tensor lies.
    """
    with zipfile.ZipFile(wheel) as archive:
        index = archive.read(f"musicnn/{network}/.index")
        data = archive.read(f"musicnn/{network}/.data-00000-of-00001")
    tensors = {}
    _, position = _varint(index, len(index) - 48)  # the footer: two block handles, each two varints
    _, position = _varint(index, position)
    for _, handle in _table_block(index, position):
        for key, value in _table_block(handle, 0, index):
            entry = dict(_fields(value))
            if key and entry.get(1) == 1:  # the first key is the header; type 1 is float32
                shape = _shape(entry.get(2, b""))
                count = int(np.prod(shape, dtype=np.int64))
                array = np.frombuffer(data, "<f4", count, int(entry.get(4, 0))).copy()
                tensors[key.decode()] = array.reshape(shape)
    return tensors


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _table_block(
    raw: bytes, position: int, table: bytes | None = None
) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the block of `table` (or of `raw` itself) that a handle in `raw` names."""
    offset, position = _varint(raw, position)
    size, _ = _varint(raw, position)
    block = (raw if table is None else table)[offset : offset + size]
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        yield key, block[at : at + length]
        at += length


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protocol buffer's fields."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        size, at = _varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
        yield tag >> 3, message[at : at + size]
        at += size


def _shape(message: int | bytes) -> tuple[int, ...]:
    assert isinstance(message, bytes)
    sizes = (dict(_fields(value)) for _, value in _fields(message) if isinstance(value, bytes))
    return tuple(int(size.get(1, 0)) for size in sizes)


def as_published(checkpoint: Checkpoint, logmel: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and embedding by the network layer for layer as its authors wrote it.

    The measure of `folded`, far too slow to ship. `logmel` is `(windows, frames, 96)`.
    """

    def norm(features: Tensor, index: int) -> Tensor:
        scale, shift = (torch.from_numpy(part) for part in _norm(checkpoint, index))
        return features * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def conv(features: Tensor, index: int, pad: tuple[int, int]) -> Tensor:
        kernel = torch.from_numpy(checkpoint[_named("conv2d", index, "kernel")]).permute(3, 2, 0, 1)
        bias = torch.from_numpy(checkpoint[_named("conv2d", index, "bias")])
        padded = functional.pad(features, (0, 0, *pad))
        return norm(functional.relu(functional.conv2d(padded, kernel, bias)), index + 1)

    scaled = norm(logmel.unsqueeze(1), 0)
    pads = ((3, 3), (3, 3), (63, 64), (31, 32), (15, 16))
    front = torch.cat([conv(scaled, i, pad).amax(-1) for i, pad in enumerate(pads)], 1)
    first = conv(front.transpose(1, 2).unsqueeze(1), 5, (3, 3)).squeeze(-1)
    second = first + conv(first.transpose(1, 2).unsqueeze(1), 6, (3, 3)).squeeze(-1)
    third = second + conv(second.transpose(1, 2).unsqueeze(1), 7, (3, 3)).squeeze(-1)
    features = torch.cat([front, first, second, third], 1)
    pooled = torch.stack([features.amax(-1), features.mean(-1)], -1).flatten(1)
    normed = norm(pooled[..., None, None], 9).flatten(1)
    dense = functional.relu(
        normed @ torch.from_numpy(checkpoint["dense/kernel"])
        + torch.from_numpy(checkpoint["dense/bias"])
    )
    embedding = norm(dense[..., None, None], 10).flatten(1)
    logits = embedding @ torch.from_numpy(checkpoint["dense_1/kernel"])
    return logits + torch.from_numpy(checkpoint["dense_1/bias"]), embedding


def folded(checkpoint: Checkpoint, network: Network = "MSD_musicnn") -> Bundle:
    """The network without its dead filters, as a bundle that is not yet saved."""
    branches, state = _fold(checkpoint)
    config = MusicnnConfig(
        front_end=LogMelConfig(),
        branches=tuple(branches),
        first_filters=len(state["trunk.mid.0.scale"]),
        mid_filters=len(checkpoint["conv2d_5/bias"]),
    ).model_dump(mode="json")
    head = tags_head(network)
    tagger = build("musicnn", config, [head])
    tagger.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return Bundle(
        name=network.lower().replace("_", "-"),
        heads=(head,),
        sample_rate_hz=16_000,
        window_s=3.0,
        embedding_dim=200,
        uncertain_threshold=0.0,
        kind="musicnn",
        config=config,
        network=tagger.eval().requires_grad_(False),
        training={"origin": REQUIREMENT, "network": network, "licence": "ISC"},
    )


def _fold(checkpoint: Checkpoint) -> tuple[list[Branch], dict[str, np.ndarray]]:
    """Shapes of the front filters that are alive, and the whole network's state with the rest
    folded: a dead filter's constant goes to the next layers' biases, by way of the ones channel
    where zero-padding cuts it off near the edges. Of the 1-D layers only the first has many; its
    living filters come first in the others too, as the layers are added up."""
    branches, alive, constants = [], [], []
    input_scale, input_shift = _norm(checkpoint, 0)
    state = {"trunk.input_scale": np.concatenate([input_scale, input_shift])}
    for index, height in enumerate(FRONT_HEIGHTS):
        kernel = checkpoint[_named("conv2d", index, "kernel")].transpose(3, 2, 0, 1)
        bias = checkpoint[_named("conv2d", index, "bias")]
        scale, shift = _norm(checkpoint, index + 1)
        living = _living(kernel)
        signed = scale[living]
        branches.append(Branch(filters=int(living.sum()), taps=int(kernel.shape[2]), height=height))
        prefix = f"trunk.front.{index}"
        state[f"{prefix}.weight"] = kernel[living] * signed[:, None, None, None]
        state[f"{prefix}.bias"] = bias[living] * signed
        state[f"{prefix}.sign"] = np.sign(signed)[:, None]
        alive.append(living)
        # What is added to a living filter, and all that a dead one gives.
        constants.append(np.where(living, shift, np.maximum(bias, 0) * scale + shift))
    living, constant = np.concatenate(alive), np.concatenate(constants)
    first = _living(checkpoint["conv2d_5/kernel"].transpose(3, 2, 0, 1))
    scale, shift = _norm(checkpoint, 6)
    given = np.where(first, 0, np.maximum(checkpoint["conv2d_5/bias"], 0) * scale + shift)
    order = np.argsort(~first, kind="stable")
    for layer, kept in enumerate((np.flatnonzero(first), order, order)):
        kernel = checkpoint[_named("conv2d", 5 + layer, "kernel")][:, :, 0].transpose(2, 1, 0)[kept]
        bias = checkpoint[_named("conv2d", 5 + layer, "bias")][kept]
        scale, shift = (part[kept] for part in _norm(checkpoint, 6 + layer))
        if layer == 0:
            kernel = _with_ones(kernel, living, constant)
        elif layer == 1 and not first.all():
            kernel = _with_ones(kernel, first, given)
            shift = shift + given[kept]
        else:
            kernel = kernel[:, order]
        state[f"trunk.mid.{layer}.conv.weight"] = kernel
        state[f"trunk.mid.{layer}.conv.bias"] = bias
        state[f"trunk.mid.{layer}.scale"] = scale[:, None]
        state[f"trunk.mid.{layer}.shift"] = shift[:, None]
    scale, shift = _norm(checkpoint, 9)
    dense = checkpoint["dense/kernel"]
    weight = (dense * scale[:, None]).reshape(-1, 2, dense.shape[1])  # (channel, max or mean, unit)
    given = np.concatenate([constant, given])
    bias = checkpoint["dense/bias"] + shift @ dense + given @ weight[: len(given)].sum(1)
    before = np.flatnonzero(np.concatenate([living, first]))
    kept = weight[np.concatenate([before, len(given) + order, len(given) + len(order) + order])]
    state["trunk.dense.weight"] = np.concatenate([kept[:, 0], kept[:, 1]]).T
    state["trunk.dense.bias"] = bias
    state["trunk.scale"], state["trunk.shift"] = _norm(checkpoint, 10)
    state["heads.tags.weight"] = checkpoint["dense_1/kernel"].T
    state["heads.tags.bias"] = checkpoint["dense_1/bias"]
    return branches, {name: np.ascontiguousarray(a, np.float32) for name, a in state.items()}


def _living(kernel: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(kernel).max((1, 2, 3)) > DEAD_BELOW)


def _with_ones(kernel: np.ndarray, living: np.ndarray, given: np.ndarray) -> np.ndarray:
    """A kernel `(filters, channels, taps)` over the living channels and one of ones, which brings
    what channels are given besides, `(channels,)`."""
    ones = np.einsum("oit,i->ot", kernel, given)[:, None]
    return np.concatenate([kernel[:, living], ones], 1)


def _named(layer: str, index: int, part: str) -> str:
    return f"{layer}_{index}/{part}" if index else f"{layer}/{part}"


def _norm(checkpoint: Checkpoint, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of a batch normalisation."""
    gamma, beta, mean, variance = (
        checkpoint[_named("batch_normalization", index, part)]
        for part in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    scale = gamma / np.sqrt(variance + EPSILON)
    return scale, beta - mean * scale


_CARD = """# MSD_musicnn

The network `MSD_musicnn` of the `{wheel}` wheel, ported to PyTorch and freed of its dead filters.
Its fifty tags are a multi-label head. Trained by its authors (Pons and Serra, 2019); this bundle
changes no output by more than 1e-5. Made by `timbre model import musicnn`.

## Licence

{licence}
"""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.bundle import MAX_MANIFEST_BYTES, Bundle
from model.calibration import Calibration
from model.frontend import LogMelConfig
from model.heads import Head
from model.network import Branch, MusicnnConfig, build
from tests.unit.model.music import chords
from worker.errors import BundleInvalid


@pytest.fixture(scope="module")
def default() -> Bundle:
    return Bundle.load()


@pytest.fixture
def folder(default: Bundle, tmp_path: Path) -> Path:
    default.save(tmp_path / "bundle", card="# A bundle\n")
    return tmp_path / "bundle"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "model.json").read_text())
    change(manifest)
    (folder / "model.json").write_text(json.dumps(manifest))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def relabel(manifest: dict[str, Any], label: str) -> None:
    manifest["heads"][0]["labels"][0] = label


def heat(manifest: dict[str, Any], temperature: float) -> None:
    manifest["heads"][0]["calibration"]["temperature"]["mean"] = temperature


def resign(folder: Path) -> None:
    """Give the folder the version of its content: an attacker can compute a hash too."""
    from model import bundle

    manifest = bundle._read_manifest(folder)
    version = bundle._version(manifest, load_file(folder / "model.safetensors"))
    edit(folder, lambda told: told.update(version=version))


def test_a_bundle_comes_back_as_it_was_saved(default: Bundle, folder: Path) -> None:
    loaded = Bundle.load(folder)

    assert loaded.version == default.version
    assert loaded.heads == default.heads
    assert loaded.uncertain_threshold == default.uncertain_threshold
    with torch.inference_mode():
        windows = chords(2)
        torch.testing.assert_close(
            loaded.network(windows).embedding, default.network(windows).embedding
        )


def test_the_version_follows_what_decides_an_answer(default: Bundle, tmp_path: Path) -> None:
    genre, tags = default.heads
    calibrated = genre.model_copy(update={"calibration": Calibration(temperature={"mean": 3.0})})
    other_heads = replace(default, heads=(calibrated, tags)).save(tmp_path / "a", card="")
    told = replace(default, name="mine", figures={"accuracy": 0.1}).save(tmp_path / "b", card="")

    assert other_heads.version != default.version
    assert told.version == default.version


def test_changed_weights_are_noticed(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["heads.genre.bias"].add_(1))

    with pytest.raises(BundleInvalid, match="damaged or was edited"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda told: told.pop("heads"), "heads: Field required"),
        (lambda told: told.update(surprise=1), "surprise: Extra inputs"),
        (lambda told: told.update(format=2), "format: Input should be 1"),
        (lambda told: told.update(short_track="zero_pad"), "short_track: Input should be 'tile'"),
        (lambda told: told.update(window_s="NaN"), "window_s"),
        (lambda told: told.update(window_s=1e9), "window_s: Input should be less"),
        (lambda told: told["heads"][0].update(name="../../etc"), "name"),
        (lambda told: told["heads"][0]["labels"].append("blues"), "a label stands twice"),
        (lambda told: told["heads"][0]["categories"].pop(), "every label needs its category"),
        (lambda told: told["heads"][1].update(name="genre"), "two heads have one name"),
        (lambda told: told["heads"][0].update(name="type"), "a head can't be called 'type'"),
        (lambda told: told["heads"][0].update(name="keys"), "a head can't be called 'keys'"),
        (lambda told: told["heads"][0].update(name="training"), "can't be called 'training'"),
        (lambda told: relabel(told, "jazz\x1b[2J"), "a label has a control character"),
        (lambda told: relabel(told, "jazz\n"), "a label has a control character"),
        (lambda told: relabel(told, "ja\u2028zz"), "a label has a control character"),
        (lambda told: relabel(told, "ja\u2029zz"), "a label has a control character"),
        (lambda told: relabel(told, "x" * 201), "at most 200 characters"),
        (lambda told: told["heads"][0].update(categories=["\x1b"] * 10), "a control character"),
        (lambda told: told["heads"][0].update(labels=[], categories=[]), "at least 1 item"),
        (lambda told: heat(told, -1.5), "temperature.*greater than or equal to"),
        (lambda told: heat(told, 1e9), "temperature.*less than or equal to"),
        (lambda told: heat(told, float("nan")), "temperature.*finite number"),
        (lambda told: told["figures"].update(nll=float("nan")), "a number is not finite"),
        (lambda told: told["training"].update(x=[{"y": float("-inf")}]), "a number is not finite"),
    ],
)
def test_a_manifest_that_says_wrong_things_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    edit(folder, change)

    with pytest.raises(BundleInvalid, match=complaint):
        Bundle.load(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda told: told["network"].update(kind="os:system"), "unknown network kind"),
        (lambda told: told["network"]["config"].update(mid_filters=10**9), "mid_filters"),
        (lambda told: told["network"]["config"].update(first_filters=65), "more than mid_filters"),
        (
            lambda told: told.update(
                network={"kind": "logmel_cnn", "config": {"stem_stride": [10**30, 1]}}
            ),
            r"stem_stride\.0: Input should be less than",
        ),
        (
            lambda told: told["network"]["config"].update(mid_filters=1_000, embedding_dim=256),
            "expected torch.float32",
        ),
        (lambda told: told["network"]["config"]["front_end"].update(n_fft=2**40), "n_fft"),
        (lambda told: told["network"]["config"]["front_end"].update(n_mels=8), "can't take"),
        (lambda told: told.update(embedding_dim=7), "embedding_dim is not the network's"),
        (lambda told: told["heads"].pop(), "missing or unknown tensors"),
    ],
)
def test_a_network_that_does_not_fit_its_weights_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    edit(folder, change)
    resign(folder)

    with pytest.raises(BundleInvalid, match=complaint) as refused:
        Bundle.load(folder)
    if complaint in {"mid_filters", "n_fft"}:
        assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("frames", "branch", "complaint"),
    [
        (
            4_096,
            Branch(filters=512, taps=1, height=2),
            "534,773,760 values at once for one window",
        ),
        (3_000, Branch(filters=16, taps=512, height=200), "560 GFLOP for one window"),
    ],
)
def test_few_weights_that_ask_for_much_memory_or_time_are_refused(
    tmp_path: Path, frames: int, branch: Branch, complaint: str
) -> None:
    config = MusicnnConfig(
        front_end=LogMelConfig(n_fft=2_048, hop=16, n_mels=256, frames=frames),
        branches=(branch,),
        first_filters=1,
        mid_filters=1,
        mid_taps=1,
        embedding_dim=1,
    ).model_dump(mode="json")
    head = Head(name="genre", kind="single", labels=("a", "b"), categories=("genre", "genre"))
    network = build("musicnn", config, [head])
    network.load_state_dict({name: torch.zeros_like(t) for name, t in network.state_dict().items()})
    hungry = Bundle("x", (head,), 16_000, 3.0, 1, 0.5, "musicnn", config, network)

    with pytest.raises(BundleInvalid, match=complaint):
        hungry.save(tmp_path, card="")


def test_shipped_bundles_load_without_torchs_compiler_which_takes_a_second() -> None:
    program = (
        "import sys\n"
        "from model.bundle import Bundle, shipped\n"
        "for name in shipped():\n"
        "    Bundle.load(name)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda told: told.pop("heads.genre.bias"), "missing or unknown tensors"),
        (lambda told: told.update(more=torch.zeros(1)), "missing or unknown tensors"),
        (
            lambda told: told.update({"heads.genre.bias": torch.zeros(11)}),
            r"heads\.genre\.bias is torch.float32 \(11,\)",
        ),
        (
            lambda told: told.update({"heads.genre.bias": torch.zeros(10, dtype=torch.float64)}),
            "torch.float64",
        ),
        (lambda told: told["heads.genre.bias"].fill_(torch.nan), "values that are not finite"),
        (lambda told: told["heads.genre.weight"].fill_(3e38), "says of silence is not finite"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    edit_weights(folder, change)
    resign(folder)

    with pytest.raises(BundleInvalid, match=complaint):
        Bundle.load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_less_precision_are_refused(folder: Path, dtype: torch.dtype) -> None:
    name = "heads.genre.bias"
    edit_weights(folder, lambda told: told.update({name: told[name].to(dtype)}))

    with pytest.raises(BundleInvalid, match=rf"{name} is {dtype}, expected torch.float32"):
        Bundle.load(folder)


def test_a_front_end_for_another_sample_rate_is_refused(folder: Path) -> None:
    edit(folder, lambda told: told.update(sample_rate_hz=22_050))
    resign(folder)

    with pytest.raises(BundleInvalid, match="is 22050, and the network's front end is for 16000"):
        Bundle.load(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        pickle.dumps(Bomb()),
        struct.pack("<Q", 2**21) + b"{}".ljust(2**21),
    ],
)
def test_weights_that_are_no_safetensors_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)

    with pytest.raises(BundleInvalid, match="not a safetensors file"):
        Bundle.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.json").write_bytes(content)

    with pytest.raises(BundleInvalid, match=r"model\.json"):
        Bundle.load(folder)


def test_an_oversized_manifest_is_refused(folder: Path) -> None:
    (folder / "model.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))

    with pytest.raises(BundleInvalid, match="larger than"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)

    with pytest.raises(BundleInvalid, match=f"{name} is not a file"):
        Bundle.load(folder)


def test_an_empty_tensor_of_impossible_sizes_is_refused(folder: Path) -> None:
    told = {"a": {"dtype": "F32", "shape": [2**31, 2**31, 0], "data_offsets": [0, 0]}}
    header = json.dumps(told).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)

    with pytest.raises(BundleInvalid, match="a is empty"):
        Bundle.load(folder)


def test_a_tensor_of_a_thousand_dimensions_is_refused(folder: Path) -> None:
    told = {"a": {"dtype": "F32", "shape": [1] * 1_000, "data_offsets": [0, 4]}}
    header = json.dumps(told).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "model.safetensors").write_bytes(content)

    with pytest.raises(BundleInvalid, match="a has 1000 dimensions"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(BundleInvalid, match=name):
        Bundle.load(folder)


def test_neither_folder_nor_name_is_refused() -> None:
    with pytest.raises(BundleInvalid, match="neither a folder nor a shipped bundle"):
        Bundle.load("no-such-bundle")

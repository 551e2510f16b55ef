import re
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from model.cli import app
from model.musicnn import (
    LABELS,
    as_published,
    category,
    fetch_wheel,
    folded,
    import_musicnn,
    read_checkpoint,
    tags_head,
)
from tests.unit.model.music import chords
from worker.errors import BundleInvalid, SettingsInvalid


def checkpoint(*, dead_in_first: int = 5) -> dict[str, np.ndarray]:
    """A small network of musicnn's shape with filters alive and dead, some of negative scale."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        tensors[name] = value.astype(np.float32)

    def norm(index: int, size: int) -> None:
        name = f"batch_normalization_{index}" if index else "batch_normalization"
        put(f"{name}/gamma", rng.uniform(0.3, 1.5, size) * rng.choice([-1, 1, 1], size))
        put(f"{name}/beta", rng.normal(size=size))
        put(f"{name}/moving_mean", rng.normal(size=size))
        put(f"{name}/moving_variance", rng.uniform(0.5, 2, size))

    def conv(index: int, taps: int, height: int, filters: int, *, dead: int = 0) -> None:
        name = f"conv2d_{index}" if index else "conv2d"
        kernel = rng.normal(size=(taps, height, 1, filters)) / np.sqrt(taps * height)
        kernel[..., :dead] *= 1e-9
        put(f"{name}/kernel", kernel)
        put(f"{name}/bias", rng.normal(size=filters))
        norm(index + 1, filters)

    norm(0, 1)
    tensors["batch_normalization/gamma"] = np.ones(1, np.float32)
    for index, (taps, height) in enumerate([(7, 38), (7, 67), (128, 1), (64, 1), (32, 1)]):
        conv(index, taps, height, 6, dead=4)
    conv(5, 7, 30, 8, dead=dead_in_first)
    conv(6, 7, 8, 8)
    conv(7, 7, 8, 8)
    pooled = 2 * (30 + 3 * 8)
    norm(9, pooled)
    put("dense/kernel", rng.normal(size=(pooled, 200)) / np.sqrt(pooled))
    put("dense/bias", rng.normal(size=200))
    norm(10, 200)
    put("dense_1/kernel", rng.normal(size=(200, 50)) / 14)
    put("dense_1/bias", rng.normal(size=50))
    return tensors


@pytest.mark.parametrize("dead_in_first", [0, 5])
def test_folding_dead_filters_changes_nothing(dead_in_first: int) -> None:
    tensors = checkpoint(dead_in_first=dead_in_first)
    network = folded(tensors).network
    with torch.inference_mode():
        logmel = network.front_end(chords(2))
        logits, embedding = as_published(tensors, logmel)
        folded_logits, folded_embedding = network.logits(logmel)

    torch.testing.assert_close(folded_logits["tags"].sigmoid(), logits.sigmoid(), atol=1e-5, rtol=0)
    torch.testing.assert_close(folded_embedding, embedding, atol=1e-4, rtol=1e-4)


def test_folding_leaves_only_living_filters() -> None:
    config = folded(checkpoint()).config

    assert [branch["filters"] for branch in config["branches"]] == [2] * 5
    assert config["first_filters"] == 3


def test_every_network_has_fifty_labels_of_known_categories() -> None:
    known = {"genre", "mood", "instrument", "era", "voice"}

    for network, labels in LABELS.items():
        assert len(set(labels)) == 50
        assert set(tags_head(network).categories) <= known


def test_labels_are_told_apart_by_what_they_are_about() -> None:
    assert category("Hip-Hop") == "genre"
    assert category("Mellow") == "mood"
    assert category("guitar") == "instrument"
    assert category("80s") == "era"
    assert category("female vocalists") == "voice"


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])


def block(entries: dict[bytes, bytes]) -> bytes:
    """Of LevelDB's table: each key after what it shares with the one before."""
    rows, before = b"", b""
    for key, value in entries.items():
        alike = (one == other for one, other in zip(before, key, strict=False))
        shared = list(alike).index(False) if before else 0
        rows += varint(shared) + varint(len(key) - shared) + varint(len(value))
        rows += key[shared:] + value
        before = key
    return rows + struct.pack("<II", 0, 1)  # where keys share nothing, and how often


def test_float32_tensors_are_read_out_of_tensorflows_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"dense/{name}": rng.random((2, 300), np.float32) for name in ("bias", "kernel")}
    stored = tensors | {"global_step": np.arange(3)}
    entries, data = {b"": b"\x08\x01"}, b""
    for name, tensor in stored.items():
        sizes = (b"\x08" + varint(size) for size in tensor.shape)
        shape = b"".join(b"\x12" + varint(len(size)) + size for size in sizes)
        dtype = b"\x08\x01" if tensor.dtype == np.float32 else b"\x08\x09"
        where = b"\x35hash\x20" + varint(len(data)) + b"\x28" + varint(tensor.nbytes)
        entries[name.encode()] = dtype + b"\x12" + varint(len(shape)) + shape + where
        data += tensor.tobytes()
    table = block(entries)
    index = block({b"z": varint(0) + varint(len(table))})
    footer = b"\x00\x00" + varint(len(table)) + varint(len(index))
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr("musicnn/MSD_musicnn/.index", table + index + footer.ljust(48, b"\x00"))
        wheel.writestr("musicnn/MSD_musicnn/.data-00000-of-00001", data)
    read = read_checkpoint(tmp_path / "wheel", "MSD_musicnn")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)


def test_nothing_is_fetched_for_a_place_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.musicnn.fetch_wheel", lambda _: pytest.fail("fetched"))
    taken = tmp_path / "file"
    taken.write_bytes(b"")
    with pytest.raises(SettingsInvalid, match="can't be made a folder"):
        import_musicnn(taken)


def test_what_pip_says_at_last_is_told_in_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"WARNING: {number} {'connection refused ' * 30}." for number in range(5)]
    ended = subprocess.CompletedProcess([], 1, "", "\n".join([*lines, "ERROR: no distribution\n"]))
    monkeypatch.setattr("model.musicnn.subprocess.run", lambda *_, **__: ended)
    with pytest.raises(BundleInvalid) as refused:
        fetch_wheel(tmp_path)
    told = refused.value.message.removeprefix("pip could not fetch musicnn==0.1.0: ")
    assert told.splitlines() == [*lines[-2:], "ERROR: no distribution"]


def test_the_wheel_is_fetched_by_version_and_hash_without_its_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "musicnn-0.1.0-py3-none-any.whl").write_bytes(b"another")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr("model.musicnn.subprocess.run", pip)
    with pytest.raises(BundleInvalid, match="is not the published wheel"):
        fetch_wheel(tmp_path)
    [command] = commands
    assert {"--no-deps", "--require-hashes"} <= set(command)
    asked = Path(command[command.index("-r") + 1]).read_text()
    assert re.fullmatch(r"musicnn==0\.1\.0 --hash=sha256:[0-9a-f]{64}\n", asked)


def test_a_bundle_of_no_given_place_goes_to_musicnn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "musicnn").write_bytes(b"")
    refused = CliRunner().invoke(app, ["import", "musicnn"]).exception
    assert isinstance(refused, SettingsInvalid)
    assert "musicnn can't be made a folder" in str(refused)

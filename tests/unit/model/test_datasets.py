"""Data sets: each layout is read, its corrupt files named, and a split that leaks refused."""

import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from model.datasets import LAYOUTS, Clip, Dataset, LogMels, Skipped, detect, load
from model.datasets.dataset import left_out, odd_labels
from model.datasets.gtzan import fault_filtered_split
from model.datasets.logmels import LogMelSource, logmel_of, makes, open_source, samples_of
from model.frontend import normalise
from model.logmel_cnn import ARCHIVE_FRONT_END
from tests import collections_of_music as music
from worker.errors import DatasetInvalid, SplitLeaks


def test_gtzan_has_the_fault_filtered_split_and_names_what_is_corrupt(tmp_path: Path) -> None:
    dataset = load(music.gtzan(tmp_path, "au"))
    assert dataset.layout == "gtzan"
    assert (dataset.kind, dataset.grouped_by) == ("single", "recording")
    assert {clip.name: clip.split for clip in dataset.clips if clip.labels == ("blues",)} == {
        "blues.00000": "valid",
        "blues.00001": "valid",
        "blues.00012": "test",
        "blues.00029": "train",
        "blues.00030": "train",
        "blues.00031": "train",
        "blues.00032": "train",
    }
    (corrupt,) = dataset.skipped
    assert (corrupt.name, corrupt.split) == ("jazz.00054", "train")
    assert dataset.labels == ("blues", "metal")


@pytest.mark.parametrize("folder", ["", "genres", "genres_original"])
def test_excerpts_of_a_clip_of_gtzan_stay_on_its_side(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder / "blues").mkdir(parents=True)
    for name in ("00029.wav", "00029.second.wav", "00030.wav", "00031.txt", "mix.wav"):
        (tmp_path / folder / "blues" / f"blues.{name}").touch()
    (tmp_path / folder / "jazz").mkdir()
    (tmp_path / folder / "jazz" / "jazz.00054.second.wav").touch()
    dataset = load(tmp_path)
    clips = dataset.clips
    assert {clip.name: clip.group for clip in clips} == {
        "blues.00029": "blues.00029",
        "blues.00029.second": "blues.00029",
        "blues.00030": "blues.00030",
    }
    assert {clip.split for clip in clips} == {"train"}
    assert [skipped.name for skipped in dataset.skipped] == [
        "blues/blues.mix.wav",
        "jazz.00054.second",
    ]


def test_a_clip_of_gtzan_in_another_genres_folder_is_named(tmp_path: Path) -> None:
    for folder, name in (("blues", "blues.00029"), ("blues", "metal.00002"), ("blues", "song")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.wav").touch()
    dataset = load(tmp_path)
    assert [clip.name for clip in dataset.clips] == ["blues.00029"]
    why = "is not called as clips of its folder's genre are"
    assert dataset.skipped == (
        Skipped("blues/metal.00002.wav", why),
        Skipped("blues/song.wav", why),
    )


def test_fault_filtered_split_has_the_published_sizes() -> None:
    assert Counter(fault_filtered_split().values()) == {"train": 443, "valid": 197, "test": 290}


def test_fault_filtered_split_is_that_of_the_lists(shared_data: Path) -> None:
    listed = {
        Path(line.strip()).stem: split
        for split in ("train", "valid", "test")
        for line in (shared_data / "gtzan" / f"{split}_filtered.txt").read_text().splitlines()
    }
    assert fault_filtered_split() == listed


@pytest.mark.parametrize(
    ("subset", "absent"),
    [
        ("fma_small", ["000013"]),
        ("fma_medium", ["000013", "080000"]),
        ("fma_large", ["000013", "080000", "090000"]),
    ],
)
def test_fma_keeps_its_own_split_and_its_subset(
    tmp_path: Path, subset: str, absent: list[str]
) -> None:
    dataset = load(music.fma(tmp_path).rename(tmp_path / subset))
    assert dataset.layout == "fma"
    assert dataset.labels == ("Hip-Hop", "Rock")
    assert dataset.splits == ("train", "valid", "test")
    assert dataset.grouped_by == "artist"
    assert len(dataset.clips) == 11
    assert [skipped.name for skipped in dataset.skipped] == absent
    assert {skipped.reason for skipped in dataset.skipped} == {"is in tracks.csv but not on disk"}
    (tmp_path / "fma_small").mkdir(exist_ok=True)
    (tmp_path / "fma_large").mkdir(exist_ok=True)
    with pytest.raises(DatasetInvalid, match="holds several of fma_small"):
        load(tmp_path)


def test_labels_are_found_in_any_case_but_where_only_case_tells_them_apart() -> None:
    clips = tuple(Clip(label, (label,), label) for label in ("Jazz", "POP", "straße"))
    labels = ("Jazz", "POP", "straße")
    dataset = Dataset("mine", "folders", "single", labels, clips, "recording", "none")
    assert dataset.targets(["pop", "rock", "STRASSE", "jazz"]).tolist() == [
        [0, 0, 0, 1],
        [1, 0, 0, 0],
        [0, 0, 1, 0],
    ]
    assert dataset.columns(["pop", "Pop", "jazz", "Jazz"]) == {"Jazz": 3}
    with pytest.raises(DatasetInvalid, match=r"not asked for: \['POP'\]"):
        dataset.targets(["pop", "Pop", "jazz", "strasse"])


def test_fma_hierarchy_is_a_multi_label_task(tmp_path: Path) -> None:
    dataset = load(music.fma(tmp_path), "fma-all")
    assert dataset.kind == "multi"
    assert dataset.labels == ("Hip-Hop", "Punk (100)", "Punk (25)", "Rock")
    assert dataset.clips[0].labels == ("Rock", "Punk (25)")


@pytest.mark.parametrize("layout", ["fma", "fma-all"])
def test_tracks_of_fma_without_a_genre_are_named(tmp_path: Path, layout: str) -> None:
    folder = music.fma(tmp_path)
    with (tmp_path / "fma_metadata" / "tracks.csv").open("a") as file:
        file.write('15,small,test,9,,\n16,small,test,9,,"[12, 25]"\n')  # 16 has no top genre
    none, absent = "has no genre", "is in tracks.csv but not on disk"
    assert load(folder, layout).skipped[-2:] == (
        Skipped("000015", none, "test"),
        Skipped("000016", none if layout == "fma" else absent, "test"),
    )


def test_fma_without_metadata_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "fma_small").mkdir()
    with pytest.raises(DatasetInvalid, match="fma_metadata"):
        load(tmp_path / "fma_small", "fma")


def test_folders_of_fma_without_metadata_are_taken_for_no_genres(tmp_path: Path) -> None:
    folder = music.fma(tmp_path)
    (tmp_path / "fma_metadata" / "tracks.csv").unlink()
    for path in (folder, tmp_path):
        with pytest.raises(DatasetInvalid, match=r"no fma_metadata/tracks\.csv"):
            load(path)
    assert load(folder, "folders").labels == ("000",)


def test_of_clips_left_out_a_few_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    [absent] = load(music.fma(tmp_path)).skipped
    assert absent.split == "valid"
    many = [Skipped(f"{n}", "is not on disk") for n in range(30_000)]
    assert left_out(many) == [("0, 1, 2, and 29997 more", "is not on disk")]
    assert left_out(many[:3]) == [("0, 1, 2", "is not on disk")]
    told = left_out([Skipped(f"{n}", f"broken at {n}") for n in range(30)])
    assert told[-2:] == [("9", "broken at 9"), ("20 more", "have other reasons, each its own")]


def test_fma_is_found_out_whatever_its_folder_is_called_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = music.fma(tmp_path / "fma")
    (tmp_path / "music").symlink_to(folder)
    monkeypatch.chdir(folder)
    dataset = load(folder)
    for path in (tmp_path / "music", Path(), folder / "000" / ".."):
        assert load(path) == dataset
    (folder.parent / "fma_metadata").rename(tmp_path / "fma_metadata")
    (tmp_path / "fma_small").symlink_to(folder)
    assert load(tmp_path / "fma_small").labels == dataset.labels  # beside the link
    monkeypatch.chdir(tmp_path)
    renamed = folder.rename(folder.with_name("renamed"))
    with pytest.raises(DatasetInvalid, match=r"Folders 000, 001 and on are FMA's audio"):
        load(renamed)


def test_msd_reads_annotations_by_track_id(tmp_path: Path) -> None:
    dataset = load(music.msd(tmp_path))
    assert (dataset.layout, dataset.kind) == ("msd", "single")
    assert dataset.labels == ("Jazz", "Rock")
    assert [clip.path.suffix for clip in dataset.clips if clip.path] == [".mp3"] * 11
    assert dataset.clips[0].group == "Artist 0"
    assert [skipped.name for skipped in dataset.skipped] == [music.TRACK_IDS[0]]


def test_minority_genres_of_msd_make_a_multi_label_task(tmp_path: Path) -> None:
    root = music.msd(tmp_path)
    told = ("New Age\tBlues", "Jazz\tJazz", "Jazz\t", "Blues")
    lines = (
        f"{track}\t{genres}\n" for track, genres in zip(music.TRACK_IDS[1:], told, strict=False)
    )
    (root / "msd_tagtraum.cls").write_text("".join(lines), encoding="utf-8-sig")
    dataset = load(root)
    labels = [("New Age", "Blues"), ("Jazz",), ("Jazz",), ("Blues",)]
    assert (dataset.kind, [clip.labels for clip in dataset.clips]) == ("multi", labels)


def test_previews_of_msd_may_be_where_a_link_leads(tmp_path: Path) -> None:
    root = music.msd(tmp_path / "disk")
    listed = tmp_path / "lists"
    listed.mkdir()
    for file in (root / "msd_tagtraum.cls", root / "unique_tracks.txt"):
        file.rename(listed / file.name)
    (listed / "previews").symlink_to(root)
    assert len(load(listed).clips) == 11


def test_of_two_previews_of_a_track_of_msd_the_second_is_named(tmp_path: Path) -> None:
    root = music.msd(tmp_path)
    first = next(root.rglob(f"{music.TRACK_IDS[1]}.mp3"))
    (root / "Z").mkdir()
    (root / "Z" / f"{music.TRACK_IDS[1]}.clip.mp3").write_bytes(b"another")
    dataset = load(root)
    assert dataset.clips[0].path == first
    second = f"Z/{music.TRACK_IDS[1]}.clip.mp3"
    assert dataset.skipped[1] == Skipped(second, "is a second preview of its track")


def test_space_around_artists_of_msd_makes_no_difference(tmp_path: Path) -> None:
    root = music.msd(tmp_path)
    told = (root / "unique_tracks.txt").read_text(encoding="utf-8").splitlines()
    spaced = [line.replace("<SEP>", "  <SEP> ") if n % 2 else line for n, line in enumerate(told)]
    (root / "unique_tracks.txt").write_text("\n".join(spaced) + "\n", encoding="utf-8")
    assert {clip.group for clip in load(root).clips} == {"Artist 0", "Artist 1", "Artist 2"}


def test_one_of_several_annotations_of_msd_is_named(tmp_path: Path) -> None:
    for track in music.TRACK_IDS[:2]:
        (tmp_path / f"{track}.mp3").write_bytes(track.encode())
    for name in ("first", "second"):
        told = "".join(f"{track}\t{name}\n" for track in music.TRACK_IDS[:2])
        (tmp_path / f"{name}.cls").write_text(told)
    with pytest.raises(DatasetInvalid, match=r"holds several \.cls files; name the one to use"):
        load(tmp_path)
    (tmp_path / "unique_tracks.txt").write_text(f"{music.TRACK_IDS[0]}<SEP>SO<SEP>Nina<SEP>x\n")
    dataset = load(tmp_path / "second.cls")
    assert (dataset.labels, [clip.group for clip in dataset.clips]) == (("second",), ["Nina"])
    assert dataset.skipped == (Skipped(music.TRACK_IDS[1], "has no artist in unique_tracks.txt"),)


def test_msd_without_artists_keeps_recordings_together(tmp_path: Path) -> None:
    root = music.msd(tmp_path, artists=False)
    first, other = sorted(root.rglob("*.mp3"))[:2]
    other.write_bytes(first.read_bytes())
    dataset = load(root)
    assert dataset.grouped_by == "recording"
    assert len({clip.group for clip in dataset.clips}) == len(dataset.clips) - 1


def test_folder_per_genre_takes_its_labels_from_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load(music.folders(tmp_path / "own"))
    monkeypatch.chdir(tmp_path / "own")
    assert load(Path()).name == dataset.name == "own"
    assert dataset.layout == "folders"
    assert dataset.labels == music.GENRES
    assert dataset.splits == ()
    assert len(dataset.indices()) == 10


def test_names_that_are_no_utf8_are_told_as_text(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"f\xeates")
    music.song(root / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xe9t\xe9.wav"), "jazz", 0)
    dataset = load(root)
    assert dataset.name == r"f\xeates"
    (clip,) = dataset.clips
    assert clip.name == r"caf\xe9/\xe9t\xe9.wav"
    assert clip.labels == dataset.labels == (r"caf\xe9",)
    assert clip.group.encode()
    source, _ = open_source(dataset.with_split(0), ARCHIVE_FRONT_END, tmp_path / "cache")
    assert len(source.clips) == 1


def test_a_folder_with_a_files_name_is_no_clip_nor_is_a_link_to_nothing(tmp_path: Path) -> None:
    for album in ("first.mp3", "second.mp3"):
        (tmp_path / "blues" / album).mkdir(parents=True)
        (tmp_path / "blues" / album / "song.mp3").write_bytes(album.encode())
    (tmp_path / "blues" / "gone.mp3").symlink_to("nothing")
    dataset = load(tmp_path)
    names = [clip.name for clip in dataset.clips]
    assert names == [f"blues/{album}/song.mp3" for album in ("first.mp3", "second.mp3")]
    assert dataset.labels == ("blues",)


def test_folders_under_split_names_are_splits(tmp_path: Path) -> None:
    music.folders(tmp_path / "train", 2)
    for genre in music.GENRES:
        music.song(tmp_path / "validation" / genre / "other.flac", genre, 9)
    dataset = load(tmp_path)
    assert dataset.splits == ("train", "valid")
    assert dataset.labels == music.GENRES
    assert len(dataset.indices("Validation")) == len(music.GENRES)  # as the folder is called


def test_a_folder_beside_those_of_the_split_is_named(tmp_path: Path) -> None:
    for name in ("train", "bonus", "notes"):
        (tmp_path / name / "blues").mkdir(parents=True)
    for file in ("train/blues/1.mp3", "bonus/blues/2.mp3", "notes/blues/read.me"):
        (tmp_path / file).write_bytes(file.encode())
    [skipped] = load(tmp_path).skipped
    assert (skipped.name, skipped.reason) == ("bonus", "is a folder beside train, but no split")


def test_audio_outside_the_folders_of_genres_is_named(tmp_path: Path) -> None:
    files = (
        ("blues/1.mp3", "loose.mp3", "notes.txt"),
        ("train/blues/1.mp3", "valid/loose.mp3", "loose.mp3"),
    )
    for root, names in zip((tmp_path / "plain", tmp_path / "split"), files, strict=True):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
    why = "is in no genre's folder"
    loose = Skipped("loose.mp3", why)
    assert load(tmp_path / "plain").skipped == (loose,)
    assert load(tmp_path / "split").skipped == (loose, Skipped("valid/loose.mp3", why, "valid"))


def huge(path: Path, middle: bytes) -> None:
    """A gigabyte of which the disk holds one block; whoever reads it all needs seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.seek(2**29)
        file.write(middle)
        file.truncate(2**30)


def test_files_of_one_size_are_told_apart_without_reading_them_whole(tmp_path: Path) -> None:
    for number in range(4):
        huge(tmp_path / "music" / "blues" / f"{number}.wav", b"music %d" % number)
    began_s = time.process_time()
    assert len({clip.group for clip in load(tmp_path / "music").clips}) == 4
    assert time.process_time() - began_s < 1


def test_files_of_known_artists_are_not_read(tmp_path: Path) -> None:
    for number in range(4):
        huge(tmp_path / f"{number}.wav", b"the same")
    lines = "path,label,artist\n", *(f"{number}.wav,blues,{number}\n" for number in range(4))
    (tmp_path / "list.csv").write_text("".join(lines))
    root = music.msd(tmp_path / "msd")
    for preview in root.rglob("*.mp3"):
        huge(preview, b"the same")
    began_s = time.process_time()
    assert load(tmp_path / "list.csv").grouped_by == load(root).grouped_by == "artist"
    assert time.process_time() - began_s < 1


def test_the_same_file_on_both_sides_is_refused(tmp_path: Path) -> None:
    music.folders(tmp_path / "train", 2)
    for genre in music.GENRES:
        music.song(tmp_path / "test" / genre / "other.flac", genre, 9)
    copied = tmp_path / "test" / "blues" / "renamed.mp3"
    copied.write_bytes((tmp_path / "train" / "blues" / "song 0.mp3").read_bytes())
    with pytest.raises(
        SplitLeaks, match=r"train/blues/song 0\.mp3.*test/blues/renamed\.mp3|renamed"
    ):
        load(tmp_path)


def test_manifest_has_artists_splits_and_names_missing_files(tmp_path: Path) -> None:
    dataset = load(music.manifest(tmp_path))
    assert dataset.layout == "manifest"
    assert dataset.grouped_by == "artist"
    assert [len(dataset.indices(split)) for split in ("train", "valid", "test")] == [6, 2, 2]
    why = "is in the manifest but not on disk"
    assert dataset.skipped == (Skipped("gone.mp3", why, "train"),)


def test_manifest_with_several_labels_is_a_multi_label_task(tmp_path: Path) -> None:
    dataset = load(music.manifest(tmp_path, several=True))
    assert dataset.kind == "multi"
    assert dataset.labels == ("blues", "loud", "metal")
    assert dataset.targets().sum() == 14


def listing(folder: Path, *lines: str) -> Path:
    """A manifest of such lines beside three files."""
    for number in range(3):
        (folder / f"x{number}.wav").write_bytes(bytes([number]))
    (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "list.csv"


@pytest.mark.parametrize("column", ["artist", "recording"])
def test_space_around_cells_of_a_manifest_makes_no_difference(tmp_path: Path, column: str) -> None:
    told = f"path,label,{column}", "x0.wav,a,same", "x1.wav, a ,same ", "x2.wav\t,b,  other "
    dataset = load(listing(tmp_path, *told))
    assert [clip.group for clip in dataset.clips] == ["same", "same", "other"]
    assert dataset.labels == ("a", "b")
    split = f"{told[0]},split", "x0.wav,a,same,train", "x1.wav,a,same , test ", "x2.wav,b,other,"
    with pytest.raises(SplitLeaks, match=r"same: train: x0\.wav \| test: x1\.wav"):
        load(listing(tmp_path, *split))
    beside = load(listing(tmp_path, *split[:2], "x1.wav,a,same,"))
    assert [clip.split for clip in beside.clips] == ["train", None], "in no split, on no side"


def test_a_clip_without_an_artist_is_grouped_by_its_recording(tmp_path: Path) -> None:
    told = "path,label,artist,recording,split", "x0.wav,a,,live,train", "x1.wav,b,,Live,test"
    with pytest.raises(SplitLeaks, match=r"1 recording.*live: train: x0\.wav \| test: x1\.wav"):
        load(listing(tmp_path, *told))
    dataset = load(listing(tmp_path, told[0], "x0.wav,a,Nina,one", "x1.wav,b,,two", "x2.wav,b"))
    assert [clip.group for clip in dataset.clips[:2]] == ["Nina", "two"]
    assert len({clip.group for clip in dataset.clips}) == 3
    (tmp_path / "copy.wav").write_bytes((tmp_path / "x2.wav").read_bytes())
    dataset = load(listing(tmp_path, "path,label", "x2.wav,a", "copy.wav,a", "x1.wav,b"))
    first, copy, other = (clip.group for clip in dataset.clips)
    assert first == copy != other


@pytest.mark.parametrize(
    "header", ["File,Genres,Song,my_split", "\ufefffilename,tags,artist_id,split"]
)
def test_columns_of_a_manifest_go_by_other_names_too(tmp_path: Path, header: str) -> None:
    told = "x0.wav,a|b,one,val", "x1.wav,b; a;;b,one,dev"
    dataset = load(listing(tmp_path, header, *told))
    assert [clip.labels for clip in dataset.clips] == [("a", "b"), ("b", "a")]
    assert {(clip.group, clip.split) for clip in dataset.clips} == {("one", "valid")}
    assert load(listing(tmp_path, "path,genre", "x0.wav,a|b")).labels == ("a|b",)


def test_artists_differ_neither_by_case_nor_by_space(tmp_path: Path) -> None:
    told = "path,label,artist", "x0.wav,a,Nina Simone", "x1.wav,b,NINA  SIMONE", "x2.wav,b,Nina"
    groups = [clip.group for clip in load(listing(tmp_path, *told)).clips]
    assert groups == ["Nina Simone", "Nina Simone", "Nina"]


def test_artists_and_labels_do_not_differ_by_how_accents_are_encoded(tmp_path: Path) -> None:
    composed, apart = "Beyonc\u00e9", "Beyonce\u0301"
    told = "path,label,artist,split", f"x0.wav,a,{composed},train", f"x1.wav,a,{apart},test"
    with pytest.raises(SplitLeaks, match=r"train: x0\.wav \| test: x1\.wav"):
        load(listing(tmp_path, *told))
    dataset = load(listing(tmp_path, "path,label", f"x0.wav,{apart}"))
    assert dataset.columns(["a", composed]) == {apart: 1}
    mixed = load(listing(tmp_path, "path,label", f"x0.wav,{apart}", f"x1.wav,{composed}"))
    assert f"{apart}, {composed} are taken for 2 labels, and differ in case or encoding alone" in (
        odd_labels(mixed)
    )


def test_a_line_of_a_manifest_with_a_comma_too_many_is_named(tmp_path: Path) -> None:
    path = listing(tmp_path, "path,label", 'x0.wav,"a, b"', "x1.wav,a, b")
    with pytest.raises(DatasetInvalid, match=r"list\.csv, line 3: more cells than the header"):
        load(path)


def test_a_manifest_of_very_many_columns_is_read_in_no_time(tmp_path: Path) -> None:
    header = ",".join(["path", "label", *(f"c{number}" for number in range(50_000))])
    began_s = time.process_time()
    with pytest.raises(DatasetInvalid, match="no labelled clip"):
        load(listing(tmp_path, header, "absent.wav,a"))
    assert time.process_time() - began_s < 5, "18 s where it grows with their square"


def test_two_columns_of_one_name_in_a_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"list\.csv has two columns label"):
        load(listing(tmp_path, "path,label, Label", "x0.wav,a,b"))
    assert load(listing(tmp_path, "path,label,,", "x0.wav,a,,")).labels == ("a",)


def test_the_column_split_is_the_split_before_others_of_such_names(tmp_path: Path) -> None:
    told = "path,label,old_split,split", "x0.wav,a,train,Testing", "x1.wav,b,valid,train"
    listing(tmp_path, *told).rename(tmp_path / "LIST.CSV")
    assert [clip.split for clip in load(tmp_path / "LIST.CSV").clips] == ["test", "train"]


def test_short_lines_of_a_manifest_lack_what_they_lack(tmp_path: Path) -> None:
    told = "path,label,artist,split", "x0.wav,a", "x1.wav", "x2.wav,,,val"
    dataset = load(listing(tmp_path, *told))
    assert [(clip.name, clip.split) for clip in dataset.clips] == [("x0.wav", None)]
    assert dataset.skipped == (
        Skipped("x1.wav", "has no label", None),
        Skipped("x2.wav", "has no label", "valid"),
    )


@pytest.mark.parametrize("again", ["x0.wav", "./x0.wav", "sub/../x0.wav", "{folder}//x0.wav"])
def test_one_file_twice_in_a_manifest_is_refused(tmp_path: Path, again: str) -> None:
    (tmp_path / "sub").mkdir()
    again = again.format(folder=tmp_path)
    path = listing(tmp_path, "path,label,split", "x0.wav,a,train", f"{again},b,test")
    with pytest.raises(DatasetInvalid, match=r"named twice.*x0\.wav"):
        load(path)


@pytest.mark.parametrize("layout", ["manifest", "fma"])
def test_an_artist_on_both_sides_is_refused_and_named(tmp_path: Path, layout: str) -> None:
    root = (
        music.manifest(tmp_path, leak=True)
        if layout == "manifest"
        else music.fma(tmp_path, leak=True)
    )
    with pytest.raises(SplitLeaks) as refused:
        load(root)
    named = "song 0.flac" if layout == "manifest" else "000002"
    assert "artist" in refused.value.message
    assert named in refused.value.message or "song 0.mp3" in refused.value.message


@pytest.mark.parametrize("split", ["test", "holdout"])
def test_archive_takes_any_names_of_splits(tmp_path: Path, split: str) -> None:
    dataset = load(music.archive(tmp_path / "a.npz", split=split))
    assert dataset.layout == "archive"
    assert dataset.splits == (split,)
    assert len(dataset.indices()) == 12


def test_archive_without_splits_has_all_clips(tmp_path: Path) -> None:
    path = music.archive(tmp_path / "a.npz", optional=False)
    with np.load(path) as stored:
        np.savez(path, **(dict(stored) | {"names": np.arange(12)}))
    dataset = load(path)
    assert len(dataset.indices()) == 12
    assert dataset.splits == ()
    assert dataset.logmels is not None
    assert dataset.logmels.values.shape == (12, 128, 241)
    some = dataset.only([3, 1])
    assert [clip.name for clip in some.clips] == ["3", "1"]
    assert some.logmels is not None
    np.testing.assert_array_equal(some.logmels.values, dataset.logmels.values[[3, 1]])


def test_an_archive_of_gtzans_songs_without_splits_has_the_fault_filtered_one(
    tmp_path: Path,
) -> None:
    dataset = load(music.archive(tmp_path / "a.npz", optional=False))
    split = fault_filtered_split()
    assert [clip.split for clip in dataset.clips] == [split[clip.name] for clip in dataset.clips]
    assert dataset.splits == ("train", "valid")


def test_texts_of_an_archive_may_be_bytes_and_one_split_all_of_it(tmp_path: Path) -> None:
    def text(*values: str) -> np.ndarray:
        return np.array([value.encode() for value in values])

    plain = load(music.archive(tmp_path / "a.npz", split="test"))
    names = text(*(clip.name for clip in plain.clips))
    split: Any
    for split in (text(*["Testing"] * 12), np.array(b"test"), np.array("test")):
        path = edited(tmp_path / "a.npz", genres=text(*music.GENRES), names=names, split=split)
        dataset = load(path)
        assert (dataset.clips, dataset.labels) == (plain.clips, plain.labels)
    pickled = np.array(["blues", "metal"], object)
    with pytest.raises(DatasetInvalid, match="plain arrays"):
        load(edited(tmp_path / "a.npz", genres=pickled))


def test_clips_of_an_archive_without_a_label_are_skipped(tmp_path: Path) -> None:
    y = np.repeat([[1, 1], [0, 1], [0, 0]], 4, axis=0)
    path = edited(tmp_path / "a.npz", y=y)
    dataset = load(path)
    assert len(dataset.clips) == 8
    assert {skipped.reason for skipped in dataset.skipped} == {"has no label"}
    assert dataset.skipped[0].name == "blues.00008"
    assert dataset.logmels is not None
    with np.load(path) as stored:
        assert (dataset.logmels.values == stored["X"][:8]).all()


def edited(path: Path, **changes: Any) -> Path:
    """An archive of 12 clips of two genres with some arrays exchanged."""
    with np.load(music.archive(path)) as stored:
        np.savez(path, **(dict(stored) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"y": np.full(12, 2)}, "whole numbers from 0 to 1"),
        ({"y": np.full(12, -1)}, "whole numbers from 0 to 1"),
        ({"y": np.full(12, 0.5)}, "whole numbers from 0 to 1"),
        ({"y": np.full(12, np.nan)}, "whole numbers from 0 to 1"),
        ({"y": np.full(12, "metal")}, "whole numbers from 0 to 1"),
        ({"y": np.ones((12, 3), int)}, "zeros and ones, a column for each of the 2 genres"),
        ({"y": np.ones((12, 1), int)}, "it has 1 columns of int64"),
        ({"y": np.full((12, 2), 2)}, "zeros and ones"),
        ({"y": np.full((12, 2), np.nan)}, "zeros and ones"),
        ({"y": np.ones((12, 2, 1), int)}, "don't belong together"),
        ({"y": np.array(1)}, "don't belong together"),
        ({"names": np.array("blues.00000")}, "don't belong together"),
        ({"X": np.zeros((0, 128, 241), np.uint8)}, "don't belong together"),
        ({"genres": np.array("blues")}, "don't belong together"),
        ({"names": np.array([*"abcdefghijkk"])}, "named twice: k"),
        ({"X": np.zeros((12, 128, 0), np.uint8)}, "X must be finite numbers"),
        ({"X": np.full((12, 128, 80), np.nan)}, "X must be finite numbers"),
        ({"X": np.full((12, 128, 80), "loud")}, "X must be finite numbers"),
        ({"genres": np.array([1, 2])}, "genres must be text"),
        ({"genres": np.array(["blues", "blues"])}, "each of them once"),
    ],
)
def test_arrays_that_say_nothing_of_their_clips_are_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(DatasetInvalid) as refused:
        load(edited(tmp_path / "a.npz", **changes))
    assert told in refused.value.message


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32])
def test_positions_and_columns_of_an_archive_are_its_genres(tmp_path: Path, dtype: type) -> None:
    one = load(edited(tmp_path / "a.npz", y=np.array([1, 0] * 6, dtype)))
    assert [clip.labels for clip in one.clips[:2]] == [("metal",), ("blues",)]
    several = load(edited(tmp_path / "b.npz", y=np.array([[1, 1], [0, 1]] * 6, dtype)))
    assert [clip.labels for clip in several.clips[:2]] == [("blues", "metal"), ("metal",)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"file;genre\n", "commas; its first line has file;genre"),
        ("b.csv", b"", "its first line has none"),
        ("c.csv", b"\xff\xfe\x00", "c.csv can't be read in layout 'manifest'"),
        ("d.csv", b"path,label\ngone.mp3,a\n", "left out: gone.mp3: is in the manifest but not"),
        ("e.csv", b"path,label\n,a\n", "left out: a clip: has no path in its line"),
        ("f.npz", b"\x80\x04no archive", "f.npz is no .npz archive of plain arrays"),
        ("g.txt", b"music", "a folder of folders of audio"),
        ("h.cls", b"x\tRock\n", "h.cls, line 1: not a track id, a tab and a genre"),
        (
            "i.cls",
            b"TRAAAAA128F9300000\tRock\nTRAAAAA128F9300001\t\n",
            "i.cls, line 2: not a track id, a tab and a genre",
        ),
        ("j.csv", b"path,label\n" + b"x" * 200_000, "j.csv can't be read in layout 'manifest'"),
    ],
)
def test_a_file_that_is_no_data_set_is_refused_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetInvalid) as refused:
        load(tmp_path / name)
    assert told in refused.value.message


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("archive", "no .npz archive"),
        ("manifest", "Is a directory"),
        ("fma", "none of fma_small"),
        ("msd", "no .cls file"),
        ("gtzan", "no genres/GENRE"),
        ("folders", "no labelled clip found"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, layout: str, told: str) -> None:
    with pytest.raises(DatasetInvalid) as refused:
        load(tmp_path, layout)
    assert told in refused.value.message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("15,small", r"line 18: 2 columns, the header has 6"),
        ("15,small,test,9,Rock,[12", r"genres_all '\[12'"),
        ("15,small,test,9,Rock,12", r"genres_all '12'"),
        ("15,small,test,9,Rock,[13]", r"genres_all '\[13\]': KeyError\(13\)"),
    ],
)
def test_a_broken_line_of_fmas_tracks_is_named(tmp_path: Path, line: str, told: str) -> None:
    folder = music.fma(tmp_path)
    with (tmp_path / "fma_metadata" / "tracks.csv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DatasetInvalid, match=told):
        load(folder, "fma-all")


@pytest.mark.parametrize(
    ("table", "content", "told"),
    [
        ("genres", "id,title\n12,Rock\n", r"genres\.csv has no column genre_id"),
        ("genres", "genre_id,name\n12,Rock\n", r"genres\.csv has no column title"),
        ("genres", "", r"genres\.csv has no column genre_id, title"),
        ("genres", "title,genre_id\nRock\n", "can't be read in layout 'fma-all'"),
        (
            "tracks",
            ",set,set,track\n,split,subset,genres_all\n",
            r"tracks\.csv has no column artist\.id, track\.genre_top$",
        ),
        ("tracks", "", r"tracks\.csv has no column .*, set\.split, set\.subset, .*genres_all$"),
    ],
)
def test_fmas_tables_without_their_columns_are_refused(
    tmp_path: Path, table: str, content: str, told: str
) -> None:
    folder = music.fma(tmp_path)
    (tmp_path / "fma_metadata" / f"{table}.csv").write_text(content)
    with pytest.raises(DatasetInvalid, match=told):
        load(folder, "fma-all")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK no archive")
    with pytest.raises(DatasetInvalid):
        load(tmp_path / "bad.npz")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DatasetInvalid, match=r"no \.npz archive"):
        load(tmp_path / "array.npz")
    np.savez(tmp_path / "short.npz", X=np.zeros((2, 128, 72), np.uint8))
    with pytest.raises(DatasetInvalid, match="y, names, genres"):
        load(tmp_path / "short.npz")
    np.savez(tmp_path / "vast.npz", y=0, names=0, genres=0)
    with ZipFile(tmp_path / "vast.npz", "a") as archive, archive.open("X.npy", "w") as file:
        vast = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 128, 722)}
        np.lib.format.write_array_header_1_0(file, vast)
    with pytest.raises(DatasetInvalid, match="don't fit into memory"):
        load(tmp_path / "vast.npz")


def test_layouts_are_found_out_or_forced(tmp_path: Path) -> None:
    root = music.gtzan(tmp_path)
    assert detect(root) == "gtzan"
    assert load(root / "genres", "folders").layout == "folders"
    for genres in (("808", "techno"), ("1980", "1990")):
        for genre in genres:
            (tmp_path / genres[0] / genre / "album").mkdir(parents=True)
            (tmp_path / genres[0] / genre / "album" / "song.mp3").touch()
        assert detect(tmp_path / genres[0]) == "folders"
    (tmp_path / "A.NPZ").touch()
    assert detect(tmp_path / "A.NPZ") == "archive"
    with pytest.raises(DatasetInvalid, match="known"):
        load(root, "nonsense")
    with pytest.raises(DatasetInvalid, match="does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetInvalid, match="--layout"):
        load(tmp_path / "empty")
    assert set(LAYOUTS) == {"archive", "manifest", "fma", "fma-all", "msd", "gtzan", "folders"}


def test_a_made_split_keeps_groups_together_and_labels_on_every_side() -> None:
    clips = tuple(
        Clip(f"{label}{n}", (label,), f"artist {n // 2} of {label}")
        for label in ("a", "b", "c")
        for n in range(40)
    )
    dataset = Dataset("x", "folders", "single", ("a", "b", "c"), clips, "artist", "none")
    split = dataset.with_split(seed=1).check_split()
    assert split == dataset.with_split(seed=1)
    assert split != dataset.with_split(seed=2)
    by_side = Counter((clip.split, clip.labels[0]) for clip in split.clips)
    assert all(26 <= by_side["train", label] <= 30 for label in "abc")
    assert all(4 <= by_side[side, label] <= 8 for side in ("valid", "test") for label in "abc")


@pytest.mark.parametrize("seed", range(10))
def test_one_artist_with_much_music_fills_no_small_side(seed: int) -> None:
    clips = tuple(Clip(f"{n}", ("a",), "busy" if n < 12 else f"{n}") for n in range(40))
    dataset = Dataset("x", "folders", "single", ("a",), clips, "artist", "none").with_split(seed)
    sides = [len(dataset.indices(side)) for side in ("train", "valid", "test")]
    assert sides == [28, 6, 6]


def test_many_recordings_are_split_in_no_time() -> None:
    clips = tuple(Clip(f"{n}", ("ab"[n % 2],), f"{n}") for n in range(30_000))
    dataset = Dataset("many", "folders", "single", ("a", "b"), clips, "recording", "none")
    began_s = time.process_time()
    assert dataset.with_split(0).splits == ("train", "valid", "test")
    assert time.process_time() - began_s < 3, "7 s where it grows with their square"


def test_audio_becomes_log_mels_once_and_unreadable_clips_are_named(tmp_path: Path) -> None:
    root = music.folders(tmp_path / "own", 2)
    (root / "blues" / "broken.mp3").write_bytes(b"\0" * 500)
    dataset = load(root).with_split(0)
    source, readable = open_source(dataset, ARCHIVE_FRONT_END, tmp_path / "cache")
    assert [skipped.name for skipped in readable.skipped] == ["blues/broken.mp3"]
    assert len(source.clips) == len(readable.clips) == 4
    windows = source.windows(0)
    assert windows.shape == (2, 72, 128)
    assert abs(float(windows.mean())) < 1e-3
    stored = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    open_source(dataset, ARCHIVE_FRONT_END, tmp_path / "cache")
    assert stored == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    music.song(root / "blues" / "song 0.mp3", "metal", 0)
    source, _ = open_source(dataset, ARCHIVE_FRONT_END, tmp_path / "cache")
    assert set(source.clips) - stored.keys(), "a file that was exchanged is heard anew"
    narrower = ARCHIVE_FRONT_END.model_copy(update={"f_max_hz": 8_000.0})
    other, _ = open_source(dataset, narrower, tmp_path / "cache")
    assert not np.array_equal(other.clip(0), source.clip(0)), "each front end has its own"


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Ten descriptors more than the lowest that is free."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_clips_may_be_more_than_files_that_can_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_descriptors: None
) -> None:
    monkeypatch.setattr(
        "model.datasets.logmels.samples_of", lambda *_: np.zeros(22_050 * 4, np.float32)
    )
    clips = tuple(Clip(f"{n}", ("a",), f"{n}", "train", tmp_path / f"{n}") for n in range(40))
    for clip in clips:
        assert clip.path is not None
        clip.path.touch()
    dataset = Dataset("many", "folders", "single", ("a",), clips, "recording", "none")
    source, _ = open_source(dataset, ARCHIVE_FRONT_END, tmp_path / "cache")
    assert source.excerpts(torch.arange(40), 72, torch.zeros(40)).shape == (40, 72, 128)
    assert [len(source.windows(row)) for row in range(40)] == [1] * 40


def test_log_mels_do_not_depend_on_where_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(0).standard_normal(22_050 * 12).astype(np.float32) * 0.1
    whole = logmel_of(samples, ARCHIVE_FRONT_END)
    monkeypatch.setattr("model.datasets.logmels.BLOCK_S", 2.7)
    np.testing.assert_array_equal(logmel_of(samples, ARCHIVE_FRONT_END), whole)


def test_log_mels_of_audio_get_their_floor_and_those_of_an_archive_have_it(tmp_path: Path) -> None:
    levels = np.linspace(-100.0, 30.0, 72 * 128, dtype=np.float32).reshape(72, 128)
    source = LogMelSource([levels], ARCHIVE_FRONT_END, ARCHIVE_FRONT_END.range_db)
    cut = source.excerpts(torch.tensor([0]), 72, torch.tensor([0.0]))[0]
    for made in (source.whole(0), cut):
        np.testing.assert_array_equal(made.numpy(), np.maximum(levels, -50.0))
    torch.testing.assert_close(source.windows(0)[0], normalise(source.whole(0)))
    archive = load(music.archive(tmp_path / "a.npz"))
    stored, _ = open_source(archive, ARCHIVE_FRONT_END, tmp_path / "cache")
    assert stored.range_db is None


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate_hz": 44_100},
        {"n_fft": 1_024},
        {"hop": 512},
        {"n_mels": 96},
        {"f_max_hz": 8_000.0},
        {"compression": "musicnn"},
        {"normalise": False},
    ],
)
def test_an_archive_is_for_front_ends_that_make_what_it_holds(change: dict[str, Any]) -> None:
    held = LogMels(np.zeros((1, 128, 72), np.uint8))
    assert makes(ARCHIVE_FRONT_END.model_copy(update={"frames": 144}), held)
    assert not makes(ARCHIVE_FRONT_END.model_copy(update=change), held)


def test_excerpts_begin_anywhere_that_they_end_inside_the_clip() -> None:
    ramp = np.repeat(np.arange(100, dtype=np.float32)[:, None], 128, 1)
    source = LogMelSource([ramp], ARCHIVE_FRONT_END)
    cut = source.excerpts(torch.zeros(3, dtype=torch.long), 72, torch.tensor([0.0, 0.5, 0.999]))
    assert cut[:, 0, 0].tolist() == [0, 14, 28]
    assert cut[:, -1, 0].tolist() == [71, 85, 99]


def test_of_a_long_file_the_first_minutes_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.datasets.logmels.MAX_CLIP_S", 2.0)
    assert len(samples_of(music.song(tmp_path / "a.wav", "blues", 0), 16_000)) == 32_000


def test_clips_shorter_than_a_window_are_repeated() -> None:
    short = np.arange(30 * 128, dtype=np.float32).reshape(30, 128)
    windows = LogMelSource([short], ARCHIVE_FRONT_END).windows(0)
    assert windows.shape == (1, 72, 128)
    np.testing.assert_allclose(windows[0, 30:60], windows[0, :30], atol=1e-6)
    cut = LogMelSource([short], ARCHIVE_FRONT_END).excerpts(
        torch.zeros(1).long(), 72, torch.rand(1)
    )
    np.testing.assert_array_equal(cut[0], np.tile(short, (3, 1))[:72])

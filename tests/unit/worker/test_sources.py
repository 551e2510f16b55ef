import os
from pathlib import Path

import pytest

from worker.commands.sources import audio, track_id, tracks
from worker.errors import SourceInvalid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.MP3", "a.flac", "cover.jpg", "disc 2/ä #1.ogg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_folder_is_walked_for_audio_in_order_of_names(folder: Path) -> None:
    assert [shown for shown, _ in audio(str(folder))] == [
        str(folder / name) for name in ("a.flac", "b.MP3", "disc 2/ä #1.ogg")
    ]


def test_a_folder_is_walked_for_every_kind_of_music_file(tmp_path: Path) -> None:
    files = [
        tmp_path / f"a.{suffix}"
        for suffix in (
            "8svx", "aac", "ac3", "aifc", "amr", "ape", "au", "caf", "dsf", "dts", "eac3", "flac",
            "m4a", "mka", "mlp", "mp1", "mpc", "ogg", "oma", "qoa", "ra", "shn", "sox", "spx",
            "tak", "thd", "tta", "voc", "w64", "wav", "wma", "wsd", "wv", "xwma",
        )
    ]  # fmt: skip
    for file in files:
        file.write_bytes(b"")
    assert [shown for shown, _ in audio(str(tmp_path))] == [str(file) for file in files]


def test_a_folder_named_like_audio_is_walked_and_what_macos_adds_is_left_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "Live.mp3").mkdir()
    for name in ("Live.mp3/song.mp3", "Live.mp3/._song.mp3", "._cover.wav"):
        (tmp_path / name).write_bytes(b"")
    assert [shown for shown, _ in audio(str(tmp_path))] == [str(tmp_path / "Live.mp3/song.mp3")]


def test_a_file_becomes_an_address_that_any_character_survives(folder: Path) -> None:
    [(_, uri)] = audio(str(folder / "disc 2/ä #1.ogg"))
    assert uri.startswith("file:///")
    assert uri.endswith("/disc%202/%C3%A4%20%231.ogg")


def test_a_url_is_taken_as_it_is() -> None:
    assert list(audio("s3://bucket/a b.mp3")) == [("s3://bucket/a b.mp3", "s3://bucket/a b.mp3")]


@pytest.mark.parametrize("source", ["/nowhere/a.mp3", ".git-no-such"])
def test_what_is_not_there_is_named(source: str) -> None:
    with pytest.raises(SourceInvalid, match=source):
        list(tracks([source]))


def test_an_empty_source_is_not_the_current_folder() -> None:
    with pytest.raises(SourceInvalid, match="without a name: give a file"):
        list(tracks([""]))


def test_a_source_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp3")
    with pytest.raises(SourceInvalid, match=r"a\.mp3 is not a regular file"):
        list(tracks([str(tmp_path / "a.mp3")]))


def test_a_name_that_no_file_can_have_is_an_error_of_that_source_alone() -> None:
    with pytest.raises(SourceInvalid, match="can't be read: File name too long"):
        list(audio("a" * 300 + ".mp3"))


def test_an_address_that_cannot_be_read_is_told() -> None:
    with pytest.raises(SourceInvalid, match=r"^file://\[x: .*IPv6"):
        list(tracks(["file://[x"]))


def test_a_table_is_offered_only_where_one_is_taken() -> None:
    with pytest.raises(SourceInvalid, match="give a file, a folder, a URL or a CSV table"):
        list(tracks(["absent.mp3"]))
    with pytest.raises(SourceInvalid, match="give a file, a folder or a URL"):
        list(audio("absent.mp3"))


def test_an_address_of_another_scheme_is_not_taken_for_a_file() -> None:
    with pytest.raises(SourceInvalid, match=r"ftp://a/b.mp3 can't be fetched"):
        list(tracks(["ftp://a/b.mp3"]))


@pytest.mark.parametrize(
    ("rest", "fault"),
    [
        ("x" * 8192, "x…: uri: .* at most 8192 characters"),
        ("a\tb.mp3", "a\tb.mp3: uri: "),
        (os.fsdecode(b"\xe4.mp3"), "\udce4.mp3: uri: "),
    ],
    ids=["too long", "a tab", "not UTF-8"],
)
def test_an_address_that_no_event_can_hold_is_named_with_the_fault(rest: str, fault: str) -> None:
    with pytest.raises(SourceInvalid, match=f"^https://cdn.example/.*{fault}") as raised:
        list(tracks([f"https://cdn.example/{rest}"]))
    assert len(raised.value.message) < 400


def test_a_folder_without_audio_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match="no audio"):
        list(audio(str(tmp_path)))


def test_a_track_id_is_readable_and_the_same_each_time() -> None:
    uri = "https://cdn.example/Music/My%20Song.mp3?v=2"
    assert track_id(uri) == track_id(uri)
    assert track_id(uri).startswith("my-song-")
    assert track_id(uri) != track_id(uri.replace("v=2", "v=3"))
    assert len(track_id("https://cdn.example/" + "x" * 500)) < 100
    assert track_id("https://cdn.example/")


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("01 - song.mp3", "01-song"),
        ("Größe & 1%#?.flac", "grosse-1"),
        ("Sigur Rós – Ágætis.ogg", "sigur-ros-ag-tis"),
    ],
)
def test_a_files_track_id_is_made_of_the_letters_of_its_name(name: str, readable: str) -> None:
    named, _, digest = track_id(Path("/music", name).as_uri()).rpartition("-")
    assert named == readable
    assert len(digest) == 8


def test_the_same_file_makes_the_same_event(folder: Path) -> None:
    assert list(tracks([str(folder)])) == list(tracks([str(folder)]))
    first = next(tracks([str(folder)]))
    assert first.uploaded_at is not None
    assert first.priority == "upload"


def test_backfill_is_the_tracks_priority(folder: Path) -> None:
    assert {track.priority for track in tracks([str(folder)], "backfill")} == {"backfill"}


def test_a_table_names_tracks_with_ids_and_metadata(folder: Path) -> None:
    table = folder / "tracks.csv"
    table.write_text(
        "path, track_id,artist,year\na.flac, t-1,Ada,1999\nhttps://cdn.example/b.mp3,,Bo,\n",
        encoding="utf-8-sig",
    )
    first, second = tracks([str(table)])
    assert first.track_id == "t-1"
    assert first.audio.uri == (folder / "a.flac").as_uri()
    assert first.metadata == {"artist": "Ada", "year": "1999"}
    assert second.track_id == track_id("https://cdn.example/b.mp3")
    assert second.metadata == {"artist": "Bo"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("title\nx\n", "no column"),
        ("uri\n\n \n", "line 3: no uri"),
        ("uri,sha256\nhttps://a/b,zz\n", "line 2: sha256"),
        ("uri\nhttps://a/b,more\n", "line 2: more cells"),
        ("uri\nftp://a/b.mp3\n", "line 2: ftp://a/b.mp3 can't be fetched"),
        ("path\na\0.mp3\n", "line 2: a\0.mp3 can't be fetched"),
    ],
)
def test_a_faulty_table_names_the_line_and_the_fault(tmp_path: Path, text: str, fault: str) -> None:
    table = tmp_path / "tracks.csv"
    table.write_text(text)
    with pytest.raises(SourceInvalid, match=fault):
        list(tracks([str(table)]))


def test_a_table_may_name_what_only_the_worker_finds_missing(tmp_path: Path) -> None:
    (tmp_path / "circle.mp3").symlink_to("circle.mp3")
    table = tmp_path / "tracks.csv"
    table.write_text("path\nabsent.mp3\ncircle.mp3\n")
    found = [track.audio.uri for track in tracks([str(table)])]
    assert found == [(tmp_path / name).as_uri() for name in ("absent.mp3", "circle.mp3")]


def test_a_table_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    table = tmp_path / "tracks.csv"
    table.write_bytes(b"\xff\xfe\x00uri")
    with pytest.raises(SourceInvalid, match="can't be read"):
        list(tracks([str(table)]))

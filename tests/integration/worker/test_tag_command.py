import csv
import json
import os
import pty
import shlex
import signal
import subprocess
import time
import weakref
from pathlib import Path

import pytest

from model.bundle import Bundle
from tests.audio import damaged, encode, tone
from tests.command import timbre
from tests.worker_process import TIMBRE
from worker.analysis import Analysis
from worker.commands import tag
from worker.commands.tag import CSV_COLUMNS, Outcome, tag_tracks
from worker.demo.music import Sample
from worker.errors import SourceInvalid
from worker.settings import Settings


@pytest.fixture(scope="session")
def settings(given_settings: Settings) -> Settings:
    """With the bundle that answers sooner: what it says makes no difference here."""
    worker = given_settings.worker.model_copy(update={"bundle": "fast"})
    return given_settings.model_copy(update={"worker": worker})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tracks that can be tagged around two that can't."""
    folder = tmp_path_factory.mktemp("files")
    first = encode(folder / "long.flac", tone(40, 44_100), 44_100, muxer="flac", codec="flac")
    second = encode(folder / "short.mp3", tone(4, 44_100), 44_100, muxer="mp3", codec="libmp3lame")
    (folder / "text.mp3").write_text("This is no music.")
    return [str(first), str(folder / "text.mp3"), str(folder / "absent.ogg"), str(second)]


def test_json_has_a_line_for_each_file_in_the_order_given(files: list[str]) -> None:
    done = subprocess.run(
        [TIMBRE, "tag", "--json", *files], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["source"] for line in lines] == files
    tagged, broken, absent, _ = lines
    assert tagged["error"] is None
    assert tagged["uncertain"] in {True, False}
    scores = [tag["score"] for tag in tagged["tags"] if tag["head"] == "genre"]
    assert scores == sorted(scores, reverse=True)
    assert {"head", "label", "score", "share"} <= tagged["tags"][0].keys()
    assert tagged["windows"]["total"] == 14
    assert tagged["audio"]["duration_s"] == pytest.approx(40, abs=0.01)
    assert broken["tags"] == absent["tags"] == []
    assert broken["error"].keys() == {"code", "message"}
    assert absent["error"]["code"] == "source_invalid"
    assert done.returncode == 1


@pytest.mark.parametrize("ends", ["2>&-", "<&- >&- 2>&-"])
def test_files_are_tagged_also_where_standard_ones_are_closed(files: list[str], ends: str) -> None:
    command = shlex.join([str(TIMBRE), "tag", "--json", files[-1]])
    done = subprocess.run(["sh", "-c", f"{command} {ends}"], capture_output=True, check=False)
    assert done.returncode == 0


def test_what_is_shown_is_let_go(
    files: list[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large collection it takes gigabytes."""
    shown: list[weakref.ref[Analysis]] = []
    kept: list[int] = []

    def show(outcome: Outcome) -> None:
        assert outcome.analysis is not None
        kept.append(sum(earlier() is not None for earlier in shown))
        shown.append(weakref.ref(outcome.analysis))

    monkeypatch.setattr(tag, "_write_json", show)
    assert tag_tracks(settings, [files[3]] * 6, form="json") == 0
    assert len(kept) == 6
    assert max(kept) <= 2, "a few that the interpreter still holds, and not all"


def test_every_odd_file_of_others_is_a_result_or_a_typed_error(
    shared_data: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = sorted(str(path) for path in (shared_data / "audio" / "odd").rglob("*") if path.is_file())
    tag_tracks(settings, odd, form="json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["source"] for line in lines] == odd
    codes = {line["source"]: line["error"] and line["error"]["code"] for line in lines}
    assert set(codes.values()) <= {None, "audio_unreadable", "audio_empty", "track_silent"}, codes
    assert sum(code in {None, "track_silent"} for code in codes.values()) > len(odd) / 2, "decoded"
    assert all(bool(line["tags"]) is (line["error"] is None) for line in lines)


def test_packets_that_were_skipped_are_told(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = damaged(tmp_path / "scratched.m4a", share=0.2)
    assert tag_tracks(settings, [str(file)], form="json") == 0
    assert json.loads(capsys.readouterr().out)["audio"]["damaged_packets"] > 5


@pytest.mark.parametrize(("form", "encoding"), [("--json", "utf-8"), ("--csv", "ascii")])
def test_a_name_that_the_output_cannot_hold_is_escaped(
    files: list[str], tmp_path: Path, form: str, encoding: str
) -> None:
    file = tmp_path / os.fsdecode(b"\xff.mp3")
    file.write_bytes(Path(files[3]).read_bytes())
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run(
        [TIMBRE, "tag", form, file], capture_output=True, text=True, check=True, env=environment
    )
    assert r"\udcff.mp3" in done.stdout
    if form == "--json":
        assert json.loads(done.stdout)["source"] == str(file)


def test_an_interrupt_while_the_network_runs_ends_it_without_a_word(
    music_files: list[Sample],
) -> None:
    much = 20 * [str(sample.path) for sample in music_files]  # for seconds of computing
    terminal, stderr = pty.openpty()
    try:
        with subprocess.Popen(
            [TIMBRE, "tag", "--json", *much],
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        ) as process:
            try:
                shown = b""
                while b"Tagging" not in shown:
                    shown += os.read(terminal, 65_536)
                time.sleep(0.4)
                os.killpg(process.pid, signal.SIGINT)
                assert process.wait(60) == 130
            finally:
                process.kill()
        shown += os.read(terminal, 65_536)
    finally:
        os.close(terminal)
        os.close(stderr)
    assert b"terminate" not in shown
    assert b"Traceback" not in shown


def test_the_status_is_0_when_all_were_tagged(
    settings: Settings, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tag_tracks(settings, [files[0], files[3]]) == 0
    shown = capsys.readouterr().out
    assert files[0] in shown
    assert "0:40" in shown
    assert "genre" in shown


def test_the_table_shows_of_each_head_the_best_tags_alone(
    settings: Settings, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tag_tracks(settings, [files[0]], form="json") == 0
    tags = json.loads(capsys.readouterr().out)["tags"]
    assert tag_tracks(settings, [files[0]]) == 0
    shown = capsys.readouterr().out
    clear = 0
    for head in ("genre", "tags"):
        scores = [tag["score"] for tag in tags if tag["head"] == head]
        clear += 1 + sum(score >= 0.05 for score in scores[1:10])
    assert shown.count("%") == clear < len(tags) == 60


def test_csv_has_a_row_for_each_tag_and_each_error(
    settings: Settings, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tag_tracks(settings, files, form="csv") == 1
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert list(dict.fromkeys(row["source"] for row in rows)) == files
    by_source = {row["source"]: row for row in rows}
    assert by_source[files[1]]["error"]
    assert 0 <= float(by_source[files[0]]["score"]) <= 1


@pytest.mark.parametrize("form", ["table", "csv", "json"])
@pytest.mark.parametrize("equals", ["=", "\uff1d"])
def test_a_name_steers_neither_a_terminal_nor_a_spreadsheet(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    form: str,
    equals: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{equals}HYPERLINK(A1)\x1b[2J\n\u202e.mp3"
    Path(name).write_text("This is no music.")
    assert tag_tracks(settings, [name], form=form) == 1
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.split("\n"))
    assert r"HYPERLINK(A1)\u001b[2J" in shown
    if form == "csv":
        assert next(csv.DictReader(shown.splitlines()))["source"].startswith(f"'{equals}")


def test_what_goes_into_a_file_stays_out_of_the_terminal_with_the_bar(files: list[str]) -> None:
    terminal, stderr = pty.openpty()
    try:
        done = subprocess.run(
            [TIMBRE, "tag", "--csv", *files[1:3]],
            stdout=subprocess.PIPE,
            stderr=stderr,
            check=False,
        )
        shown = os.read(terminal, 65_536)
    finally:
        os.close(terminal)
        os.close(stderr)
    assert b"Tagging" in shown
    assert files[1].encode() not in shown
    assert files[1] in done.stdout.decode()


def test_a_folder_is_walked_and_each_file_named(
    settings: Settings, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(files[0]).parent
    tag_tracks(settings, [str(folder)], form="json")
    sources = [json.loads(line)["source"] for line in capsys.readouterr().out.splitlines()]
    assert sources == sorted(str(path) for path in folder.iterdir())


def test_plots_are_drawn_beside_one_another_or_into_the_one_named(
    settings: Settings,
    music_files: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [music_files[0].genre, os.fsdecode(b"\xff")]
    chosen = [str(music_files[0].path), f"{names[1]}.mp3"]
    Path(chosen[1]).symlink_to(music_files[1].path)
    assert tag_tracks(settings, chosen, form="json", plot=True) == 0
    drawn = {path.name: path.read_bytes()[:4] for path in tmp_path.glob("*.png")}
    assert drawn == {f"{name}.taggram.png": b"\x89PNG" for name in names}
    assert tag_tracks(settings, [*chosen, "both.svg"], form="json", plot=True) == 0
    assert tag_tracks(settings, [*chosen, "both.svg"], form="json", plot=True) == 0
    assert "both.svg" in {path.name for path in tmp_path.iterdir()}


def test_files_of_one_name_have_a_picture_each_numbered_in_the_order_given(
    settings: Settings,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a/01.mp3", "b/01.mp3", "b/01.flac", "01-2.mp3"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(Path(files[3]).read_bytes())
    assert tag_tracks(settings, names, form="json", plot=True) == 0
    drawn = [f"{name}.taggram.png" for name in ("01", "01-3", "01-4", "01-2")]
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == drawn, (
        "01-2.mp3 is alone with its name and keeps it"
    )
    assert {path.name for path in tmp_path.glob("*.png")} == set(drawn)


def test_the_command_does_as_its_options_say(
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tag(*options: str) -> int:
        return timbre(monkeypatch, "tag", *options, "--model", "fast", files[3])

    monkeypatch.chdir(tmp_path)
    assert tag("--csv") == 0
    assert capsys.readouterr().out.splitlines()[0] == ",".join(CSV_COLUMNS)
    assert tag("--json", "--plot") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["model"]["name"] == Bundle.load("fast").name
    assert len(line["taggram"]["genre"]) == line["windows"]["total"]
    assert [path.name for path in tmp_path.iterdir()] == ["short.taggram.png"]
    assert tag("--csv", "--json") == 1
    assert "Choose one" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error_before_anything_is_tagged(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert timbre(monkeypatch, "tag", "--model", "no-such-model", *files) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("timbre: ")


@pytest.mark.parametrize("pictures", [["cover.png"], ["new.png", "new.pdf"], ["absent/a.png"]])
def test_pictures_among_the_files_that_are_not_ours_are_left_and_told_before_anything_is_tagged(
    settings: Settings,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pictures: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cover.png").write_bytes(b"the user's own")
    with pytest.raises(SourceInvalid, match=pictures[0]):
        tag_tracks(settings, [files[0], *pictures], plot=True)
    assert capsys.readouterr().out == ""
    assert Path("cover.png").read_bytes() == b"the user's own"


def test_nothing_to_tag_is_an_error(settings: Settings) -> None:
    with pytest.raises(SourceInvalid, match="at least one"):
        tag_tracks(settings, ["picture.png"], plot=True)

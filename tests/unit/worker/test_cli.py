import importlib.metadata
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.bundle import Bundle
from tests.command import timbre
from tests.worker_process import TIMBRE


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['timbre', '--help']\n"
        "from worker.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'faust', 'aiokafka', 'pydantic', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for command in ("worker", "submit", "watch", "show", "tag", "dead-letters", "services", "demo"):
        assert command in done.stdout


def test_the_version_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert timbre(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"timbre {importlib.metadata.version('timbre')}\n"


def test_an_error_is_one_sentence_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert timbre(monkeypatch, "submit", "/nowhere.mp3") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "timbre: /nowhere.mp3 is not there: give a file, a folder, a URL or a CSV table.\n"
    )


def test_settings_that_cant_be_used_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIMBRE_BATCH__MAX_WINDOWS", "many")
    assert timbre(monkeypatch, "show", "t-1") == 1
    assert "TIMBRE_BATCH__MAX_WINDOWS" in capsys.readouterr().err


def test_a_command_whose_packages_are_not_installed_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "model.evaluate", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert timbre(monkeypatch, "model", "evaluate", "--dataset", str(tmp_path)) == 1
    assert "pip install 'timbre[lab]'" in capsys.readouterr().err


def test_an_output_that_takes_no_more_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [TIMBRE, "model", "info", "fast", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == "timbre: The output can't be written: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", ["model compare nowhere", "--version", "tag /nowhere.mp3"])
def test_outputs_that_are_closed_change_no_status(arguments: str) -> None:
    command = f"{shlex.quote(str(TIMBRE))} {arguments}"
    opened, closed = (
        subprocess.run(["sh", "-c", f"{command} {ends}"], capture_output=True, check=False)
        for ends in ("", ">&-")
    )
    assert (closed.returncode, closed.stderr) == (opened.returncode, opened.stderr)
    both = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], check=False)
    assert both.returncode == opened.returncode


def test_an_unknown_command_is_a_mistake_of_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert timbre(monkeypatch, "sing") == 2
    assert "sing" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["x", "1", "1:", "1:2:3"])
def test_a_dead_letters_place_is_a_partition_and_an_offset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    assert timbre(monkeypatch, "dead-letters", "show", place) == 1
    assert "PARTITION:OFFSET" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["submit", __file__], ["watch"], ["dead-letters", "list"],
                  ["dead-letters", "show", "0:0"], ["dead-letters", "retry", "--all"]],
)  # fmt: skip
def test_without_kafka_every_command_says_what_to_check_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setenv("TIMBRE_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:9")
    assert timbre(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    [sentence] = said.err.splitlines()
    assert "TIMBRE_KAFKA__BOOTSTRAP_SERVERS" in sentence


@pytest.mark.parametrize(
    "choice",
    [[], ["0:0", "--all"], ["0:0", "--code", "fetch_forbidden"], ["--code", "x", "--all"]],
)
def test_letters_to_retry_are_chosen_in_one_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: list[str]
) -> None:
    assert timbre(monkeypatch, "dead-letters", "retry", *choice) == 1
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_labels_are_shown_as_they_are_and_steer_no_terminal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    form: tuple[str, ...],
) -> None:
    bundle = Bundle.load("fast")
    head, *others = bundle.heads
    odd = head.model_copy(update={"labels": ("[/x]", "[red]\u202e", *head.labels[2:])})
    replace(bundle, heads=(odd, *others)).save(tmp_path / "odd", card="")
    assert timbre(monkeypatch, "model", "info", str(tmp_path / "odd"), *form) == 0
    said = capsys.readouterr()
    assert "[/x]" in said.out + said.err
    assert r"[red]\u202e" in said.out + said.err

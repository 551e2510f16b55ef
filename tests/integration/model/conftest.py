"""`timbre model` as people run it."""

import subprocess
from collections.abc import Callable

import pytest

from tests.command import timbre
from tests.worker_process import TIMBRE

Command = Callable[..., str]


@pytest.fixture(scope="session")
def done() -> Command:
    """`done(*arguments)`: standard output of a command that goes well, as a process of its own."""

    def run(*arguments: object) -> str:
        ended = subprocess.run(
            [TIMBRE, "model", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`refused(*arguments)`: the sentence that a command ends with instead of a traceback."""

    def run(*arguments: object) -> str:
        assert timbre(monkeypatch, "model", *arguments) == 1
        return "timbre: " + capsys.readouterr().err.rpartition("timbre: ")[2]

    return run

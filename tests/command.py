"""The command within the test's own process, which takes less time than one of its own."""

import sys

import pytest

from worker.cli import main


def timbre(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of `timbre` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["timbre", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)

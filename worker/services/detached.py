"""Services that outlive the command that started them: `timbre services up` and `down`."""

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from worker.services.jars import Progress
from worker.services.local import Addresses, start
from worker.services.service import STOP_TIMEOUT_S, Service
from worker.settings import ServicesSettings, Settings


@dataclass(frozen=True, slots=True)
class _Detached:
    """What `down` must know: a process is named by its id and the time it was made."""

    addresses: Addresses
    folders: list[str]
    processes: list[tuple[int, float]]


def up(settings: Settings, progress: Progress = lambda done, total: None) -> tuple[Addresses, bool]:
    """Start both services to stay; returns their addresses and whether they are new.

    Raises
    ------
    ServicesUnavailable
        A service could not be fetched or started.
    """
    found = _read_state(settings.services)
    if found is not None and len(_alive(found.processes)) == len(found.processes):
        return found.addresses, False
    down(settings)  # some of them died: begin anew
    with ExitStack() as unless_started:
        started, addresses = start(
            settings, unless_started, progress, {"kafka", "redis"}, guarded=False
        )
        unless_started.pop_all()
    _write_state(settings.services, _Detached(addresses, [], []))
    adopt(settings, started)
    return addresses, True


def adopt(settings: Settings, services: Iterable[Service]) -> None:
    """Let `down` end other unguarded services as well."""
    state = _read_state(settings.services)
    assert state is not None, "nothing is up"
    for service in services:
        state.folders.append(str(service.folder))
        state.processes.append((service.pid, psutil.Process(service.pid).create_time()))
    _write_state(settings.services, state)


def down(settings: Settings) -> bool:
    """End what `up` started, the last first, and remove its data; False when nothing was up."""
    state = _read_state(settings.services)
    if state is None:
        return False
    for process in reversed(_alive(state.processes)):
        process.terminate()
        _, late = psutil.wait_procs([process], timeout=STOP_TIMEOUT_S)
        for stubborn in late:
            stubborn.kill()
    for folder in state.folders:
        shutil.rmtree(folder, ignore_errors=True)
    _state_file(settings.services).unlink()
    return True


def _state_file(services: ServicesSettings) -> Path:
    return services.state_dir / "services.json"


def _read_state(services: ServicesSettings) -> _Detached | None:
    try:
        stored = json.loads(_state_file(services).read_text())
    except FileNotFoundError:
        return None
    return _Detached(
        Addresses(**stored["addresses"]),
        stored["folders"],
        [(pid, made) for pid, made in stored["processes"]],
    )


def _write_state(services: ServicesSettings, state: _Detached) -> None:
    services.state_dir.mkdir(parents=True, exist_ok=True)
    _state_file(services).write_text(json.dumps(asdict(state), indent=2))


def _alive(processes: list[tuple[int, float]]) -> list[psutil.Process]:
    alive = []
    for pid, made in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == made and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive

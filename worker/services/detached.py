"""Services that outlive the command that started them: `timbre services up` and `down`."""

import shutil
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from worker.errors import ServicesUnavailable
from worker.services.jars import Progress
from worker.services.local import Addresses, given, start
from worker.services.service import STOP_TIMEOUT_S, Service
from worker.settings import ServicesSettings, Settings


@dataclass(frozen=True, slots=True)
class _Detached:
    """What `down` must know: a process is named by its id and the time it was made."""

    addresses: Addresses
    folders: list[str]
    processes: list[tuple[int, float]]


STATE = TypeAdapter(_Detached)


def up(settings: Settings, progress: Progress = lambda done, total: None) -> tuple[Addresses, bool]:
    """Start what the settings don't name, to stay; returns all addresses and whether any is new.

    Raises
    ------
    ServicesUnavailable
        A service could not be fetched or started, or what is up can't be told.
    """
    found = _read_state(settings.services)
    if found and found.processes and len(_alive(found.processes)) == len(found.processes):
        return found.addresses, False
    down(settings)  # some of them died: begin anew
    with ExitStack() as unless_kept:
        started, addresses = start(
            settings, _foreign(settings), unless_kept, progress, guarded=False
        )
        adopt(settings, addresses, started)
        unless_kept.pop_all()
    if started:
        with _told_file(settings.services).open("a") as told:
            told.writelines(f"{service.address}\n" for service in started)
    return addresses, bool(started)


def adopt(settings: Settings, addresses: Addresses, services: Collection[Service]) -> None:
    """Let `down` end these unguarded services as well, which serve or use `addresses`."""
    if not services:
        return  # what nothing was started for, `down` has nothing to end of
    state = _read_state(settings.services) or _Detached(addresses, [], [])
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
        with suppress(psutil.NoSuchProcess):  # it may end by itself, or by another `down`
            process.terminate()
            _, late = psutil.wait_procs([process], timeout=STOP_TIMEOUT_S)
            for stubborn in late:
                stubborn.kill()
    for folder in state.folders:
        shutil.rmtree(folder, ignore_errors=True)
    _state_file(settings.services).unlink(missing_ok=True)
    return True


def _foreign(settings: Settings) -> Addresses:
    """What the settings name, less what `up` told before: a shell keeps that after `down`."""
    named, file = given(settings), _told_file(settings.services)
    told = file.read_text(errors="replace").splitlines() if file.exists() else []
    return Addresses(
        kafka=None if named.kafka in told else named.kafka,
        redis=None if named.redis in told else named.redis,
    )


def _told_file(services: ServicesSettings) -> Path:
    """Every address that `up` ever started a service at, a line each."""
    return services.state_dir / "addresses.txt"


def _state_file(services: ServicesSettings) -> Path:
    return services.state_dir / "services.json"


def _read_state(services: ServicesSettings) -> _Detached | None:
    file = _state_file(services)
    try:
        return STATE.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ServicesUnavailable(
            f"{file} is damaged, so what `timbre services up` started can't be told: end its "
            "kafka.Kafka and redis-server by hand where they still run, and remove the file."
        ) from error


def _write_state(services: ServicesSettings, state: _Detached) -> None:
    file = _state_file(services)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    unfinished.write_bytes(STATE.dump_json(state, indent=2))
    unfinished.replace(file)


def _alive(processes: list[tuple[int, float]]) -> list[psutil.Process]:
    alive = []
    for pid, made in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == made and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive

"""`timbre demo`: the whole way of an event on this machine, on real parts."""

import asyncio
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import TimeElapsedColumn
from rich.text import Text

from schemas.events import AudioRef, NewTrack, TrackTags
from worker.commands import console
from worker.commands.services import PARTITIONS, fetching
from worker.commands.sources import audio_files, track_id
from worker.commands.submit import submit
from worker.commands.watch import Result, print_line, watching
from worker.demo import server
from worker.demo.music import sample_tracks
from worker.errors import DemoFailed, SourceInvalid
from worker.services import detached
from worker.services.jars import kafka_jars
from worker.services.local import Addresses, given, local_services
from worker.services.service import HOST, Service, new_folder
from worker.services.topics import create_topics
from worker.settings import KafkaSettings, Settings

T = TypeVar("T")

LOOPBACK = ip_network(f"{HOST}/32")
PATIENCE_S = 120.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130


@dataclass(frozen=True)
class Music:
    """A folder with music, and its tracks: file, relative to the folder, by track id."""

    folder: Path
    files: dict[str, str]
    metadata: dict[str, dict[str, str]]


class MusicServer(Service):
    """The HTTP server that a platform would have its uploads on."""

    name = "music server"
    ready_line = server.READY

    def __init__(self, folder: Path, music: Path, *, guarded: bool) -> None:
        super().__init__(folder, guarded=guarded)
        self._music = music

    @property
    def address(self) -> str:
        """The address of the folder."""
        return server.url(self.port, "")

    def _prepare(self) -> list[str]:
        return [sys.executable, "-m", server.__name__, str(self.port), str(self._music)]


class Worker(Service):
    """`timbre worker` in a process of its own."""

    name = "worker"
    ready_line = "Assigned"

    @property
    def address(self) -> str:
        """The address of its metrics and health."""
        return f"http://{HOST}:{self.port}"

    def _prepare(self) -> list[str]:
        self.environment["TIMBRE_HTTP__PORT"] = str(self.port)
        return [sys.executable, "-m", "worker.cli", "worker"]


def run_demo(settings: Settings, *, music: Path | None, keep: bool) -> int:
    """Run the demo; returns the exit status.

    Parameters
    ----------
    music
        A folder with music to tag; None takes the sample tracks.
    keep
        Leave Kafka, Redis, the worker and the music server running.
    """
    out = console.out()
    for number in INTERRUPTS:  # also where a shell had them ignored
        signal.signal(number, _interrupt)
    try:
        with ExitStack() as unless_kept:
            status = _run(settings, out, _music(settings, out, music), unless_kept, keep=keep)
            if keep:
                unless_kept.pop_all()
    except KeyboardInterrupt:
        out.print("Stopped; nothing is left running.", style="yellow")
        return INTERRUPTED
    return status


def _interrupt(*_: object) -> NoReturn:
    """Interrupt once: another must not cut short the removal of what was started."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _await(work: Coroutine[Any, Any, T]) -> T:
    """Its result. Only Python's own handler lets asyncio end its tasks before the interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = asyncio.run(work)
    except KeyboardInterrupt:
        _interrupt()
    signal.signal(signal.SIGINT, _interrupt)
    return result


def _run(
    settings: Settings, out: Console, music: Music, unless_kept: ExitStack, *, keep: bool
) -> int:
    addresses = _start_services(settings, out, unless_kept, keep=keep)
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": addresses.kafka})
    _await(create_topics(kafka, kafka.topics, PARTITIONS))
    with _step(out, "Starting the music server and a worker") as done:
        music_server = MusicServer(new_folder("music"), music.folder, guarded=not keep)
        unless_kept.callback(music_server.remove)
        music_server.launch()
        worker = Worker(
            new_folder("worker"),
            guarded=not keep,
            environment={
                **addresses.environment(),
                "TIMBRE_FETCH__ALLOWED_NETWORKS": json.dumps(
                    [str(network) for network in {*settings.fetch.allowed_networks, LOOPBACK}]
                ),
            },
        )
        unless_kept.callback(worker.remove)
        worker.launch()
        for service in (music_server, worker):
            service.wait_ready()
        unless_kept.callback(worker.stop)
        done(f"Music at {music_server.address}, the worker's metrics at {worker.address}/metrics")
    if keep:
        detached.adopt(settings, addresses, (music_server, worker))
    began_s = time.monotonic()
    results = _await(_tag(kafka, out, music, music_server, worker))
    _sum_up(out, results, time.monotonic() - began_s)
    tagged = [track for track, result in results.items() if isinstance(result, TrackTags)]
    if keep:
        _point_on(out, addresses, worker, tagged)
    else:
        _point_back(out)
    return 0 if len(tagged) == len(results) else 1


def _music(settings: Settings, out: Console, folder: Path | None) -> Music:
    if folder is None:
        return _samples(settings, out)
    if not folder.is_dir():
        raise SourceInvalid(f"{folder} is not a folder: give one with music in it.")
    names = [file.relative_to(folder).as_posix() for file in audio_files(folder)]
    return Music(folder.resolve(), {track_id(name): name for name in names}, {})


def _samples(settings: Settings, out: Console) -> Music:
    doing = "Composing the sample tracks, this first time only"
    with console.progress(out, doing) as progress:
        task = progress.add_task("", visible=False)

        def rendered(done: int, total: int) -> None:
            if done == 0 and not out.is_terminal:
                out.print(doing)
            progress.update(task, completed=done, total=total, visible=True)

        samples = sample_tracks(settings.services.cache_dir / "music", rendered)
    named = {f"demo-{sample.genre}": sample for sample in samples}
    return Music(
        samples[0].path.parent,
        {name: sample.path.name for name, sample in named.items()},
        {name: {"title": s.title, "composed_as": s.genre} for name, s in named.items()},
    )


def _start_services(
    settings: Settings, out: Console, unless_kept: ExitStack, *, keep: bool
) -> Addresses:
    # Two displays can't share a terminal: the download's goes before the spinner.
    if given(settings).kafka is None:
        with fetching() as progress:
            kafka_jars(settings.services.cache_dir / "kafka", progress)
    with _step(out, "Starting Kafka and Redis") as done:
        if keep:
            unless_kept.callback(detached.down, settings)
            addresses, _ = detached.up(settings)
        else:
            addresses = unless_kept.enter_context(local_services(settings))
        done(f"Kafka at {addresses.kafka}, Redis at {addresses.redis}")
    return addresses


async def _tag(
    kafka: KafkaSettings, out: Console, music: Music, music_server: MusicServer, worker: Worker
) -> dict[str, Result]:
    """Submit every track and wait for what becomes of each, in order of arrival."""
    tracks = [
        NewTrack(
            track_id=name,
            audio=AudioRef(uri=server.url(music_server.port, file)),
            metadata={**music.metadata.get(name, {})},
        )
        for name, file in music.files.items()
    ]
    results: dict[str, Result] = {}
    with console.progress(out, "Tagging", TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=len(tracks))
        async with watching(kafka, failures=True) as arriving:
            submission = await submit(kafka, tracks)
            submitted = console.counted(len(tracks), "track")
            out.print(f"Submitted {submitted} to {', '.join(submission.delivered)}")
            while len(results) < len(tracks):
                result = await _next(arriving, worker)
                if result.track_id in music.files and result.track_id not in results:
                    results[result.track_id] = result
                    print_line(progress.console, result)
                    progress.update(task, completed=len(results))
    return results


async def _next(arriving: AsyncIterator[Result], worker: Worker) -> Result:
    """The next result.

    Raises
    ------
    DemoFailed
        The worker ended, or nothing came for `PATIENCE_S`.
    """
    waiting = asyncio.ensure_future(anext(arriving))
    deadline_s = time.monotonic() + PATIENCE_S
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=1)
            late = time.monotonic() > deadline_s
            if not waiting.done() and (late or not worker.running):
                fault = f"No result came for {PATIENCE_S:.0f} s" if late else "The worker ended"
                raise DemoFailed(f"{fault}. The end of its log:\n{worker.log_tail()}")
    finally:  # also where an interrupt ends the wait
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait({waiting})
    return waiting.result()


def _sum_up(out: Console, results: Mapping[str, Result], seconds: float) -> None:
    tagged = [result for result in results.values() if isinstance(result, TrackTags)]
    audio_s = sum(result.audio.duration_s for result in tagged)
    windows = sum(result.windows.total for result in tagged)
    out.print(
        f"\n{len(tagged)} of {console.counted(len(results), 'track')} tagged in {seconds:.1f} s: "
        f"{console.clock(audio_s)} of music, {console.counted(windows, 'window')} of 3 s.",
        style="bold",
    )


def _point_on(out: Console, addresses: Addresses, worker: Worker, tagged: Sequence[str]) -> None:
    """Where to look next, with the very commands."""
    timbre = _command()
    look = {
        f"curl {worker.address}/metrics": "counts, lag, seconds by stage",
        f"curl {worker.address}/health/ready": "whether it may be sent work",
        **{f"{timbre} show {track}": "a track's result, from Redis" for track in tagged[:1]},
        f"{timbre} watch --from-beginning -n 3": "results, from their topic",
        f"{timbre} dead-letters list": "what could not be tagged",
    }
    out.print("\nEverything goes on running. Where to look next:\n", style="bold")
    for name, value in addresses.environment().items():
        out.print(f"  export {name}={shlex.quote(value)}")
    out.print()
    _print_commands(out, look)
    out.print(f"\nThe worker's log is {worker.log}")
    out.print(Text.assemble("To stop it all: ", (f"{timbre} services down", "bold")))


def _point_back(out: Console) -> None:
    """What to do next, now that all of this has ended."""
    out.print("\nAll of it has ended. What to do next:\n", style="bold")
    _print_commands(
        out,
        {
            "make demo KEEP=1": "leaves it all running, and says where to look",
            "make demo MUSIC=DIR": "tags music of your own",
            f"{_command()} tag FILE...": "tags files, without Kafka",
        },
    )


def _print_commands(out: Console, commands: Mapping[str, str]) -> None:
    width = max(map(len, commands))
    for command, what in commands.items():
        out.print(Text.assemble(f"  {command:<{width}}  ", (what, "dim")))


def _command() -> str:
    """How `timbre` is called from here: by its name where the shell finds it."""
    if shutil.which("timbre"):
        return "timbre"
    path = Path(sys.executable).with_name("timbre")
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@contextmanager
def _step(out: Console, doing: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, then, once told, what came of it and the time it took."""
    began_s = time.monotonic()

    def done(what: str) -> None:
        taken_s = time.monotonic() - began_s
        out.print(Text.assemble(("✓ ", "green"), what, (f"  {taken_s:.1f} s", "dim")))

    if out.is_terminal:
        with out.status(doing):
            yield done
    else:
        yield done

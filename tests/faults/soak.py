"""Many tracks through one worker, and what it holds meanwhile.

    python -m tests.faults.soak [--tracks 5000]

Writes `build/soak.json` and `build/soak.png`; exit status 1 where memory grew by more than 5 %
after the first tenth of the tracks, or where file descriptors, processes or spool files were left.
"""

import argparse
import asyncio
import json
import logging
import statistics
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import psutil
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from tests.faults.scenarios import now_s, spooled
from tests.faults.stand import Failed, Lane, Stand, Worker

MAX_GROWTH = 0.05
OUTSTANDING = 200
SAMPLE_S = 1.0
SETTLE_S = 6.0
POOLED_FDS = 8
"""By which the pools of connections to Kafka and Redis may still grow afterwards."""
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """What a worker and its decoders hold after so many tracks."""

    at_s: float
    tracks: int
    memory_bytes: int
    fds: int
    processes: int
    spool_files: int


@dataclass(frozen=True, slots=True)
class Soak:
    """A whole run; `idle_*` were taken with nothing in flight: after the first tenth, after all."""

    samples: list[Sample]
    idle_before: Sample
    idle_after: Sample

    def memory_bytes(self, first: int, last: int) -> float:
        """Median of memory while the tracks from `first` to `last` passed."""
        return statistics.median(
            sample.memory_bytes for sample in self.samples if first <= sample.tracks <= last
        )

    @property
    def tracks(self) -> int:
        return self.samples[-1].tracks

    @property
    def growth(self) -> float:
        """Memory in the last tenth over memory in the second tenth, less one."""
        tenth = self.tracks // 10
        early = self.memory_bytes(tenth, 2 * tenth)
        return self.memory_bytes(self.tracks - tenth, self.tracks) / early - 1

    def require_no_growth(self) -> None:
        """Raise `Failed` where the worker holds more than it should."""
        if self.growth > MAX_GROWTH:
            raise Failed(f"memory grew by {self.growth:.1%} after the first tenth")
        before, after = self.idle_before, self.idle_after
        if after.fds > before.fds + POOLED_FDS or after.processes != before.processes:
            raise Failed(f"descriptors or processes are left: {before} {after}")
        if after.spool_files:
            raise Failed(f"spool files are left: {after}")


async def soak(lane: Lane, tracks: int, progress: Progress | None = None) -> Soak:
    """Pass so many distinct tracks through one worker, never more than a few hundred waiting."""
    (worker,) = await lane.ready()
    bar = progress.add_task("tracks", total=tracks) if progress else None
    # The first tracks open connections that stay: they are what is there at rest.
    answered = sent = tracks // 10
    await lane.send(lane.tracks(range(sent)))
    await lane.until_answered(sent, 120)
    await lane.watch(SETTLE_S)
    started_s = now_s()

    def sample() -> Sample:
        return _sample(lane, worker, now_s() - started_s)

    idle_before, samples = sample(), list[Sample]()
    last_s = last_answer_s = now_s()
    while answered < tracks:
        if sent < tracks and sent - answered < OUTSTANDING:
            more = min(tracks, answered + OUTSTANDING)
            await lane.send(lane.tracks(range(sent, more)))
            sent = more
        await lane.checker.poll()
        if (seen := len(lane.checker.tags) + len(lane.checker.letters)) > answered:
            answered, last_answer_s = seen, now_s()
        if now_s() - last_answer_s > 60:
            raise Failed(f"no progress for 60 s after {answered} tracks:\n{worker.tail()}")
        if now_s() - last_s >= SAMPLE_S:
            last_s = now_s()
            samples.append(sample())
        if progress is not None and bar is not None:
            progress.update(bar, completed=answered)
    samples.append(sample())
    await lane.watch(SETTLE_S)
    return Soak(samples, idle_before, sample())


def _sample(lane: Lane, worker: Worker, at_s: float) -> Sample:
    fds = processes = 0
    for process in worker.tree():
        with suppress(psutil.NoSuchProcess):
            fds += process.num_fds()
            processes += 1
    return Sample(
        at_s=round(at_s, 1),
        tracks=len(lane.checker.tags) + len(lane.checker.letters),
        memory_bytes=worker.memory_bytes(),
        fds=fds,
        processes=processes,
        spool_files=len(spooled(lane)),
    )


def draw(result: Soak, path: Path) -> None:
    """Memory, descriptors and spool files over tracks."""
    mpl.use("Agg")
    figure = Figure(figsize=(9, 6), layout="constrained")
    memory, counts = figure.subplots(2, 1, sharex=True)
    tracks = [sample.tracks for sample in result.samples]
    held_mib = [sample.memory_bytes / MIB for sample in result.samples]
    memory.plot(tracks, held_mib)
    memory.set_ylabel("memory of worker and decoders (MiB)")
    memory.set_ylim(0, 1.1 * max(held_mib))
    counts.plot(tracks, [sample.fds for sample in result.samples], label="file descriptors")
    counts.plot(tracks, [sample.spool_files for sample in result.samples], label="spool files")
    counts.plot(tracks, [sample.processes for sample in result.samples], label="processes")
    counts.set_xlabel("tracks")
    counts.legend()
    figure.suptitle(f"{result.tracks} tracks: memory {result.growth:+.1%} after the first tenth")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--tracks", type=int, default=5000)
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    return asyncio.run(_run(options.tracks))


async def _run(tracks: int) -> int:
    console = Console()
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    async with Stand() as stand, stand.lane("soak") as lane:
        with Progress(console=console) as progress:
            result = await soak(lane, tracks, progress)
        verdict = await lane.verdict()
    report = {
        "tracks": result.tracks,
        "growth": round(result.growth, 4),
        "verdict": asdict(verdict),
        "idle_before": asdict(result.idle_before),
        "idle_after": asdict(result.idle_after),
        "samples": [asdict(sample) for sample in result.samples],
    }
    (folder / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(result, folder / "soak.png")
    console.print(f"Memory {result.growth:+.1%}; {verdict}")
    console.print(f"Written to {folder / 'soak.json'} and {folder / 'soak.png'}.")
    try:
        result.require_no_growth()
    except Failed as error:
        console.print(f"[red]{error}[/]")
        return 1
    return 1 if verdict.lost or verdict.differing else 0


if __name__ == "__main__":
    sys.exit(main())

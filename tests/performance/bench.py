"""`make bench`: how close the worker comes to decoding alone, over the same full-length MP3s.

Three rates in one run, one after the other, each over all the tracks with every core:

decode   PyAV decodes the files to PCM in one process a core, and does nothing else: before the
         others and again after them, since machines that are shared change their speed
tag      `timbre tag` on all the files, its start included
worker   `timbre worker` on a real Kafka and a real Redis, from the first event sent to the last
         result read; the worker is ready before

Both work with `fast`, the shipped bundle for processors that are to keep up with decoding; another
one is named by `--bundle`. Every track is another one to the worker (its bytes differ), so the
cache answers none. Figures depend on what else the machine does: run it on a quiet one.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import av
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from rich.console import Console
from rich.table import Table

from tests.worker_process import TIMBRE
from worker.demo.music import sample_tracks
from worker.kafka import connection
from worker.services.local import Addresses, local_services
from worker.services.topics import create_topics
from worker.settings import KafkaSettings, load

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
SHARED_TRACKS = ROOT.parent / "shared" / "audio" / "tracks"
CORES = len(os.sched_getaffinity(0))
TRACKS = 336
REPEATS_OF_A_SAMPLE = 6  # about 30 s each: together the length of a song
STOP_TIMEOUT_S = 120
RESULTS_TIMEOUT_S = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tracks", type=int, default=TRACKS)
    parser.add_argument("--music", type=Path, help="folder of MP3s; default ../shared, or our own")
    parser.add_argument("--bundle", default="fast", help="folder or name of a bundle")
    arguments = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # its topics are seconds old
    console = Console()
    tracks = prepare(arguments.music, arguments.tracks)
    told = f"{len(tracks)} MP3s, {_minutes(tracks):.0f} minutes of audio, {CORES} cores"
    console.print(f"{told}, bundle {arguments.bundle}")
    before_s = time_decoding(tracks)
    tag_s = time_tag(tracks, arguments.bundle)
    with local_services(load()) as addresses:
        worker_s = asyncio.run(time_worker(tracks, addresses, arguments.bundle))
    decode_s = (before_s + time_decoding(tracks)) / 2
    report(console, tracks, {"decode": decode_s, "tag": tag_s, "worker": worker_s})


def prepare(music: Path | None, count: int) -> list[Path]:
    """Full-length MP3s, all of different bytes: copies end in an ID3v1 tag of their own."""
    sources = sorted((music or SHARED_TRACKS).glob("*.mp3")) or _own_tracks()
    folder = BUILD / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    tracks = []
    for number in range(count):
        track = folder / f"track-{number:03d}.mp3"
        tag = b"TAG" + f"bench {number}".encode().ljust(125, b"\0")
        track.write_bytes(sources[number % len(sources)].read_bytes() + tag)
        tracks.append(track)
    return tracks


def _own_tracks() -> list[Path]:
    """Without recordings at hand: the demo's own music, repeated to the length of a song."""
    samples = [track.path for track in sample_tracks(BUILD / "cache")]
    folder = BUILD / "bench-sources"
    folder.mkdir(parents=True, exist_ok=True)
    songs = []
    for sample in (path for path in samples if path.suffix == ".mp3"):
        song = folder / sample.name
        song.write_bytes(sample.read_bytes() * REPEATS_OF_A_SAMPLE)
        songs.append(song)
    return songs


def time_decoding(tracks: Sequence[Path]) -> float:
    """Seconds to decode all tracks with PyAV, one process a core."""
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(_decode, tracks[:CORES]))  # processes and libraries are loaded
        started_s = time.perf_counter()
        list(pool.map(_decode, tracks))
        return time.perf_counter() - started_s


def _decode(track: Path) -> float:
    with av.open(str(track)) as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))


def time_tag(tracks: Sequence[Path], bundle: str) -> float:
    """Seconds of `timbre tag`, from its start to its end."""
    started_s = time.perf_counter()
    done = subprocess.run(
        [TIMBRE, "tag", "--json", "--model", bundle, *tracks],
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
    )
    elapsed_s = time.perf_counter() - started_s
    assert len(done.stdout.splitlines()) == len(tracks)
    return elapsed_s


async def time_worker(tracks: Sequence[Path], addresses: Addresses, bundle: str) -> float:
    """Seconds from the first event sent to the last result read."""
    assert addresses.kafka is not None
    settings = load(kafka={"bootstrap_servers": addresses.kafka}).kafka
    await create_topics(settings, settings.topics, 4)
    with _worker(addresses, bundle):
        warm_up, *rest = tracks
        await _tag_all(settings, [warm_up])
        return await _tag_all(settings, rest) * len(tracks) / len(rest)


@contextmanager
def _worker(addresses: Addresses, bundle: str) -> Iterator[None]:
    environment = os.environ | addresses.environment()
    environment |= {
        "TIMBRE_FETCH__FILE_ROOTS": json.dumps([str(BUILD)]),
        "TIMBRE_HTTP__PORT": "0",
        "TIMBRE_WORKER__BUNDLE": bundle,
        "TIMBRE_WORKER__LOG_LEVEL": "warning",
    }
    worker = subprocess.Popen([TIMBRE, "worker"], env=environment, cwd=ROOT)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(STOP_TIMEOUT_S)


async def _tag_all(settings: KafkaSettings, tracks: Sequence[Path]) -> float:
    """Seconds from the first event sent to the last result read."""
    waiting = {track.stem for track in tracks}
    options = connection.client_options(settings)
    async with (
        AIOKafkaConsumer(
            settings.topic_tags, settings.topic_dead_letter, **options, group_id=None
        ) as results,
        AIOKafkaProducer(**options) as producer,
        asyncio.timeout(RESULTS_TIMEOUT_S),
    ):
        await results.seek_to_end()
        started_s = time.perf_counter()
        for track in tracks:
            event = {"track_id": track.stem, "audio": {"uri": track.as_uri()}}
            await producer.send(
                settings.topic_new, json.dumps(event).encode(), key=track.stem.encode()
            )
        while waiting:
            message = await results.getone()
            if message.topic == settings.topic_dead_letter:
                raise RuntimeError(f"{message.key!r} failed: {message.headers}")
            waiting.discard(message.key.decode())
        return time.perf_counter() - started_s


def report(console: Console, tracks: Sequence[Path], seconds: dict[str, float]) -> None:
    """A table for people, `build/bench.json` for machines."""
    rates = {name: len(tracks) / elapsed_s for name, elapsed_s in seconds.items()}
    minutes = _minutes(tracks)
    table = Table("", "tracks/s", "hours of audio/h", "of decoding alone")
    for name, rate in rates.items():
        speed = f"{60 * minutes / seconds[name]:,.0f}"
        table.add_row(name, f"{rate:.2f}", speed, f"{rate / rates['decode']:.2f}")
    console.print(table)
    figures = {f"{name}_tracks_per_s": round(rate, 3) for name, rate in rates.items()}
    figures |= {
        "worker_vs_decode": round(rates["worker"] / rates["decode"], 3),
        "tag_vs_decode": round(rates["tag"] / rates["decode"], 3),
        "tracks": len(tracks),
        "audio_minutes": round(minutes, 1),
        "cores": CORES,
    }
    (BUILD / "bench.json").write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"Written to {(BUILD / 'bench.json').relative_to(ROOT)}")


def _minutes(tracks: Sequence[Path]) -> float:
    total_s = 0.0
    for track in tracks:
        with av.open(str(track)) as container:
            total_s += (container.duration or 0) / av.time_base
    return total_s / 60


if __name__ == "__main__":
    main()

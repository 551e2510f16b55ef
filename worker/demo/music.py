"""Sample tracks: the demo's compositions, rendered and encoded once into a cache."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np

from worker.demo import styles, synth
from worker.demo.styles import STYLES, Style
from worker.demo.synth import RATE, Sound

ARTIST = "Timbre"
ALBUM = "Music Made by the Demo"
FRAME_SAMPLES = 1 << 14


@dataclass(frozen=True)
class Codec:
    """How a track is compressed: the file's suffix and what FFmpeg calls the encoder."""

    suffix: str
    encoder: str
    sample_format: str
    bit_rate: int | None = None


CODECS = (
    Codec("mp3", "libmp3lame", "fltp", 192_000),
    Codec("flac", "flac", "s16"),
    Codec("ogg", "vorbis", "fltp", 160_000),
    Codec("m4a", "aac", "fltp", 160_000),
)


@dataclass(frozen=True)
class Sample:
    """A sample track: its file and what it was composed as."""

    path: Path
    genre: str
    title: str


def sample_tracks(
    cache_dir: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Sample]:
    """The sample tracks, of every style one, in turns of every codec.

    They are rendered where `cache_dir` doesn't hold them; `progress(done, total)` is called before
    the first and after each that is.
    """
    folder = cache_dir / _revision()
    samples = [
        Sample(folder / f"{style.genre}.{CODECS[number % len(CODECS)].suffix}", style.genre,
               style.title)
        for number, style in enumerate(STYLES)
    ]  # fmt: skip
    missing = [number for number, sample in enumerate(samples) if not sample.path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        progress(0, len(missing))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rendered = [pool.submit(_render, number, samples[number].path) for number in missing]
        for done, future in enumerate(as_completed(rendered), start=1):
            future.result()
            progress(done, len(missing))
    return samples


def _render(number: int, path: Path) -> None:
    style = STYLES[number]
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    encode(style.compose(), unfinished, CODECS[number % len(CODECS)], _tags(style, number))
    unfinished.replace(path)


def encode(sound: Sound, path: Path, codec: Codec, tags: dict[str, str]) -> None:
    """Write `sound`, (samples, 2) at `RATE`, with `tags` as title, artist and so on."""
    with av.open(path, "w", format={"m4a": "mp4"}.get(codec.suffix, codec.suffix)) as container:
        container.metadata.update(tags)
        # FFmpeg calls its own Vorbis encoder experimental and asks to be told that this is known.
        stream = container.add_stream(
            codec.encoder, rate=RATE, layout="stereo", options={"strict": "experimental"}
        )
        assert isinstance(stream, av.AudioStream)
        stream.format = codec.sample_format
        if codec.bit_rate is not None:
            stream.bit_rate = codec.bit_rate
        resampler = av.AudioResampler(codec.sample_format, "stereo", RATE)
        for start in range(0, len(sound), FRAME_SAMPLES):
            samples = np.ascontiguousarray(sound[start : start + FRAME_SAMPLES].T)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
            frame.sample_rate, frame.pts = RATE, start
            for part in resampler.resample(frame):
                container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def _tags(style: Style, number: int) -> dict[str, str]:
    return {
        "title": style.title,
        "artist": ARTIST,
        "album": ALBUM,
        "genre": style.genre,
        "track": str(number + 1),
    }


def _revision() -> str:
    """Changes with the compositions and instruments, so that what is cached is what they play."""
    digest = hashlib.sha256()
    for module in (styles.__file__, synth.__file__, __file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:12]

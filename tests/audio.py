"""Audio for tests, made and encoded here."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from schemas.events import AudioFacts

Signal = NDArray[np.float32]  # shape (samples, channels)

# What a music platform is sent: suffix to FFmpeg's muxer, encoder and the encoder's sample rate.
ENCODINGS = {
    "mp3": ("mp3", "libmp3lame", 44_100),
    "mp2": ("mp2", "mp2", 44_100),
    "flac": ("flac", "flac", 44_100),
    "ogg": ("ogg", "vorbis", 44_100),
    "opus": ("ogg", "libopus", 48_000),
    "aac": ("adts", "aac", 44_100),
    "m4a": ("ipod", "aac", 44_100),
    "alac.m4a": ("ipod", "alac", 44_100),
    "mka": ("matroska", "vorbis", 44_100),
    "webm": ("webm", "libopus", 48_000),
    "wma": ("asf", "wmav2", 44_100),
    "wav": ("wav", "pcm_s16le", 44_100),
    "24.wav": ("wav", "pcm_s24le", 96_000),
    "8.wav": ("wav", "pcm_u8", 22_050),
    "64.wav": ("wav", "pcm_f64le", 48_000),
    "w64": ("w64", "pcm_s32le", 44_100),
    "aiff": ("aiff", "pcm_s16be", 44_100),
    "au": ("au", "pcm_s16be", 44_100),
    "caf": ("caf", "pcm_s16le", 44_100),
    "wv": ("wv", "wavpack", 44_100),
    "tta": ("tta", "tta", 44_100),
    "ac3": ("ac3", "ac3", 48_000),
    "ts": ("mpegts", "aac", 44_100),
}
LOSSLESS = ("flac", "alac.m4a", "wav", "24.wav", "64.wav", "w64", "aiff", "au", "caf", "wv", "tta")
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def audio_facts(**changes: Any) -> AudioFacts:
    """What a result says of an MP3 of 3 s, but for `changes`."""
    facts: dict[str, Any] = {
        "uri": "file:///a.mp3",
        "sha256": "0" * 64,
        "size_bytes": 1,
        "container": "mp3",
        "codec": "mp3",
        "sample_rate_hz": 44_100,
        "channels": 2,
        "duration_s": 3.0,
    }
    return AudioFacts(**{**facts, **changes})


def tone(
    duration_s: float, rate_hz: int, frequency_hz: float = 440.0, *, channels: int = 1
) -> Signal:
    """A sine of half full scale, the same in each channel."""
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    sine = 0.5 * np.sin(2 * np.pi * frequency_hz * time_s)
    return np.repeat(sine[:, np.newaxis], channels, axis=1).astype(np.float32)


def noise(duration_s: float, rate_hz: int, *, channels: int = 1, seed: int = 0) -> Signal:
    """White noise at half full scale, of its own in each channel."""
    shape = (round(duration_s * rate_hz), channels)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def encode(
    path: Path, signal: Signal, rate_hz: int, *, muxer: str, codec: str, times: int = 1
) -> Path:
    """Write `signal`, several times over if asked to, with an encoder of FFmpeg."""
    channels = signal.shape[1]
    with av.open(str(path), "w", format=muxer) as container:
        stream = container.add_stream(codec, rate=rate_hz, options={"strict": "experimental"})
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = 128_000
        stream.layout = LAYOUTS[channels]
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(signal.T), format="fltp", layout=LAYOUTS[channels]
        )
        frame.sample_rate = rate_hz
        frame.time_base = Fraction(1, rate_hz)
        for number in range(times):
            # Else no container tells where, after the encoder's delay, the sound begins.
            frame.pts = number * len(signal)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def encode_as(path: Path, duration_s: float = 4.0) -> Path:
    """Write a tone in stereo as the suffix says, see ENCODINGS."""
    suffix = path.name.split(".", 1)[1]
    muxer, codec, rate_hz = ENCODINGS[suffix]
    signal = tone(duration_s, rate_hz, channels=2)
    return encode(path, signal, rate_hz, muxer=muxer, codec=codec)


def wav(signal: Signal, rate_hz: int) -> bytes:
    """A WAV file of 32-bit floats, of any rate and number of channels."""
    channels = signal.shape[1]
    data = signal.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, channels, rate_hz, rate_hz * channels * 4, channels * 4, 32)
    chunks = b"".join(
        name + struct.pack("<I", len(body)) + body
        for name, body in ((b"fmt ", form), (b"data", data))
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def damaged(path: Path, *, share: float) -> Path:
    """Overwrite the middle of the audio in a new m4a file, this share of it."""
    encode(path, noise(8.0, 44_100), 44_100, muxer="ipod", codec="aac")
    data = bytearray(path.read_bytes())
    audio = data.index(b"mdat")
    size = int.from_bytes(data[audio - 4 : audio])
    length = int(size * share)
    start = audio + (size - length) // 2
    data[start : start + length] = np.random.default_rng(0).bytes(length)
    path.write_bytes(data)
    return path

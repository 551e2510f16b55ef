"""Decode: an audio file to mono float32 samples at one rate, in pieces, with PyAV.

Imports PyAV and numpy alone, so a decoder process is up quickly and stays small. Scripts, training
and evaluation use `decode_samples` and get the samples that the worker gets.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO
from io import FileIO
from math import ceil
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.codec import Codec
from av.codec.codec import UnknownCodecError
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.stream import Discard

from worker.errors import AudioEmpty, AudioTooLong, AudioUnreadable, DecodeFailed
from worker.windows import Samples, WindowCutter, Windows, cut

# FFmpeg's demuxers of files that hold their audio themselves. No other is tried: above all none
# that opens further files or addresses (hls, dash, concat, sdp, image2, vobsub ...).
CONTAINERS = (
    "aac,ac3,eac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,dtshd,flac,flv,iff,matroska,mlp,"
    "mov,mp3,mpc,mpc8,mpeg,mpegts,nut,ogg,oma,qoa,rm,shn,sox,tak,truehd,tta,voc,w64,wav,wsd,wv,xwma"
)
MIN_RATE_HZ = 8
MAX_RATE_HZ = 3_072_000  # DSD512 decodes to 2.8224 MHz
MAX_CHANNELS = 64
# Samples beyond full scale by more than a lossy codec's overshoot are nonsense, and their squares
# would overflow in the network.
LOUDEST = 8.0
# Sharper than libswresample's own choice for little more time: from 44.1 to 16 kHz flat within
# 0.1 dB up to 7 kHz, and what lies above 8.6 kHz comes back below -60 dB.
FILTER_TAPS = 36
KAISER_BETA = 6
# Small frames are packed before they are filtered, which one by one costs as much time as decoding
# them; a packed frame is bounded, since low rates and many channels would make it gigabytes.
FRAME_S = 1.0
FRAME_VALUES = 1 << 18
PACKED_CONTAINERS = {"flac", "mp3", "mp4", "ogg", "wav"}
READ_BYTES = 1 << 16


def _audio_decoders() -> str:
    names = []
    for name in av.codecs_available:
        try:
            codec = Codec(name, "r")
        except UnknownCodecError:  # an encoder only
            continue
        if codec.type == "audio":
            names.append(name)
    return ",".join(sorted(names))


# No other decoder is opened, so no embedded picture or video is decoded, not even to probe it.
AUDIO_DECODERS = _audio_decoders()
WHITELISTS = {"format_whitelist": CONTAINERS, "codec_whitelist": AUDIO_DECODERS}


@dataclass(slots=True)
class DecodedFacts:
    """What a track turned out to be: measured on the samples decoded, not read off its headers.

    `container` and `codec` are FFmpeg's names, `damaged_packets` were skipped.
    """

    container: str = ""
    codec: str = ""
    sample_rate_hz: int = 0
    channels: int = 0
    duration_s: float = 0.0
    damaged_packets: int = 0


def decode_samples(
    path: Path, sample_rate_hz: int, *, max_duration_s: float = float("inf")
) -> Samples:
    """Decode a whole file.

    Parameters
    ----------
    path
        The file; its name and suffix play no part.
    sample_rate_hz
        Rate of the result.
    max_duration_s
        Longest track that is accepted.

    Returns
    -------
    np.ndarray [shape=(samples,), dtype=float32]
        The mean of the channels; full scale is 1.

    Raises
    ------
    AudioUnreadable, AudioEmpty, AudioTooLong, DecodeFailed
    """
    return np.concatenate(list(Decoder(path, sample_rate_hz, max_duration_s=max_duration_s)))


def decode_windows(
    path: Path,
    sample_rate_hz: int,
    *,
    window_samples: int,
    hop_samples: int,
    min_tail_samples: int,
) -> Iterator[Windows]:
    """Decode and cut a file in pieces of shape (windows, window_samples), as the worker does.

    Arguments and errors are those of `decode_samples` and `WindowCutter`.
    """
    cutter = WindowCutter(window_samples, hop_samples, min_tail_samples)
    return cut(Decoder(path, sample_rate_hz), cutter)


class Decoder:
    """One file's samples in pieces: iterate once; `facts` are complete then.

    Yields arrays of shape (samples,), float32; joined, they are what `decode_samples` returns.
    """

    def __init__(
        self, path: Path, sample_rate_hz: int, *, max_duration_s: float = float("inf")
    ) -> None:
        self._path = path
        self._sample_rate_hz = sample_rate_hz
        self._max_duration_s = max_duration_s
        self.facts = DecodedFacts()
        self._layout = ""
        self._packets = 0

    def __iter__(self) -> Iterator[Samples]:
        try:
            file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise DecodeFailed(f"The spooled audio can't be opened: {error.strerror}.") from error
        given = 0
        with file:
            try:
                for samples in self._resampled(self._packed_frames(file)):
                    given += samples.size
                    yield _sane(samples)
                if given:
                    return
            except MemoryError:
                raise
            except av.FFmpegError:
                pass  # damage, or a change of format: once more, with care
            yield from self._rest(file, given)

    def _rest(self, file: FileIO, given: int) -> Iterator[Samples]:
        """Decode again, passing over damage, and leave out the samples given before."""
        seen = 0
        for samples in self._resampled(self._single_frames(file)):
            yield _sane(samples[max(0, given - seen) :])
            seen += samples.size
        damaged = self.facts.damaged_packets
        if damaged * 2 > self._packets:
            raise AudioUnreadable(
                f"{damaged} of {self._packets} packets are damaged: encode the file anew."
            )
        if not seen:
            raise AudioEmpty("The file decodes to no samples at all.")

    def _packed_frames(self, file: FileIO) -> Iterator[AudioFrame]:
        """Frames of about a second, which FFmpeg reads, decodes and packs by itself.

        That takes a tenth less time than handing them over one by one, but ends, with FFmpegError,
        at the first damage or change of format. Of a few containers alone: others have been seen to
        make FFmpeg ask for a damaged packet for ever. Nor of layouts that are a list of channels,
        which FFmpeg, opening the file by itself, would give to PyAV (see `_opened`).
        """
        with self._opened(file) as (container, stream):
            if self.facts.container not in PACKED_CONTAINERS or " (" in self._layout:
                return
            options = WHITELISTS | {"protocol_whitelist": "fd", "fd": str(file.fileno())}
            file.seek(0)
            graph = _graph()
            source = graph.add(
                "amovie",
                filename="fd:",
                format_name=container.format.name.partition(",")[0],
                format_opts=":".join(f"{name}={value}" for name, value in options.items()),
                stream_index=str(stream.index),
                dec_threads="1",
            )
            packed = _packed_samples(stream.sample_rate, stream.channels)
            packing = graph.add("asetnsamples", nb_out_samples=str(packed), pad="0")
            sink = graph.add("abuffersink")
            graph.link_nodes(source, packing, sink).configure()
            while True:
                try:
                    frame = sink.pull()
                except av.EOFError:
                    return
                assert isinstance(frame, AudioFrame)
                yield frame

    def _single_frames(self, file: FileIO) -> Iterator[AudioFrame]:
        """Frames as decoded; packets that can't be are passed over and counted."""
        with self._opened(file) as (container, stream):
            for packet in self._packets_of(container, stream):
                self._packets += 1
                try:
                    yield from stream.decode(packet)
                except MemoryError:
                    raise
                except av.FFmpegError:
                    self.facts.damaged_packets += 1

    @contextmanager
    def _opened(self, file: FileIO) -> Iterator[tuple[InputContainer, AudioStream]]:
        file.seek(0)
        with _open(file) as container:
            stream = _audio_stream(container)
            self.facts.container = _short_name(container.format.name)
            self.facts.codec = stream.codec_context.codec.canonical_name
            layout = stream.layout
            self._layout = layout.name
            # PyAV frees twice the list of channels that an unusual layout has: FFmpeg gets none.
            if layout.nb_channels:
                stream.codec_context.layout = f"{layout.nb_channels} channels"
            yield container, stream

    def _packets_of(
        self, container: InputContainer, stream: AudioStream
    ) -> Iterator["Packet[AudioStream] | None"]:
        """Packets of the stream, the last one empty; damage to the container ends the stream."""
        try:
            yield from container.demux(stream)
        except MemoryError:
            raise
        except av.FFmpegError:
            self.facts.damaged_packets += 1
            yield None

    def _resampled(self, frames: Iterator[AudioFrame]) -> Iterator[Samples]:
        resampler: _Resampler | None = None
        facts = self.facts
        earlier_s = 0.0  # before the last change of format
        for frame in frames:
            if resampler is None or not resampler.takes(frame):
                if resampler is not None:
                    yield from resampler.flush()
                    earlier_s += resampler.received_s
                    self._lasts(earlier_s)
                resampler = _Resampler(frame, self._sample_rate_hz)
                facts.sample_rate_hz = facts.sample_rate_hz or frame.sample_rate
                facts.channels = facts.channels or frame.layout.nb_channels
            if resampler.push(frame):
                self._lasts(earlier_s + resampler.received_s)
                yield from resampler.pull()
        if resampler is not None:
            self._lasts(earlier_s + resampler.received_s)
            yield from resampler.flush()

    def _lasts(self, duration_s: float) -> None:
        self.facts.duration_s = round(duration_s, 6)
        if duration_s > self._max_duration_s:
            raise AudioTooLong(
                f"The track lasts longer than {self._max_duration_s:g} s: "
                "cut it, or raise TIMBRE_DECODE__MAX_DURATION_S."
            )


class _Resampler:
    """Frames of one rate, sample format and channel layout in; large mono pieces out."""

    def __init__(self, first: AudioFrame, sample_rate_hz: int) -> None:
        self._kind = _kind(first)
        rate_hz, layout, sample_format = self._kind
        channels = first.layout.nb_channels
        if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
            raise AudioUnreadable(
                f"The sample rate, {rate_hz} Hz, is outside {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz."
            )
        if not 1 <= channels <= MAX_CHANNELS:
            raise AudioUnreadable(f"{channels} channels are more than {MAX_CHANNELS}.")
        self._sample_rate_hz = sample_rate_hz
        self._received = 0
        self._given = 0
        self._packed = _packed_samples(rate_hz, channels)
        self._unpacked = 0
        self._graph = _graph()
        self._source = self._graph.add(
            "abuffer",
            sample_rate=str(rate_hz),
            sample_fmt=sample_format,
            channel_layout=layout,
            time_base=f"1/{rate_hz}",
        )
        # The plain mean: libswresample's own downmix weighs channels by their place in the room
        # and drops the subwoofer.
        mean = "mono|c0<" + "+".join(f"c{channel}" for channel in range(channels))
        self._sink = self._graph.add("abuffersink")
        self._graph.link_nodes(
            self._source,
            self._graph.add("asetnsamples", nb_out_samples=str(self._packed), pad="0"),
            self._graph.add("aformat", sample_fmts="fltp"),
            self._graph.add("pan", mean),
            # The resampler gives nothing for less than a filter's length.
            self._graph.add(
                "apad", pad_len=str(ceil(FILTER_TAPS * max(1.0, rate_hz / sample_rate_hz)))
            ),
            self._graph.add(
                "aresample",
                sample_rate=str(sample_rate_hz),
                filter_size=str(FILTER_TAPS),
                filter_type="kaiser",
                kaiser_beta=str(KAISER_BETA),
            ),
            self._sink,
        )
        try:
            self._graph.configure()
        except MemoryError:
            raise
        except av.FFmpegError as error:
            raise AudioUnreadable(
                f"{channels} channels ({layout}) at {rate_hz} Hz can't be resampled "
                f"({error.strerror})."
            ) from error

    def takes(self, frame: AudioFrame) -> bool:
        return _kind(frame) == self._kind

    def push(self, frame: AudioFrame) -> bool:
        """Take a frame, and tell whether there is enough for `pull`."""
        frame.pts = None  # the samples follow one another, whatever the time stamps say
        self._source.push(frame)
        samples = frame.samples
        self._received += samples
        self._unpacked += samples
        return self._unpacked >= self._packed

    def pull(self) -> Iterator[Samples]:
        # The filters run when they are asked, and a question in vain takes an exception.
        while self._unpacked >= self._packed:
            self._unpacked -= self._packed
            if (samples := self._pulled()) is not None:
                yield samples

    def flush(self) -> Iterator[Samples]:
        self._source.push(None)
        while (samples := self._pulled()) is not None:
            yield samples

    @property
    def received_s(self) -> float:
        return self._received / self._kind[0]

    @property
    def _due(self) -> int:
        """Samples that those received amount to at the target rate."""
        return -(-self._received * self._sample_rate_hz // self._kind[0])

    def _pulled(self) -> Samples | None:
        """A frame that has come through the filters; None when they want more or are flushed."""
        try:
            filtered = self._sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return None
        assert isinstance(filtered, AudioFrame)
        # Planes have the buffer protocol, which their stubs don't tell.
        mono = np.frombuffer(filtered.planes[0], np.float32, filtered.samples)  # type: ignore[call-overload]
        samples: Samples = mono[: self._due - self._given]
        self._given += samples.size
        return samples


def _graph() -> Graph:
    """A graph of filters without threads, which FFmpeg would start by the number of cores."""
    graph = Graph()
    graph.threads = 1
    return graph


def _packed_samples(rate_hz: int, channels: int) -> int:
    return max(1, min(int(rate_hz * FRAME_S), FRAME_VALUES // max(1, channels)))


def _kind(frame: AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.layout.name, frame.format.name


def _open(file: FileIO) -> InputContainer:
    if not os.fstat(file.fileno()).st_size:
        raise AudioEmpty("The file is empty.")
    try:
        return av.open(
            _Nameless(file),
            mode="r",
            container_options=WHITELISTS | {"protocol_whitelist": ""},
            metadata_errors="replace",
            buffer_size=READ_BYTES,
        )
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise AudioUnreadable(
            f"No accepted audio container, or damaged from the first byte ({error.strerror})."
        ) from None


class _Nameless:
    """A file without its name, so that FFmpeg judges it by its content alone."""

    def __init__(self, file: FileIO) -> None:
        self.read = file.read
        self.tell = file.tell
        self._file = file

    def seek(self, offset: int, whence: int) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:  # before the start: where a broken header points
            return -(error.errno or EIO)


def _audio_stream(container: InputContainer) -> AudioStream:
    best = container.streams.best("audio")
    if not isinstance(best, AudioStream):
        raise AudioUnreadable("The file holds no audio.")
    if best.codec_context is None:
        raise AudioUnreadable("The audio's codec is unknown or encrypted: encode the file anew.")
    for stream in container.streams:
        if stream is not best:
            stream.discard = Discard.all
    best.codec_context.thread_count = 1
    return best


def _short_name(names: str) -> str:
    """One name for a demuxer that lists several, as in `mov,mp4,m4a,3gp,3g2,mj2`."""
    first, *others = names.split(",")
    return "mp4" if "mp4" in others else first


def _sane(samples: Samples) -> Samples:
    """Floating-point files may hold anything: no sample leaves here infinite or not a number."""
    if samples.max(initial=0.0) <= LOUDEST and samples.min(initial=0.0) >= -LOUDEST:  # not of NaN
        return samples
    numbers = np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)
    return np.clip(numbers, -LOUDEST, LOUDEST)

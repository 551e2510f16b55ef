"""Log-mels of a data set's clips: those of an archive, or made once from audio and kept on disk."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.datasets.dataset import Clip, Dataset, LogMels, Skipped
from model.folder import write_whole
from model.frontend import LogMel, LogMelConfig, floored, normalise
from worker.decode.decoder import Decoder
from worker.errors import DatasetInvalid, DecodeFailed

MAX_CLIP_S = 600.0  # of a longer clip the first ten minutes count
BLOCK_S = 30.0  # of audio that is a spectrogram at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LogMelSource:
    """Log-mels by clip, each `(frames, mels)`; in memory or `.npy` files, not normalised.

    `range_db` is the floor that they still lack, None where they have theirs as an archive's do.
    """

    clips: Sequence[NDArray[Any] | Path]
    front_end: LogMelConfig
    range_db: float | None = None

    def clip(self, row: int) -> NDArray[Any]:
        """A clip as it is kept; a file is mapped for as long as its array is in use, since every
        map takes a descriptor and a process has few."""
        kept = self.clips[row]
        return np.asarray(np.load(kept, mmap_mode="r")) if isinstance(kept, Path) else kept

    def whole(self, row: int) -> Tensor:
        """The whole clip `(frames, mels)`, float32."""
        return floored(torch.from_numpy(np.array(self.clip(row), np.float32)), self.range_db)

    def excerpts(self, rows: Tensor, span: int, places: Tensor) -> Tensor:
        """`span` frames of each clip in `rows`, from `places` in [0, 1) of what there is to choose.

        Shape `(clips, span, mels)`, float32. A shorter clip is repeated.
        """
        cut = np.empty((len(rows), span, self.front_end.n_mels), dtype=np.float32)
        pairs = zip(rows.tolist(), places.tolist(), strict=True)
        for into, (row, place) in zip(cut, pairs, strict=True):
            clip = _at_least(self.clip(row), span)
            start = int(place * (len(clip) - span + 1))
            into[:] = clip[start : start + span]
        return floored(torch.from_numpy(cut), self.range_db)

    def windows(self, row: int, hop: int | None = None) -> Tensor:
        """The whole clip in windows `(windows, frames, mels)`, as the network takes them, one every
        `hop` frames; end to end where None. A tail shorter than a window is left out; a shorter
        clip is repeated."""
        frames = self.front_end.frames
        clip = _at_least(self.clip(row), frames)
        starts = range(0, len(clip) - frames + 1, hop or frames)
        cut = np.stack([clip[start : start + frames] for start in starts]).astype(np.float32)
        windows = floored(torch.from_numpy(cut), self.range_db)
        return normalise(windows) if self.front_end.normalise else windows


def makes(front_end: LogMelConfig, logmels: LogMels) -> bool:
    """Whether `front_end` makes of audio what the archive holds of it."""
    scale = (front_end.f_max_hz, front_end.compression, front_end.normalise)
    return _shape(front_end) == _held(logmels) and scale == (logmels.f_max_hz, "decibel", True)


def archive_source(dataset: Dataset, front_end: LogMelConfig) -> LogMelSource:
    """The archive's log-mels; DatasetInvalid where `front_end` makes others."""
    logmels = dataset.logmels
    assert logmels is not None
    if not makes(front_end, logmels):
        raise DatasetInvalid(
            f"{dataset.name} holds log-mels of {_told(*_held(logmels))}, and this bundle's front "
            f"end makes others from audio, {_told(*_shape(front_end))}: use the data set's audio, "
            "or a bundle that was trained on such an archive"
        )
    return LogMelSource(np.ascontiguousarray(logmels.values.transpose(0, 2, 1)), front_end)  # type: ignore[arg-type]


def audio_source(
    dataset: Dataset, front_end: LogMelConfig, cache: Path, progress: Progress = lambda *_: None
) -> tuple[LogMelSource, Dataset]:
    """Log-mels of every clip that is in a split, through `cache`, and the data set of those.

    Each clip is decoded once, one at a time, and read from disk ever after. Clips that can't be
    decoded are left out and named in the data set's `skipped`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [clip for clip in dataset.clips if clip.split is not None]
    kept: list[Clip] = []
    logmels: list[Path] = []
    skipped: list[Skipped] = []
    for number, clip in enumerate(wanted, 1):
        try:
            logmels.append(_cached(clip, front_end, cache))
            kept.append(clip)
        except DecodeFailed as error:
            skipped.append(Skipped(clip.name, error.message, clip.split))
        progress(number, len(wanted))
    readable = replace(dataset, clips=tuple(kept), skipped=(*dataset.skipped, *skipped))
    return LogMelSource(logmels, front_end, front_end.range_db), readable


def open_source(
    dataset: Dataset, front_end: LogMelConfig, cache: Path, progress: Progress = lambda *_: None
) -> tuple[LogMelSource, Dataset]:
    """Log-mels of `dataset` as `front_end` makes them, and the clips that they are of."""
    if dataset.logmels is not None:
        return archive_source(dataset, front_end), dataset
    return audio_source(dataset, front_end, cache, progress)


def logmel_of(samples: NDArray[np.float32], front_end: LogMelConfig) -> NDArray[np.float16]:
    """The log-mel `(frames, mels)` of a whole clip, with no floor and not normalised."""
    per_block = int(BLOCK_S * front_end.sample_rate_hz / front_end.hop)
    around = front_end.n_fft // (2 * front_end.hop) + 1  # frames that half an FFT reaches over
    total = 1 + len(samples) // front_end.hop
    blocks = []
    for first in range(0, total, per_block):
        frames = min(per_block, total - first)
        lead = min(first, around)
        settings = {"frames": lead + frames, "range_db": None, "normalise": False}
        begin = (first - lead) * front_end.hop
        end = (first + frames + around) * front_end.hop
        with torch.inference_mode():
            made = LogMel(front_end.model_copy(update=settings))(
                torch.from_numpy(samples[begin:end])[None]
            )
        blocks.append(made[0, lead:].numpy().astype(np.float16))
    return np.concatenate(blocks)


def _cached(clip: Clip, front_end: LogMelConfig, cache: Path) -> Path:
    """The file of the clip's log-mel, made where it isn't there."""
    assert clip.path is not None
    stat = clip.path.stat()
    identity = f"{clip.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{front_end!r}"
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    stored = cache / f"{digest[:24]}.npy"
    if not stored.is_file():
        packed = BytesIO()
        np.save(packed, logmel_of(samples_of(clip.path, front_end.sample_rate_hz), front_end))
        write_whole(stored, packed.getbuffer())
    return stored


def samples_of(path: Path, sample_rate_hz: int) -> NDArray[np.float32]:
    """The first MAX_CLIP_S of the file, decoded as the worker decodes."""
    pieces, length = [], 0
    for piece in Decoder(path, sample_rate_hz):
        pieces.append(piece)
        length += len(piece)
        if length >= MAX_CLIP_S * sample_rate_hz:
            break
    return np.concatenate(pieces)[: int(MAX_CLIP_S * sample_rate_hz)]


def _at_least(clip: NDArray[Any], frames: int) -> NDArray[Any]:
    if len(clip) >= frames:
        return clip
    return np.tile(clip, (-(-frames // len(clip)), 1))[:frames]


def _held(logmels: LogMels) -> tuple[int, int, int, int]:
    return logmels.sample_rate_hz, logmels.n_fft, logmels.hop, logmels.values.shape[1]


def _shape(front_end: LogMelConfig) -> tuple[int, int, int, int]:
    return front_end.sample_rate_hz, front_end.n_fft, front_end.hop, front_end.n_mels


def _told(rate_hz: int, n_fft: int, hop: int, mels: int) -> str:
    return f"{mels} mels at {rate_hz} Hz ({n_fft}-sample FFT, hop {hop})"

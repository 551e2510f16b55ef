"""What every layout becomes: clips with labels, a split, and what must not be torn apart by it."""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.calibration import Kind
from worker.errors import DatasetInvalid, SplitLeaks

SPLIT_NAMES = {
    "training": "train",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "testing": "test",
}
MAX_NAMED = 10  # tracks named in one error
MAX_SKIPPED = 3  # named of those that are left out for one reason
MAX_REASONS = 10
MIDDLE_BYTES = 256  # that tell files of one size apart


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled piece of music.

    `group` is the artist, or, where artists are unknown, the recording: what a split must keep on
    one side. `split` is None where the data set leaves the clip out of its splits.
    """

    name: str
    labels: tuple[str, ...]
    group: str
    split: str | None = None
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A clip that is left out, and why; of a split, where it would be in one."""

    name: str
    reason: str
    split: str | None = None


@dataclass(frozen=True)
class LogMels:
    """Log-mels of a data set that has no audio, in the order of its clips.

    `values` is `(clips, mels, frames)`; gain and offset of each clip are unknown. The rest says
    how they were made, so that a front end can be held against it.
    """

    values: NDArray[np.uint8] | NDArray[np.float32]
    sample_rate_hz: int = 22_050
    n_fft: int = 2_048
    hop: int = 914
    f_max_hz: float = 11_025.0


@dataclass(frozen=True)
class Dataset:
    """Clips of one layout. `grouped_by` says what `Clip.group` is."""

    name: str
    layout: str
    kind: Kind
    labels: tuple[str, ...]
    clips: tuple[Clip, ...]
    grouped_by: Literal["artist", "recording"]
    licence: str
    skipped: tuple[Skipped, ...] = ()
    logmels: LogMels | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.clips:
            reasons = [f"{skipped.name}: {skipped.reason}" for skipped in self.skipped]
            raise DatasetInvalid(
                f"{self.name}: no labelled clip found in layout {self.layout!r}"
                + (f"; left out: {_listed(reasons, MAX_SKIPPED, '; ')}" if reasons else "")
            )
        if len({clip.name for clip in self.clips}) != len(self.clips):
            twice = [name for name, n in Counter(c.name for c in self.clips).items() if n > 1]
            raise DatasetInvalid(f"{self.name}: named twice: {_listed(twice)}")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, those that everyone knows first."""
        found = {clip.split for clip in self.clips if clip.split is not None}
        known = [name for name in ("train", "valid", "test") if name in found]
        return (*known, *sorted(found - set(known)))

    def indices(self, split: str | None = None) -> NDArray[np.intp]:
        """Positions of the clips of `split`, by any of its names; of every clip where None.

        Raises DatasetInvalid for a split that is not there.
        """
        if split is None:
            return np.arange(len(self.clips))
        wanted = split_name(split)
        if wanted not in self.splits:
            raise DatasetInvalid(
                f"{self.name} has no split {split!r}; it has {', '.join(self.splits) or 'none'}"
            )
        return np.flatnonzero([clip.split == wanted for clip in self.clips])

    def only(self, rows: Sequence[int] | NDArray[np.intp]) -> "Dataset":
        """The data set of the clips at these positions."""
        logmels = self.logmels
        return replace(
            self,
            clips=tuple(self.clips[row] for row in rows),
            logmels=None if logmels is None else replace(logmels, values=logmels.values[rows]),
        )

    def columns(self, asked: Sequence[str]) -> dict[str, int]:
        """Where in `asked` the data set's labels stand; those that don't are left out.

        Case makes no difference, nor does how accents are encoded, but where `asked` has labels
        that differ in nothing else.
        """
        exact = {label: column for column, label in enumerate(asked)}
        spelt = Counter(map(folded, asked))
        any_case = {
            folded(label): column for label, column in exact.items() if spelt[folded(label)] == 1
        }
        found = {label: exact.get(label, any_case.get(folded(label))) for label in self.labels}
        return {label: column for label, column in found.items() if column is not None}

    def targets(self, labels: Sequence[str] | None = None) -> NDArray[np.float32]:
        """Zeros and ones `(clips, labels)` over `labels`, which must cover the data set's own."""
        asked = self.labels if labels is None else labels
        order = self.columns(asked)
        unknown = sorted(set(self.labels) - order.keys())
        if unknown:
            raise DatasetInvalid(f"{self.name} has labels that are not asked for: {unknown}")
        table = np.zeros((len(self.clips), len(asked)), dtype=np.float32)
        for row, clip in enumerate(self.clips):
            table[row, [order[label] for label in clip.labels]] = 1.0
        return table

    def check_split(self) -> "Dataset":
        """The data set itself; SplitLeaks, naming the tracks, where a group is on two sides."""
        sides: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for clip in self.clips:
            if clip.split is not None:
                sides[clip.group][clip.split].append(clip.name)
        torn = {group: by for group, by in sides.items() if len(by) > 1}
        if torn:
            told = [
                f"{group}: " + " | ".join(f"{split}: {_listed(by[split], 3)}" for split in by)
                for group, by in sorted(torn.items())
            ]
            raise SplitLeaks(
                f"{self.name}: {len(torn)} {self.grouped_by}(s) stand on both sides of the split, "
                f"so its figures would flatter: {_listed(told, separator='; ')}. "
                "Give each one side, or leave the split out to have one made"
            )
        return self

    def with_split(self, seed: int, shares: Sequence[float] = (0.7, 0.15, 0.15)) -> "Dataset":
        """The same clips split anew into train, valid and test, group by group.

        Groups are dealt in random order, each to the side that lacks most of the group's labels
        (after Sechidis, Tsoumakas and Vlahavas: On the stratification of multi-label data, 2011).
        """
        generator = np.random.default_rng(seed)
        columns = {label: column for column, label in enumerate(self.labels)}
        members: dict[str, list[int]] = defaultdict(list)
        for index, clip in enumerate(self.clips):
            members[clip.group].append(index)
        counts = {
            group: np.bincount(
                [columns[label] for i in clips for label in self.clips[i].labels],
                minlength=len(columns),
            )
            for group, clips in members.items()
        }
        wanted = np.outer(shares, sum(counts.values(), np.zeros(len(columns))))
        side_of: dict[str, str] = {}
        groups = list(members)
        shuffled = [groups[i] for i in generator.permutation(len(groups))]
        for group in sorted(shuffled, key=lambda g: -len(members[g])):
            side = int(np.argmax(wanted @ (counts[group] / np.maximum(wanted.sum(0), 1e-9))))
            wanted[side] -= counts[group]
            side_of[group] = ("train", "valid", "test")[side]
        return replace(
            self, clips=tuple(replace(clip, split=side_of[clip.group]) for clip in self.clips)
        )


def split_name(raw: str) -> str | None:
    """A split's name as used here; None for an empty one."""
    name = raw.strip().lower()
    return SPLIT_NAMES.get(name, name) or None


def labels_of(clips: Iterable[Clip]) -> tuple[str, ...]:
    """All labels that clips have, in order."""
    return tuple(sorted({label for clip in clips for label in clip.labels}))


def odd_labels(dataset: Dataset) -> Iterator[str]:
    """What somebody about to train should know of the labels, in sentences."""
    learnt = labels_of(clip for clip in dataset.clips if clip.split == "train")
    if absent := [label for label in dataset.labels if label not in learnt]:
        yield f"no clip in train has the label {_listed(absent)}"
    by_spelling: dict[str, list[str]] = defaultdict(list)
    for label in dataset.labels:
        by_spelling[folded(label)].append(label)
    for alike in by_spelling.values():
        if len(alike) > 1:
            what = "case" if len({*map(str.casefold, alike)}) == 1 else "case or encoding"
            yield f"{_listed(alike)} are taken for {len(alike)} labels, and differ in {what} alone"


def folded(name: str) -> str:
    """What names share that differ in nothing but case, and in whether an accent is a character of
    its own, as in the names of files from a Mac."""
    return unicodedata.normalize("NFC", name.casefold())


def utf8(name: str) -> str:
    """A file's name as text that can be written and drawn: bytes that are no UTF-8 as `\\xNN`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def left_out(skipped: Iterable[Skipped]) -> list[tuple[str, str]]:
    """Reasons and the clips that are left out for each: a few by name and the rest by number."""
    names: dict[str, list[str]] = defaultdict(list)
    for clip in skipped:
        names[clip.reason].append(clip.name)
    told = [(_listed(of, MAX_SKIPPED), reason) for reason, of in names.items()]
    if more := sum(len(of) for of in list(names.values())[MAX_REASONS:]):
        told[MAX_REASONS:] = [(f"{more} more", "have other reasons, each its own")]
    return told


def recordings(paths: Iterable[Path]) -> dict[Path, str]:
    """What recording each file is, by its path or the first of the files with the same bytes.

    Only files of one size that are alike in the middle are read whole: a catalogue cut to one
    length has but few sizes.
    """
    found = {path: utf8(str(path)) for path in paths}
    alike = [list(found)]
    for told in (_size, _middle, _digest):
        alike = [same for files in alike for same in _grouped(files, told) if len(same) > 1]
    for first, *others in alike:
        found.update(dict.fromkeys(others, found[first]))
    return found


def _grouped(files: Iterable[Path], told: Callable[[Path], Hashable]) -> Iterable[list[Path]]:
    groups: dict[Hashable, list[Path]] = defaultdict(list)
    for file in files:
        groups[told(file)].append(file)
    return groups.values()


def _size(path: Path) -> int:
    return path.stat().st_size


def _middle(path: Path) -> bytes:
    """Where music is, not the tags and pictures of an album, nor silence."""
    with path.open("rb") as file:
        file.seek(_size(path) // 2)
        return file.read(MIDDLE_BYTES)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _listed(names: Sequence[str], most: int = MAX_NAMED, separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more

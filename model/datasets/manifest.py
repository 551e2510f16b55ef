"""A CSV manifest: one line a clip, with a path, its label or labels, and perhaps artist and split.

Columns by any of these names: `path` (relative to the manifest), `label` or `genre` (one) or
`labels`, `tags` or `genres` (several, between `;` or `|`), `artist`, `recording` or `song`, and
`split` or else a name that ends in `_split`.

A clip's group is its artist, or its recording where the artist's cell is blank; where both are, its
file. Neither case, space nor the encoding of accents tells two artists or recordings apart.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from model.datasets.dataset import (
    Clip,
    Dataset,
    Skipped,
    folded,
    labels_of,
    recordings,
    split_name,
    utf8,
)
from worker.errors import DatasetInvalid

PATH = ("path", "file", "filename")
ONE_LABEL, LABELS = ("label", "genre"), ("labels", "tags", "genres")
ARTIST, RECORDING = ("artist", "artist_id"), ("recording", "song")


def load(path: Path) -> Dataset:
    """Clips of the manifest at `path`; rows whose file is missing are skipped and named."""
    rows, columns = _table(path)
    paths, one, several = (_find(columns, names) for names in (PATH, ONE_LABEL, LABELS))
    if paths is None or (one or several) is None:
        raise DatasetInvalid(
            f"{path} needs a column `path` and a column `label` or `labels`, between commas; its "
            f"first line has {', '.join(columns) or 'none'}"
        )
    artist, recording = _find(columns, ARTIST), _find(columns, RECORDING)
    split = columns.get("split") or _find(columns, [n for n in columns if n.endswith("_split")])
    present = {name: path.parent / name for row in rows if (name := row[paths])}
    found = {name: file for name, file in present.items() if file.is_file()}
    groups = [_first(row, (artist, recording)) for row in rows]
    same = recordings(
        found[row[paths]]
        for row, told in zip(rows, groups, strict=True)
        if row[paths] in found and not told
    )
    name_of: dict[Path, str] = {}
    spelt: dict[str, str] = {}  # groups as they are first written
    clips, skipped = [], []
    for row, told in zip(rows, groups, strict=True):
        name, side = row[paths], split_name(row[split]) if split else None
        if name not in found:
            why = "is in the manifest but not on disk" if name else "has no path in its line"
            skipped.append(Skipped(name or "a clip", why, side))
            continue
        tags = re.split(r"[;|]", row[several]) if several else [row[str(one)]]
        labels = tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))
        if not labels:
            skipped.append(Skipped(name, "has no label", side))
            continue
        file = found[name]
        first = name_of.setdefault(file.parent.resolve() / file.name, name)
        if first != name:
            raise DatasetInvalid(f"{path}: one file is named twice, as {first} and as {name}")
        group = spelt.setdefault(folded(" ".join(told.split())), told) or same[file]
        clips.append(Clip(name, labels, group, side, file))
    return Dataset(
        name=utf8(path.stem),
        layout="manifest",
        kind="multi" if several else "single",
        labels=labels_of(clips),
        clips=tuple(clips),
        grouped_by="artist" if artist and any(row[artist] for row in rows) else "recording",
        licence="that of your own files",
        skipped=tuple(skipped),
    )


def _table(path: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows by column, their cells without the space around them, and columns by lower-case name."""
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        for row in reader:
            if None in row:  # csv's key for what no column is left for
                raise DatasetInvalid(
                    f"{path}, line {reader.line_num}: more cells than the header; one with a comma "
                    "in it needs quotes around it"
                )
            rows.append({column: cell.strip() for column, cell in row.items()})
        header = reader.fieldnames or ()
    names = [name.strip().lower() for name in header]
    if twice := sorted(name for name, count in Counter(names).items() if name and count > 1):
        raise DatasetInvalid(f"{path} has two columns {', '.join(twice)}; give one another name")
    return rows, dict(zip(names, header, strict=True))


def _find(columns: dict[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _first(row: dict[str, str], columns: Sequence[str | None]) -> str:
    """What the first of `columns` that isn't blank says; nothing where all are."""
    return next((row[column] for column in columns if column and row[column]), "")

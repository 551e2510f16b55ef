"""A CSV manifest: one line a clip, with a path, its label or labels, and perhaps artist and split.

Columns by any of these names: `path` (relative to the manifest), `label` or `genre` (one) or
`labels`, `tags` or `genres` (several, between `;` or `|`), `artist`, `recording` or `song`, and
`split` or a name that ends in `_split`.
"""

import csv
import re
from pathlib import Path

from model.datasets.dataset import Clip, Dataset, Skipped, recordings, split_name
from worker.errors import DatasetInvalid

PATH = ("path", "file", "filename")
ONE_LABEL, LABELS = ("label", "genre"), ("labels", "tags", "genres")
ARTIST, RECORDING = ("artist", "artist_id"), ("recording", "song")


def load(path: Path) -> Dataset:
    """Clips of the manifest at `path`; rows whose file is missing are skipped and named."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
    paths, one, several = (_find(columns, names) for names in (PATH, ONE_LABEL, LABELS))
    if paths is None or (one or several) is None:
        raise DatasetInvalid(
            f"{path} needs a column `path` and a column `label` or `labels`, between commas; its "
            f"first line has {', '.join(columns) or 'none'}"
        )
    artist, recording = _find(columns, ARTIST), _find(columns, RECORDING)
    split = next((columns[name] for name in columns if re.fullmatch(r"(.+_)?split", name)), None)
    present = {name: path.parent / name for row in rows if (name := row[paths])}
    found = {name: file for name, file in present.items() if file.is_file()}
    same = recordings(found.values())
    clips, skipped = [], []
    for row in rows:
        name = row[paths]
        if name not in found:
            why = "is in the manifest but not on disk" if name else "has no path in its line"
            skipped.append(Skipped(name or "a clip", why))
            continue
        told = re.split(r"[;|]", row[several] or "") if several else [row[str(one)] or ""]
        labels = tuple(dict.fromkeys(label.strip() for label in told if label.strip()))
        if not labels:
            skipped.append(Skipped(name, "has no label"))
            continue
        group = (row[artist] if artist else row[recording] if recording else "") or same[
            found[name]
        ]
        clips.append(
            Clip(name, labels, group, split_name(row[split] or "") if split else None, found[name])
        )
    return Dataset(
        name=path.stem,
        layout="manifest",
        kind="multi" if several else "single",
        labels=tuple(sorted({label for clip in clips for label in clip.labels})),
        clips=tuple(clips),
        grouped_by="artist" if artist else "recording",
        licence="that of your own files",
        skipped=tuple(skipped),
    )


def _find(columns: dict[str, str], names: tuple[str, ...]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)

"""`timbre tag`: the worker's own fetch, decode, batch and vote, without Kafka and Redis."""

import asyncio
import csv
import json
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from model.bundle import Bundle
from schemas.events import Processing
from worker.analysis import Analysis
from worker.commands import console
from worker.commands.sources import audio
from worker.errors import SourceInvalid, TimbreError, Unexpected
from worker.printable import printable
from worker.settings import Settings
from worker.tagger import Tagger, Timings

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".png", ".svg", ".pdf"})
INTERRUPTED = 130
ALL_FOLDERS = Path("/")
CSV_COLUMNS = (
    "source", "head", "label", "category", "score", "share", "uncertain", "error", "message",
)  # fmt: skip

FORMULAS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # full-width ones count where people write so

Source = tuple[str, str | SourceInvalid]
"""How a file is shown, and its address or why there is none."""

Tagged = tuple[str, Analysis]
"""How a file is shown, and what was found."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file: an analysis or an error, never both."""

    source: str
    analysis: Analysis | None
    error: TimbreError | None
    processing: Processing

    def to_json(self) -> dict[str, Any]:
        """The form of `--json`: the result as on the topic, with its source and its error."""
        error, analysis = self.error, self.analysis
        line: dict[str, Any] = {
            "source": self.source,
            "tags": [],
            "uncertain": None,
            "error": error and {"code": error.code, "message": error.message},
        }
        if analysis is not None:
            result = analysis.model_dump(mode="json", exclude={"embedding"}, exclude_none=True)
            line |= {"tags": result.pop("tags"), "uncertain": result.pop("uncertain"), **result}
        return line | {"processing": self.processing.model_dump(mode="json")}


def tag_tracks(
    settings: Settings,
    files: Sequence[str],
    *,
    form: str = "table",
    plot: bool = False,
    bundle: str | None = None,
) -> int:
    """Tag `files` and report each; returns 0 when all were tagged, 1 when some were not.

    Parameters
    ----------
    files
        Audio files, folders or URLs. With `plot`, a name ending in .png, .svg or .pdf is where the
        picture goes, where no other file stands; without one each file's picture goes to the
        current folder, under the file's name, and a number where several files have it.
    form
        `table`, `csv` or `json`.
    bundle
        Path or name of a model bundle; None takes the configured one.
    """
    picture = None
    if plot:
        pictures = [name for name in files if Path(name).suffix.lower() in PICTURE_SUFFIXES]
        files = [name for name in files if name not in pictures]
        picture = _place(pictures) if pictures else None
    if not files:
        raise SourceInvalid("Name at least one audio file, folder or URL to tag.")
    settings = settings.model_copy(
        update={
            # Whoever names a file here may read it anyway.
            "fetch": settings.fetch.model_copy(update={"file_roots": (ALL_FOLDERS,)}),
            "vote": settings.vote.model_copy(update={"taggram": plot or settings.vote.taggram}),
        }
    )
    loaded = Bundle.load(bundle or settings.worker.bundle)
    try:
        failed, drawn = asyncio.run(_tag_all(settings, loaded, files, form, plot=plot))
    except KeyboardInterrupt:
        # At once: Python's own exit aborts where a thread is still inside the network.
        os._exit(INTERRUPTED)
    if plot:
        _draw(drawn, loaded, settings.windows.hop_s, picture)
    return 1 if failed else 0


async def _tag_all(
    settings: Settings, bundle: Bundle, files: Sequence[str], form: str, *, plot: bool
) -> tuple[bool, list[Tagged]]:
    """Whether some failed, and what was found of the others, if it is to be drawn: of a large
    collection it takes gigabytes."""
    sources = list(_sources(files))
    failed, drawn = False, []
    shown, in_terminal = console.out(), sys.stdout.isatty()
    report = _report(form, shown)
    with console.progress(
        shown if in_terminal else console.err(),  # one console keeps the bar below what it shows
        "Tagging",
        wanted=len(sources) > 1 and not (in_terminal and form != "table"),
    ) as progress:
        task = progress.add_task("", total=len(sources))
        async with (
            Tagger(settings, bundle) as tagger,
            aclosing(_in_order(tagger, sources, settings.worker.max_in_flight)) as ordered,
        ):
            async for outcome in ordered:
                report(outcome)
                failed |= outcome.error is not None
                if plot and outcome.analysis is not None:
                    drawn.append((outcome.source, outcome.analysis))
                progress.advance(task)
    return failed, drawn


def _sources(files: Sequence[str]) -> Iterator[Source]:
    for name in files:
        try:
            yield from audio(name)
        except SourceInvalid as error:
            yield name, error


async def _in_order(
    tagger: Tagger, sources: Iterable[Source], at_once: int
) -> AsyncGenerator[Outcome, None]:
    """Outcomes in the order of `sources`, while up to `at_once` are being worked on."""
    pending: list[asyncio.Task[Outcome]] = []
    try:
        for source, uri in sources:
            pending.append(asyncio.create_task(_tag_one(tagger, source, uri)))
            if len(pending) >= at_once:
                yield await pending.pop(0)
        while pending:
            yield await pending.pop(0)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _tag_one(tagger: Tagger, source: str, uri: str | SourceInvalid) -> Outcome:
    timings = Timings()
    analysis: Analysis | None = None
    error: TimbreError | None = None
    if isinstance(uri, SourceInvalid):
        error = uri
    else:
        try:
            analysis = await tagger.tag(uri, timings=timings)
        except TimbreError as failure:
            error = failure
        except Exception as failure:
            log.exception("Unexpected failure while tagging %s", source)
            error = Unexpected(f"Timbre failed unexpectedly: {type(failure).__name__}: {failure}")
    processing = Processing(
        processed_at=datetime.now(UTC),
        timings_s={stage: round(seconds, 6) for stage, seconds in timings.seconds.items()},
        cached=False,
        attempt=1,
    )
    return Outcome(source, analysis, error, processing)


def _report(form: str, shown: Console) -> Callable[[Outcome], None]:
    """One way of showing outcomes, in the order the files were given."""
    if form == "json":
        return _write_json
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        return partial(_write_csv, writer)
    return partial(_print, shown)


def _write_json(outcome: Outcome) -> None:
    """One object a line."""
    console.json_line(json.dumps(outcome.to_json(), ensure_ascii=False))


def _write_csv(writer: Any, outcome: Outcome) -> None:
    """A row for every tag; a file without tags has one row with its error."""
    analysis, error = outcome.analysis, outcome.error
    rows = list[tuple[object, ...]]()
    if analysis is not None:
        rows += [
            (t.head, t.label, t.category, t.score, t.share, analysis.uncertain, "", "")
            for t in analysis.tags
        ]
    if error is not None:
        rows.append((*[""] * 6, error.code, error.message))
    for row in rows:
        cells = (outcome.source, *row)
        writer.writerow([_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    sys.stdout.flush()


def _print(shown: Console, outcome: Outcome) -> None:
    """A block for every file: its facts on a line, then a bar for every tag."""
    shown.print(Text(printable(outcome.source), style="bold"))
    if outcome.error is not None:
        shown.print(Text.assemble("  ", (outcome.error.code, "red"), " ", outcome.error.message))
    if outcome.analysis is not None:
        shown.print(console.facts(outcome.analysis))
        shown.print(console.tag_table(outcome.analysis))
    shown.print()


def _cell(text: str) -> str:
    """A cell that steers no terminal, and that no spreadsheet takes for a formula."""
    return printable(f"'{text}" if text.startswith(FORMULAS) else text)


def _draw(drawn: Sequence[Tagged], bundle: Bundle, hop_s: float, picture: Path | None) -> None:
    """The taggrams as pictures: all in the one named, or each in one of its own."""
    # Only now, since matplotlib loads for half a second.
    from worker.commands.plot import draw_taggrams  # noqa: PLC0415

    if picture is not None:
        pictures = [(picture, drawn)] if drawn else []
    else:
        paths = _pictures([source for source, _ in drawn])
        pictures = [(path, [track]) for path, track in zip(paths, drawn, strict=True)]
    for path, shown in pictures:
        draw_taggrams(path, shown, bundle, hop_s=hop_s)
        console.err().print(f"Drew {path}", markup=False)


def _place(pictures: Sequence[str]) -> Path:
    """Where the one picture goes that was named."""
    from worker.commands.plot import check_place  # noqa: PLC0415  # as in `_draw`

    if len(pictures) > 1:
        raise SourceInvalid(
            f"--plot draws into one picture, and {' and '.join(pictures)} were named: leave out "
            "all but one."
        )
    place = Path(pictures[0])
    check_place(place)
    return place


def _pictures(sources: Sequence[str]) -> list[Path]:
    """Where the picture of each source goes: its stem, numbered where an earlier one has that."""
    stems = [Path(source).stem for source in sources]
    names: dict[str, None] = {}
    plain = set(stems)
    for stem in stems:
        numbered = (f"{stem}-{number}" for number in count(2))
        free = (name for name in numbered if name not in names and name not in plain)
        names[next(free) if stem in names else stem] = None
    return [Path(f"{name}.taggram.png") for name in names]

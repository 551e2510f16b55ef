"""How results look in a terminal: one place for colours, bars and short texts."""

import sys
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, TextIO

from rich.bar import Bar
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from schemas.events import Tag, TrackTags
from worker.printable import printable

if TYPE_CHECKING:  # it loads the model's libraries, which few commands need
    from worker.analysis import Analysis

BAR_CELLS = 12
PIPE_WIDTH = 160
ID_WIDTH = 28
HEAD_STYLES = {"genre": "bold cyan"}
TABLE_TAGS = 10
SHOWN_SCORE = 0.05


class _Console(Console):
    """Shows text as it is: it is no markup, and steers nothing, whoever it came from."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, lines=True), style, control)


def out() -> Console:
    """Standard output; as wide as the terminal, or wide enough for any line into a pipe."""
    return _console(sys.stdout)


def err() -> Console:
    """Standard error, where progress and remarks go, so that results stay alone on the other."""
    return _console(sys.stderr)


def label(tag: Tag) -> Text:
    """A tag in short: its label and score."""
    return Text.assemble(
        (tag.label, HEAD_STYLES.get(tag.head, "")), " ", (f"{tag.score:.2f}", "dim")
    )


def by_head(tags: list[Tag]) -> dict[str, list[Tag]]:
    """The tags of each head, in the order of results: head by head, best first."""
    return {head: list(group) for head, group in groupby(tags, attrgetter("head"))}


def best(tags: list[Tag], count: int) -> list[Tag]:
    """What people are shown of one head: `count` tags at most, none but the first below 0.05."""
    return tags[:1] + [tag for tag in tags[1:count] if tag.score >= SHOWN_SCORE]


def counted(count: int, noun: str) -> str:
    """A number of things: `1 track`, `2 tracks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def line(on: Console, text: Text) -> None:
    """Print one thing on one line: cut where a terminal ends, whole into a pipe."""
    text = Text(r"\n").join(text.split("\n"))
    on.print(text, overflow="ellipsis" if on.is_terminal else "ignore", no_wrap=True)


def json_line(text: str) -> None:
    """Print a JSON object on a line of standard output."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def facts(result: "TrackTags | Analysis") -> Text:
    """What the audio is, on a line."""
    audio, windows = result.audio, result.windows
    parts = [
        clock(audio.duration_s),
        f"{audio.codec} {audio.sample_rate_hz / 1000:g} kHz {audio.channels} ch",
        counted(windows.total, "window") + (f", {windows.silent} silent" if windows.silent else ""),
        f"{result.model.name}@{result.model.version[:8]}",
    ]
    line = Text("  " + " · ".join(parts), style="dim")
    return line.append(" · uncertain", style="yellow") if result.uncertain else line


def tag_table(result: "TrackTags | Analysis") -> Table:
    """The best tags of each head, with their scores and their shares of the votes."""
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
    table.add_column("")
    table.add_column("tag", min_width=14)
    table.add_column("score", justify="right")
    table.add_column("")
    table.add_column("votes", justify="right")
    for head, tags in by_head(result.tags).items():
        for place, t in enumerate(best(tags, TABLE_TAGS)):
            table.add_row(
                Text("" if place else f"  {head}", style="dim"),
                Text(t.label, style=HEAD_STYLES.get(head, "")),
                f"{t.score:.3f}",
                Bar(1, 0, t.score, width=BAR_CELLS, color="cyan"),
                f"{t.share:.0%}",
            )
    return table


def progress(on: Console, text: str, *more: ProgressColumn, wanted: bool = True) -> Progress:
    """A bar that counts, and goes once all is done; nothing where nobody looks on."""
    return Progress(
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        *more,
        console=on,
        transient=True,
        redirect_stdout=False,  # it would take what goes into a file to the terminal
        redirect_stderr=sys.stderr.isatty(),
        disable=not (on.is_terminal and wanted),
    )


def _console(stream: TextIO) -> Console:
    return _Console(
        file=stream,
        width=None if stream.isatty() else PIPE_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not stream.isatty(),
    )

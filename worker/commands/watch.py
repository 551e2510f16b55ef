"""`timbre watch`."""

import asyncio

from rich.console import Console
from rich.text import Text

from schemas.events import DeadLetter, TrackTags
from worker import console
from worker.settings import Settings
from worker.watch import Watch

ID_WIDTH = 28
GENRES_SHOWN = 2
TAGS_SHOWN = 4


def watch_results(
    settings: Settings,
    *,
    from_beginning: bool = False,
    failures: bool = False,
    count: int | None = None,
    as_json: bool = False,
) -> None:
    """Print results as they arrive, until `count` or Ctrl-C."""

    async def follow() -> None:
        out, seen = console.out(), 0
        async with Watch(
            settings.kafka, from_beginning=from_beginning, failures=failures
        ) as results:
            if not as_json:
                topic = settings.kafka.topic_tags
                console.err().print(f"Watching {topic}; Ctrl-C ends.", style="dim")
            async for result in results:
                if as_json:
                    console.json_line(result.to_bytes().decode())
                else:
                    print_line(out, result)
                seen += 1
                if seen == count:
                    return

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        return


def print_line(out: Console, result: TrackTags | DeadLetter) -> None:
    """One result in one line: track, genres, other tags; or track and what went wrong."""
    if isinstance(result, DeadLetter):
        name = result.track_id or "(no track id)"
        line = Text.assemble(_cell(out, name), ("✗ ", "red"), (result.reason.code, "red"), " ")
        line.append(result.reason.message, style="dim")
    else:
        heads = dict.fromkeys(tag.head for tag in result.tags)
        line = Text.assemble(_cell(out, result.track_id), ("✓ ", "green"))
        if result.uncertain:
            line.append("uncertain ", style="yellow")
        parts = [
            console.best(result.tags, head, TAGS_SHOWN if number else GENRES_SHOWN)
            for number, head in enumerate(heads)
        ]
        line.append_text(Text("  ·  ", style="dim").join(parts))
        if result.processing.cached:
            line.append("  cached", style="dim")
    console.line(out, line)


def _cell(out: Console, name: str) -> Text:
    """A track's id as a column: cut in a terminal, whole where something else may read it."""
    cut = name[: ID_WIDTH - 1] + "…" if out.is_terminal and len(name) > ID_WIDTH else name
    return Text(f"{cut:<{ID_WIDTH}} ", style="bold")

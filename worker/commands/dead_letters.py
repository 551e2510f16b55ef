"""`timbre dead-letters list|show|retry`."""

import asyncio
import json
import re
from base64 import b64decode
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from rich.text import Text

from schemas.events import DeadLetter
from worker import dead_letters
from worker.commands import console
from worker.dead_letters import Place, shown
from worker.errors import SourceInvalid
from worker.printable import printable
from worker.settings import Settings

PLACE = re.compile(r"(\d+):(\d+)")
PLACE_WIDTH = 8
CODE_WIDTH = 22
MOMENT = "%Y-%m-%d %H:%M:%S %Z"


def list_all(settings: Settings, *, code: str | None, limit: int | None, as_json: bool) -> None:
    """Print every dead letter on a line."""

    async def run() -> None:
        out, found = console.out(), 0
        letters = dead_letters.list_dead_letters(settings, code=code, limit=limit)
        async with aclosing(letters):
            async for place, letter in letters:
                found += 1
                if as_json:
                    _write_json(place, letter)
                    continue
                line = Text(f"{shown(place):<{PLACE_WIDTH}} ", style="dim")
                line.append(f"{letter.reason.code:<{CODE_WIDTH}} ", style="red")
                line.append(f"{letter.track_id or '-':<{console.ID_WIDTH}} ", style="bold")
                line.append(letter.reason.message)
                console.line(out, line)
        if not found and not as_json:
            console.err().print("There are no dead letters" + (f" of {code}." if code else "."))

    asyncio.run(run())


def show_one(settings: Settings, place: str, *, as_json: bool) -> None:
    """Print one dead letter with the message as it was."""
    where = _place(place)
    letter = asyncio.run(dead_letters.show(settings, where))
    if as_json:
        _write_json(where, letter)
        return
    reason, origin, original = letter.reason, letter.origin, letter.original
    model = letter.model and f"{letter.model.name}@{letter.model.version}"
    lines = [
        ("track", letter.track_id or "-"),
        ("reason", f"{reason.code}: {reason.message}"),
        ("stage", reason.stage + (" (a retry may help)" if reason.retryable else "")),
        ("attempts", str(letter.attempts)),
        ("failed", f"{letter.failed_at:{MOMENT}}"),
        (
            "origin",
            f"{origin.topic} {origin.partition}:{origin.offset}, {origin.timestamp:{MOMENT}}",
        ),
        ("model", model or "-"),
        ("key", _text(original.key_b64)),
        *((f"header {printable(name)}", _text(value)) for name, value in original.headers),
        ("value", _text(original.value_b64)),
    ]
    out = console.out()
    for name, value in lines:
        out.print(Text.assemble((f"{name:<10} ", "dim"), value))


def retry_some(
    settings: Settings, places: Sequence[str], *, code: str | None, everything: bool
) -> None:
    """Send dead letters again and print how many."""
    if sum(map(bool, (places, code, everything))) != 1:
        raise SourceInvalid("Say which: PARTITION:OFFSET as listed, or --code CODE, or --all.")
    sent = asyncio.run(dead_letters.retry(settings, [_place(p) for p in places], code=code))
    console.out().print(f"Sent {console.counted(len(sent), 'event')} again")


def _place(text: str) -> Place:
    match = PLACE.fullmatch(text)
    if match is None:
        raise SourceInvalid(f"{text} is not a place: give PARTITION:OFFSET, as listed.")
    return int(match[1]), int(match[2])


def _write_json(place: Place, letter: DeadLetter) -> None:
    line: dict[str, Any] = {"place": shown(place), **letter.model_dump(mode="json")}
    console.json_line(json.dumps(line, ensure_ascii=False))


def _text(encoded: str | None) -> str:
    """Bytes as text where they are, so that a person can read them."""
    if encoded is None:
        return "-"
    # Here, as what `Text` drops (a bell, a carriage return) would never be seen.
    return printable(b64decode(encoded).decode(errors="backslashreplace"), lines=True)

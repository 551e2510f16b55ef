"""Writes the JSON Schemas and the AsyncAPI document: `python -m schemas.generate`.

`--check` writes nothing, and fails where a file differs or where a change breaks somebody who
holds to the last release. `--release` makes the present forms the last release.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from schemas import asyncapi
from schemas.compatibility import breaks
from schemas.events import DeadLetter, DeadLetterHeaders, NewTrack, TrackFeatures, TrackTags

HERE = Path(__file__).parent
RELEASED = HERE / "released"


class EventType(NamedTuple):
    """An event type; `direction` tells whether others write it or we do."""

    model: type[BaseModel]
    direction: Literal["in", "out"]


EVENT_TYPES = {
    "new-track": EventType(NewTrack, "in"),
    "track-tags": EventType(TrackTags, "out"),
    "track-features": EventType(TrackFeatures, "out"),
    "dead-letter": EventType(DeadLetter, "out"),
    "dead-letter-headers": EventType(DeadLetterHeaders, "out"),
}


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of an event type, by its name in `EVENT_TYPES`."""
    model, direction = EVENT_TYPES[name]
    schema = model.model_json_schema(mode="validation" if direction == "in" else "serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:timbre:{name}",
        **schema,
    }


def files() -> dict[Path, str]:
    """What is generated, by path."""
    schemas = {HERE / "json" / f"{name}.json": json_schema(name) for name in EVENT_TYPES}
    documents = {**schemas, HERE / "asyncapi.json": asyncapi.document()}
    return {path: _text(document) for path, document in documents.items()}


def faults() -> list[str]:
    """What is wrong with the generated files or with the change since the last release."""
    stale = [
        f"{path.relative_to(HERE.parent)} is not up to date; run python -m schemas.generate"
        for path, text in files().items()
        if not path.exists() or path.read_text() != text
    ]
    broken = [
        f"{name}{fault}"
        for name, event_type in EVENT_TYPES.items()
        if (released := RELEASED / f"{name}.json").exists()
        for fault in breaks(
            json.loads(released.read_text()), json_schema(name), event_type.direction
        )
    ]
    return stale + broken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m schemas.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on differences")
    parser.add_argument("--release", action="store_true", help="make this the last release")
    options = parser.parse_args(arguments)
    if not options.check:
        _write(files())
        if options.release:
            _write({RELEASED / f"{name}.json": _text(json_schema(name)) for name in EVENT_TYPES})
    problems = faults()
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


def _write(texts: dict[Path, str]) -> None:
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())

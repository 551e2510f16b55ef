"""Whether a change of a schema breaks somebody.

An event type has two sides: those who write it and those who read it. A change is safe when every
event that one side writes by one version can be read by the other side in the other version.
"""

from collections.abc import Iterator
from typing import Any, Literal

Schema = dict[str, Any]

NO_MORE_THAN = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")
NO_LESS_THAN = ("minimum", "exclusiveMinimum", "minLength", "minItems")
SAME = ("pattern", "format")


def breaks(old: Schema, new: Schema, direction: Literal["in", "out"]) -> list[str]:
    """What in `new` breaks others who still hold to `old`, a sentence each.

    Parameters
    ----------
    direction
        "in" for events that others write and we read, "out" for those that we write.
    """
    writer, reader = (old, new) if direction == "in" else (new, old)
    return [*_lost(_Side(old, old), _Side(new, new), ""), *_unreadable(writer, reader)]


def _unreadable(writer: Schema, reader: Schema) -> Iterator[str]:
    return _faults(_Side(writer, writer), _Side(reader, reader), "")


class _Side:
    """A part of a schema, with the whole schema to look references up in."""

    def __init__(self, part: Any, whole: Schema) -> None:
        while isinstance(part, dict) and "$ref" in part:
            part = whole["$defs"][part["$ref"].rpartition("/")[2]]
        self.part: Schema = part if isinstance(part, dict) else {}
        self._whole = whole

    def at(self, part: Any) -> "_Side":
        return _Side(part, self._whole)

    def alternatives(self) -> list["_Side"]:
        return [self.at(part) for part in self.part.get("anyOf", [self.part])]

    def properties(self) -> dict[str, "_Side"]:
        return {name: self.at(part) for name, part in self.part.get("properties", {}).items()}

    def values(self) -> set[Any] | None:
        """All values there can be, where they are listed."""
        if "const" in self.part:
            return {self.part["const"]}
        return set(self.part["enum"]) if "enum" in self.part else None


def _lost(old: _Side, new: _Side, path: str) -> Iterator[str]:
    """Fields that are gone: nobody writes them or heeds them any more."""
    for before, after in zip(old.alternatives(), new.alternatives(), strict=False):
        for name, field in before.properties().items():
            if name not in after.properties():
                yield f"{path}.{name} is gone"
            else:
                yield from _lost(field, after.properties()[name], f"{path}.{name}")
        if "items" in before.part and "items" in after.part:
            yield from _lost(before.at(before.part["items"]), after.at(after.part["items"]), path)


def _faults(writer: _Side, reader: _Side, path: str) -> Iterator[str]:
    """Why what `writer` describes may not be what `reader` accepts."""
    for written in writer.alternatives():
        trials = [list(_mismatches(written, read, path)) for read in reader.alternatives()]
        if all(trials):
            yield from min(trials, key=len)


def _mismatches(written: _Side, read: _Side, path: str) -> Iterator[str]:
    if "type" in read.part and read.part["type"] != written.part.get("type"):
        if (written.part.get("type"), read.part["type"]) != ("integer", "number"):
            yield f"{path} is {written.part.get('type')}, read as {read.part['type']}"
        return
    allowed, possible = read.values(), written.values()
    if allowed is not None and (possible is None or not possible <= allowed):
        yield f"{path} may have values other than {sorted(map(str, allowed))}"
    yield from _looser_bounds(written.part, read.part, path)
    for name in read.part.get("required", []):
        if name not in written.part.get("required", []):
            yield f"{path}.{name} may be missing, but is required"
    theirs = written.properties()
    for name, field in read.properties().items():
        if name in theirs:
            yield from _faults(theirs[name], field, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(read.part.get(name), dict):
            inner = written.at(written.part.get(name)), read.at(read.part[name])
            yield from _faults(*inner, f"{path}[]")


def _looser_bounds(written: Schema, read: Schema, path: str) -> Iterator[str]:
    for name in (*NO_MORE_THAN, *NO_LESS_THAN, *SAME):
        if name not in read:
            continue
        bound = written.get(name)
        fits = bound is not None and (
            bound <= read[name]
            if name in NO_MORE_THAN
            else bound >= read[name]
            if name in NO_LESS_THAN
            else bound == read[name]
        )
        if not fits:
            yield f"{path} has {name} {bound}, read with {read[name]}"

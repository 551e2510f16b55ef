"""Whether a change of a schema breaks somebody.

An event type has two sides: those who write it and those who read it. A change is safe when every
event that one side writes by one version can be read by the other side in the other version. What
can't be judged, such as a keyword that isn't known here, is told as a fault where it differs.
"""

import operator
from collections.abc import Iterator
from typing import Any, Literal

Schema = dict[str, Any]

AT_MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
AT_LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
BOUNDS = {
    **dict.fromkeys(AT_MOST, operator.le),
    **dict.fromkeys(AT_LEAST, operator.ge),
    **dict.fromkeys(("pattern", "format"), operator.eq),
}
"""How what is written must compare with what is read"""
OF_VALUES = ("type", "const", "enum", *BOUNDS)
OF_PARTS = ("required", "properties", "additionalProperties", "items", "prefixItems", "anyOf")
REMARKS = ("$id", "$comment", "title", "description", "default", "examples", "deprecated")
KNOWN = {*OF_VALUES, *OF_PARTS, *REMARKS}

NOTHING: Schema = {"not": {}}
"""The schema that no value fits, which may also be spelled false"""


def breaks(old: Schema, new: Schema, direction: Literal["in", "out"]) -> list[str]:
    """What in `new` breaks others who still hold to `old`, a sentence each.

    Parameters
    ----------
    direction
        "in" for events that others write and we read, "out" for those that we write.
    """
    old, new = _spelled_out(old, old), _spelled_out(new, new)
    writer, reader = (old, new) if direction == "in" else (new, old)
    return [*_lost(old, new, ""), *_faults(writer, reader, "")]


def _spelled_out(part: Any, whole: Schema) -> Any:
    """The same without references: in place of each stands what it refers to."""
    if isinstance(part, list):
        return [_spelled_out(inner, whole) for inner in part]
    if not isinstance(part, dict):
        return part
    own = {
        name: _spelled_out(inner, whole)
        for name, inner in part.items()
        if name not in ("$ref", "$defs")
    }
    if "$ref" not in part:
        return own
    return _both(own, _spelled_out(whole["$defs"][part["$ref"].rpartition("/")[2]], whole))


def _both(one: Schema, other: Schema) -> Schema:
    """What fits both; a keyword of which each has its own goes where it can't be judged."""
    twice = {
        name: one[name]
        for name in one.keys() & other.keys() - {*REMARKS}
        if one[name] != other[name]
    }
    both = {**one, **other}
    return {**both, "allOf": [twice, *both.get("allOf", [])]} if twice else both


def _schema(part: Any) -> Schema:
    """A schema as an object, where it may be false, true or not there, which is like true."""
    if part is False:
        return NOTHING
    return part if isinstance(part, dict) else {}


def _alternatives(schema: Schema) -> list[Schema]:
    if "anyOf" not in schema:
        return [schema]
    beside = {name: part for name, part in schema.items() if name != "anyOf"}
    return [
        alternative
        for option in schema["anyOf"]
        for alternative in _alternatives(_both(beside, _schema(option)))
    ]


def _field(schema: Schema, name: str) -> Schema:
    others = schema.get("additionalProperties")
    return _schema(schema.get("properties", {}).get(name, others))


def _item(schema: Schema, index: int) -> Schema:
    first = schema.get("prefixItems", [])
    return _schema(first[index] if index < len(first) else schema.get("items"))


def _values(schema: Schema) -> set[Any] | None:
    """All values there can be, where they are listed."""
    if "const" in schema:
        return {schema["const"]}
    return set(schema["enum"]) if "enum" in schema else None


def _parts(one: Schema, other: Schema, path: str) -> Iterator[tuple[Schema, Schema, str]]:
    """What two schemas say of the same part of a value: its items and fields without a name."""
    first = max(len(schema.get("prefixItems", [])) for schema in (one, other))
    for index in range(first):
        yield _item(one, index), _item(other, index), f"{path}[{index}]"
    for name in ("items", "additionalProperties"):
        yield _schema(one.get(name)), _schema(other.get(name)), f"{path}[]"


def _lost(old: Schema, new: Schema, path: str) -> Iterator[str]:
    """Fields that are gone: nobody writes them or heeds them any more."""
    for before, after in zip(_alternatives(old), _alternatives(new), strict=False):
        if not before:
            continue
        for name in before.get("properties", {}):
            if name not in after.get("properties", {}):
                yield f"{path}.{name} is gone"
            else:
                yield from _lost(_field(before, name), _field(after, name), f"{path}.{name}")
        for part, part_after, part_path in _parts(before, after, path):
            yield from _lost(part, part_after, part_path)


def _faults(writer: Schema, reader: Schema, path: str) -> Iterator[str]:
    """Why what `writer` describes may not be what `reader` accepts."""
    for written in _alternatives(writer):
        if written == NOTHING:
            continue
        trials = [list(_mismatches(written, read, path)) for read in _alternatives(reader)]
        yield from min(trials, key=len)


def _mismatches(written: Schema, read: Schema, path: str) -> Iterator[str]:
    if not read:
        return
    if read == NOTHING:
        yield f"{path} may be there, but is refused"
        return
    kind = written.get("type")
    wanted = read.get("type", kind)
    if wanted != kind and (kind, wanted) != ("integer", "number"):
        yield f"{path} is {kind}, read as {wanted}"
        return
    allowed, possible = _values(read), _values(written)
    if allowed is not None and (possible is None or not possible <= allowed):
        yield f"{path} may have values other than {sorted(map(str, allowed))}"
    yield from _looser_bounds(written, read, path)
    for name in sorted((written.keys() | read.keys()) - KNOWN):
        if written.get(name) != read.get(name):
            yield f"{path} differs in {name}, which can't be judged"
    for name in read.get("required", []):
        if name not in written.get("required", []):
            yield f"{path}.{name} may be missing, but is required"
    for name in {**written.get("properties", {}), **read.get("properties", {})}:
        # A writer that says nothing of a field and of others doesn't write it.
        if name in written.get("properties", {}) or "additionalProperties" in written:
            yield from _faults(_field(written, name), _field(read, name), f"{path}.{name}")
    for part, part_read, part_path in _parts(written, read, path):
        yield from _faults(part, part_read, part_path)


def _looser_bounds(written: Schema, read: Schema, path: str) -> Iterator[str]:
    for name, fits in BOUNDS.items():
        if name in read and not (name in written and fits(written[name], read[name])):
            yield f"{path} has {name} {written.get(name)}, read with {read[name]}"

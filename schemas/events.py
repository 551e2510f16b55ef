"""The events that Timbre reads and writes: the one place where their fields are defined.

What comes in (`NewTrack`) is bounded in every direction, since anybody may have sent it; fields
that this version doesn't know are ignored, so a producer may be newer than the worker. What goes
out (`TrackTags`, `TrackFeatures`, `DeadLetter`) is stable: within one `schema_version` fields are
added, never renamed, removed or given another type. The JSON Schemas in `schemas/json` and the
AsyncAPI document are generated from these models by `python -m schemas.generate`.
"""

import re
from datetime import UTC, datetime
from math import isfinite
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticUseDefault, to_json

SCHEMA_VERSION: Literal[1] = 1

MAX_TRACK_ID_CHARS = 256
MAX_URI_CHARS = 8192
MAX_SOURCE_EVENT_ID_CHARS = 4096
MAX_METADATA_BYTES = 128 * 1024
MAX_METADATA_DEPTH = 16

# Control characters and line breaks would tear log lines, terminals and keys apart.
# The last two stand as they are, since Go's regular expressions don't know "\\u".
_PRINTABLE = "^[^\\x00-\\x1f\\x7f-\\x9f\u2028\u2029]+$"
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def _timestamp(value: object) -> object:
    """Only text is a time stamp here: a bare number may be seconds or milliseconds."""
    if isinstance(value, datetime) or (isinstance(value, str) and _DATE.match(value)):
        return value
    raise ValueError("must be an ISO 8601 date and time, such as 2026-01-31T12:00:00Z")


def _in_utc(value: datetime) -> datetime:
    try:
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999") from None


def _small(metadata: object) -> object:
    """Before anything else is done with it: what is small can't take long."""
    if len(to_json(metadata)) > MAX_METADATA_BYTES:
        raise ValueError(f"must not take more than {MAX_METADATA_BYTES} bytes as JSON")
    return metadata


def _shallow(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    level: list[Any] = [metadata]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_METADATA_DEPTH:
            raise ValueError(f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
        children = [
            child for node in level for child in (node.values() if isinstance(node, dict) else node)
        ]
        if any(isinstance(child, float) and not isfinite(child) for child in children):
            raise ValueError("must hold finite numbers only")  # 1e999 is JSON, infinity is not
        level = [child for child in children if isinstance(child, dict | list)]
    return metadata


def _is_none(value: object) -> bool:
    return value is None


def _default_for_null(value: object) -> object:
    """Some producers write null for what they don't set."""
    if value is None:
        raise PydanticUseDefault
    return value


def _six_decimals(value: object) -> object:
    """Round away what float32 can't carry anyway, such as the excess of 1.0000001."""
    return round(value, 6) if isinstance(value, float) else value


TrackId = Annotated[
    str, Field(min_length=1, max_length=MAX_TRACK_ID_CHARS, pattern=_PRINTABLE, examples=["t-4711"])
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$"), AfterValidator(str.lower)]
Timestamp = Annotated[
    datetime,
    BeforeValidator(_timestamp),
    AfterValidator(_in_utc),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
JsonObject = dict[str, JsonValue]
Metadata = Annotated[
    JsonObject,
    BeforeValidator(_small, json_schema_input_type=JsonObject),
    AfterValidator(_shallow),
    Field(
        description=(
            "The platform's own data, passed through untouched: any JSON object of at most "
            f"{MAX_METADATA_BYTES} bytes and {MAX_METADATA_DEPTH} levels"
        )
    ),
]
Priority = Literal["upload", "backfill"]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_six_decimals)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Digits = Annotated[str, Field(pattern=r"^[0-9]+$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _only_what_is_needed(schema: JsonObject) -> None:
    """Leave out the fields' titles, which repeat their names and of which generators make types,
    and null as a default, since some of what may be left out is never null."""
    fields: Any = schema["properties"]
    for field in fields.values():
        field.pop("title", None)
        if field.get("default", ...) is None:
            del field["default"]


class Part(BaseModel):
    """Base of everything in an event: immutable, and unknown fields are ignored."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
        json_schema_serialization_defaults_required=True,
        json_schema_extra=_only_what_is_needed,
    )

    def to_bytes(self) -> bytes:
        """The value as it stands on a topic: UTF-8 JSON, fields in the order of the model."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> Self:
        """Read back what `to_bytes` wrote; raises `pydantic.ValidationError` for anything else."""
        return cls.model_validate_json(value)


# In -----------------------------------------------------------------------------------------


class AudioRef(Part):
    """Where a track's audio lies."""

    uri: Annotated[str, Field(min_length=1, max_length=MAX_URI_CHARS, pattern=_PRINTABLE)]
    """Address of the audio: https, http, s3, gs, az or file"""
    sha256: Sha256 | None = None
    """SHA-256 of the bytes, in hex; when given, other bytes are refused"""
    etag: Annotated[str, Field(max_length=1024)] | None = None
    """The store's entity tag"""
    size_bytes: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """Bytes of the audio, as the sender knows them"""


class NewTrack(Part):
    """A track to be tagged, on `tracks.new` or, at lower priority, on `tracks.backfill`."""

    track_id: TrackId
    """The platform's name of the track, and the message's key"""
    audio: AudioRef
    """Where the audio lies"""
    uploaded_at: Timestamp | None = None
    """When the track was uploaded; without a time zone it is taken as UTC"""
    priority: Annotated[
        Priority, BeforeValidator(_default_for_null, json_schema_input_type=Priority | None)
    ] = "upload"
    """Uploads go before backfill"""
    metadata: Annotated[
        Metadata, BeforeValidator(_default_for_null, json_schema_input_type=JsonObject | None)
    ] = Field(default_factory=dict)
    source_event_id: (
        Annotated[str, Field(min_length=1, max_length=MAX_SOURCE_EVENT_ID_CHARS)] | None
    ) = Field(None, exclude_if=_is_none)
    """The event's identity at its source: set from a CloudEvent's `source` and `id`, or from a
    bucket notification; a plain event may carry its own"""


# Out ----------------------------------------------------------------------------------------


class AudioFacts(Part):
    """What the audio turned out to be."""

    uri: str
    """Where it was fetched from"""
    sha256: Sha256
    """SHA-256 of the bytes fetched, in hex"""
    size_bytes: Count
    """Bytes fetched"""
    container: str
    """Container, by FFmpeg's name"""
    codec: str
    """Codec, by FFmpeg's name"""
    sample_rate_hz: Annotated[int, Field(gt=0)]
    """Sample rate before resampling"""
    channels: Annotated[int, Field(gt=0)]
    """Channels before mixing down"""
    duration_s: Seconds
    """Seconds of audio decoded, whatever the container claims"""
    damaged_packets: Count = 0
    """Packets that could not be decoded and were skipped"""


class Tag(Part):
    """One label of one head; all are there, likely or not, unless settings leave some out."""

    head: str
    """The model's head that gave it, such as `genre`"""
    label: str
    """The label itself, such as `jazz`"""
    category: str
    """Kind of label: genre, mood, instrument, era or voice"""
    score: Share
    """Probability of the label for the track, calibrated where the head is"""
    share: Share
    """Share of the voting windows that chose the label"""


class WindowCounts(Part):
    """The windows a track was cut into."""

    total: Count
    """Windows cut"""
    silent: Count
    """Windows among them that were silent and did not vote"""


class ModelRef(Part):
    """The model that made a result."""

    name: str
    """Name of the bundle"""
    version: str
    """Version of the bundle: a hash of its content"""


class Processing(Part):
    """How this delivery came about: all that may differ when the same event is delivered again."""

    processed_at: AwareDatetime
    """When the result was made"""
    timings_s: dict[str, Seconds]
    """Seconds spent in each stage"""
    cached: bool
    """Whether the result came from the cache, without decoding"""
    attempt: Annotated[int, Field(ge=1)]
    """Which attempt at the track succeeded, counted from 1; fetches repeated in it don't count"""


class TrackTags(Part):
    """A track's tags, on `tracks.tags`. Two deliveries of one event differ in `processing` only."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this form; a reader of version 1 reads every event that says 1"""
    event_id: str
    """Deterministic identity: the same event, redelivered, gets the same one"""
    track_id: TrackId
    """The platform's name of the track, and the message's key"""
    audio: AudioFacts
    """The audio that was tagged"""
    tags: list[Tag]
    """Tags, head by head in the model's order, best first within each"""
    uncertain: bool
    """Whether no genre is clear enough to rely on"""
    windows: WindowCounts
    """Windows counted"""
    vote: str
    """How windows became tags: mean, majority or weighted"""
    model: ModelRef
    """The model that tagged"""
    taggram: dict[str, list[list[Finite]]] | SkipJsonSchema[None] = Field(None, exclude_if=_is_none)
    """By head, a table (windows, labels) of probabilities, the labels in the model's own order;
    present only where configured"""
    metadata: Metadata = Field(default_factory=dict)
    processing: Processing
    """What belongs to this delivery and not to the result"""


class TrackFeatures(Part):
    """A track's embedding, on `tracks.features`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this form; a reader of version 1 reads every event that says 1"""
    event_id: str
    """Identity of the event, the same as in `tracks.tags`"""
    track_id: TrackId
    """The platform's name of the track, and the message's key"""
    model: ModelRef
    """The model whose embedding it is; embeddings of two versions must not be compared"""
    embedding: list[Finite]
    """The track as a vector of length 1 (L2)"""
    dims: Annotated[int, Field(ge=1)]
    """Numbers in the embedding"""
    processing: Processing
    """What belongs to this delivery and not to the result"""


class FailureReason(Part):
    """Why a track could not be tagged."""

    code: str
    """Stable code, such as `audio_not_found`"""
    message: str
    """A sentence that says what to do"""
    stage: str
    """What failed: intake, fetch, decode, batch, vote, publish, or the track where it is none"""
    retryable: bool
    """Whether the same event may pass later"""


class Origin(Part):
    """Where the event stood."""

    topic: str
    """Topic"""
    partition: Count
    """Partition"""
    offset: Count
    """Offset"""
    timestamp: AwareDatetime
    """The record's time stamp"""


class OriginalMessage(Part):
    """The message as it was, byte for byte."""

    key_b64: str | None
    """Key in base64, null where there was none"""
    value_b64: str | None
    """Value in base64, null where there was none"""
    headers: list[tuple[str, str]]
    """Headers in their order: name, value in base64"""


class DeadLetter(Part):
    """A dead letter as one object, as `timbre dead-letters` shows it.

    On `tracks.dead-letter` itself stands the original message, byte for byte under its original
    key, and the rest in the headers that `DeadLetterHeaders` names.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this form; a reader of version 1 reads every object that says 1"""
    reason: FailureReason
    """What went wrong"""
    attempts: Annotated[int, Field(ge=1)]
    """Attempts made"""
    origin: Origin
    """Where the event stood"""
    original: OriginalMessage
    """The message itself, to be sent again"""
    track_id: str | None
    """The platform's name of the track, where the event could be read that far"""
    failed_at: AwareDatetime
    """When it was given up"""
    model: ModelRef | None
    """The model that was loaded, where there was one"""


class DeadLetterHeaders(Part):
    """What is added to the original headers of a message on `tracks.dead-letter`, as UTF-8."""

    model_config = ConfigDict(alias_generator=lambda name: f"timbre-{name.replace('_', '-')}")

    reason_code: str
    """Stable code, such as `audio_not_found`"""
    reason: str
    """A sentence that says what to do"""
    retryable: Literal["true", "false"]
    """Whether the same event may pass later"""
    stage: str
    """What failed: intake, fetch, decode, batch, vote, publish, or the track where it is none"""
    attempts: Digits
    """Attempts made"""
    origin_topic: str
    """Topic of the original message"""
    origin_partition: Digits
    """Its partition"""
    origin_offset: Digits
    """Its offset"""
    origin_timestamp: AwareDatetime
    """Its time stamp"""
    failed_at: AwareDatetime
    """When it was given up"""
    model: str
    """The model that was loaded, as `name@version`"""
    track_id: str | SkipJsonSchema[None] = Field(None, exclude_if=_is_none)
    """The platform's name of the track, where the event could be read that far"""
    value_omitted_bytes: Digits | SkipJsonSchema[None] = Field(None, exclude_if=_is_none)
    """Bytes of the original value, where Kafka takes no message that holds it and the reason; of a
    message that could not be read its bytes in all, where they are known, or 0"""
    value_omitted_sha256: Sha256 | SkipJsonSchema[None] = Field(None, exclude_if=_is_none)
    """SHA-256 of the original value, where it is omitted"""

"""Bytes of a Kafka message to new-track events.

Accepted are a plain JSON event, CloudEvents 1.0 in binary and in structured mode, and bucket
notifications of S3, MinIO and Ceph. Anybody may have sent the bytes, so whatever can't be read is
an `EventMalformed`, `EventTooLarge` or `EventVersionUnknown`, and never anything else; messages of
these errors are bounded however long the input is.
"""

import binascii
from base64 import b64decode
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote_plus

from pydantic import AliasChoices, BaseModel, Field, ValidationError
from pydantic_core import from_json

from schemas.events import MAX_SOURCE_EVENT_ID_CHARS, MAX_TRACK_ID_CHARS, NewTrack
from worker.errors import EventMalformed, EventTooLarge, EventVersionUnknown
from worker.record import Record
from worker.settings import MIB

CLOUDEVENTS_VERSION = "1.0"
MAX_FAULTS_TOLD = 3
MAX_QUOTED_CHARS = 80
MAX_KEY_BYTES = 1024  # of an S3 object
MAX_RECORDS = 100  # of one message, whose tracks are done one after another

# What writes an object's bytes. MinIO calls changes of tags, retention and legal hold ObjectCreated
# as well.
CREATIONS = frozenset(
    f"ObjectCreated:{name}" for name in ("Put", "Post", "Copy", "CompleteMultipartUpload")
)

Model = TypeVar("Model", bound=BaseModel)


class Announcement(NamedTuple):
    """What a message announces: one track, or for bucket notifications any number.

    `fault` is what is wrong with those records of a notification that can't be read; the others
    are tracks all the same.
    """

    tracks: list[NewTrack]
    fault: EventMalformed | None = None


def read(record: Record, *, max_bytes: int = MIB) -> Announcement:
    """The tracks that a message announces.

    Parameters
    ----------
    max_bytes
        Size above which a message is not even parsed.

    Raises
    ------
    EventTooLarge, EventMalformed, EventVersionUnknown
        The message can't be read as a whole.
    """
    size = record.unread_bytes or len(record.value or b"")
    if size > max_bytes:
        raise EventTooLarge(
            f"The message has {size} bytes; at most {max_bytes} are read. "
            "Send less metadata, or raise TIMBRE_KAFKA__MAX_EVENT_BYTES."
        )
    if record.unread:
        raise EventMalformed(
            "The message can't be read: its batch is broken, or unpacks to far more than events "
            "do, or it has over a thousand headers. Send less at once, or not compressed."
        )
    if record.value is None:
        raise EventMalformed("The message has no value; send a JSON event.")
    headers = {name.lower(): value or b"" for name, value in record.headers}
    media_type = _text(headers.get("content-type", b"")).partition(";")[0].strip().lower()
    attributes = {name[3:]: _text(value) for name, value in headers.items() if name[:3] == "ce_"}

    document = _parse(record.value)
    if media_type.startswith("application/cloudevents"):  # decides the mode, by the Kafka binding
        if media_type != "application/cloudevents+json":
            raise EventMalformed(
                f"Content type {_quoted(media_type)} is not read; send one event a message as "
                "application/cloudevents+json."
            )
        source_event_id, document = _unwrap(document)
    elif attributes:
        source_event_id = _identity(attributes)
        _must_be_json(media_type)
    elif isinstance(document, dict) and "specversion" in document:
        source_event_id, document = _unwrap(document)
    else:
        source_event_id = None
    return _announced(document, record.key, source_event_id)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise EventMalformed(
            "A header is not UTF-8; send CloudEvents attributes as UTF-8."
        ) from None


def _parse(value: bytes) -> Any:
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise EventMalformed(
            f"The value is not JSON in UTF-8 without a byte order mark ({error})."
        ) from None


# CloudEvents --------------------------------------------------------------------------------


def _unwrap(envelope: Any) -> tuple[str, Any]:
    """The identity and the data of a CloudEvent in structured mode."""
    if not isinstance(envelope, dict):
        raise EventMalformed("A CloudEvent in structured mode is a JSON object.")
    identity = _identity(envelope)
    _must_be_json(envelope.get("datacontenttype") or "")
    data, packed = envelope.get("data"), envelope.get("data_base64")
    if (data is None) == (packed is None):
        raise EventMalformed("A CloudEvent must carry its track in either data or data_base64.")
    if packed is None:
        return identity, data
    try:
        return identity, _parse(b64decode(packed, validate=True))
    except (TypeError, ValueError, binascii.Error):
        raise EventMalformed("The CloudEvent's data_base64 is not text in base64.") from None


def _identity(attributes: Mapping[str, Any]) -> str:
    """What tells a CloudEvent from all others: its source and id."""
    missing = [
        name
        for name in ("specversion", "id", "source", "type")
        if not isinstance(attributes.get(name), str) or not attributes[name]
    ]
    if missing:
        raise EventMalformed(
            f"The CloudEvent lacks {' and '.join(missing)}; each must be a string that isn't empty."
        )
    if attributes["specversion"] != CLOUDEVENTS_VERSION:
        raise EventVersionUnknown(
            f"CloudEvents version {_quoted(attributes['specversion'])} is not read; "
            f"send specversion {CLOUDEVENTS_VERSION}."
        )
    identity = f"{attributes['source']} {attributes['id']}"
    if len(identity) > MAX_SOURCE_EVENT_ID_CHARS:
        raise EventMalformed(
            "The CloudEvent's source and id together are longer than "
            f"{MAX_SOURCE_EVENT_ID_CHARS} characters."
        )
    return identity


def _must_be_json(media_type: Any) -> None:
    essence = media_type.partition(";")[0].strip().lower() if isinstance(media_type, str) else None
    if essence is None or (essence and not essence.endswith(("/json", "+json"))):
        raise EventMalformed(
            f"The CloudEvent's data is of type {_quoted(media_type)}; send application/json."
        )


# Tracks -------------------------------------------------------------------------------------


def _announced(document: Any, key: bytes | None, source_event_id: str | None) -> Announcement:
    if not isinstance(document, dict):
        raise EventMalformed("The event is not a JSON object; send one with track_id and audio.")
    if "track_id" not in document:
        if "Records" in document:
            return _notified(document["Records"])
        if document.get("Event") == "s3:TestEvent":
            return Announcement([])  # S3 tells once that notifications work
    if source_event_id is not None:
        document = {**document, "source_event_id": source_event_id}
    track = _validated(NewTrack, document)
    if key and key != track.track_id.encode():
        raise EventMalformed(
            f"The message's key is not its track_id {_quoted(track.track_id)}; "
            "send the track_id as key, so that a track's events keep their order."
        )
    return Announcement([track])


class _Object(BaseModel):
    key: Annotated[str, Field(min_length=1, max_length=3 * MAX_KEY_BYTES)]
    size: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    etag: str | None = Field(None, validation_alias=AliasChoices("eTag", "etag"))
    version: str | None = Field(None, alias="versionId")
    sequencer: Annotated[str, Field(max_length=256)] | None = None


class _Bucket(BaseModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,255}$")]


class _Location(BaseModel):
    bucket: _Bucket
    object: _Object


class _Notification(BaseModel):
    """One of the `Records` of S3's event message structure, as far as it tells of a track."""

    source: Annotated[str, Field(max_length=256)] = Field("", alias="eventSource")
    time: str | None = Field(None, alias="eventTime")
    s3: _Location


def _notified(records: Any) -> Announcement:
    """The objects that a bucket notification tells of; what can't be read harms none beside it."""
    if not isinstance(records, list):
        raise EventMalformed("The Records of a bucket notification are a list of JSON objects.")
    if len(records) > MAX_RECORDS:
        raise EventMalformed(
            f"A bucket notification has {len(records)} Records; send at most {MAX_RECORDS} in one "
            "message."
        )
    tracks, faults = list[NewTrack](), list[str]()
    for place, entry in enumerate(records, start=1):
        try:
            if (track := _created(entry)) is not None:
                tracks.append(track)
        except EventMalformed as error:
            faults.append(
                f"Record {place} of {len(records)} in the bucket notification can't be "
                f"read: {error.message}"
            )
    if not faults:
        return Announcement(tracks)
    more = f" Nor can {len(faults) - 1} more." if len(faults) > 1 else ""
    return Announcement(tracks, EventMalformed(faults[0] + more))


def _created(entry: Any) -> NewTrack | None:
    """The track that one of the Records tells of; removals and the like tell of none."""
    if not isinstance(entry, dict):
        raise EventMalformed("It is not a JSON object.")
    name = entry.get("eventName")
    if not isinstance(name, str):
        raise EventMalformed("It lacks its eventName.")
    if name.removeprefix("s3:") not in CREATIONS:
        return None
    return _from_notification(_validated(_Notification, entry))


def _from_notification(event: _Notification) -> NewTrack | None:
    bucket, entry = event.s3.bucket.name, event.s3.object
    key = _object_key(entry.key, encoded=not event.source.startswith("ceph:"))
    if key.endswith("/"):
        return None  # what consoles create to show an empty folder
    version = entry.version if entry.version != "null" else None
    name = f"{bucket}/{key}"
    if len(name) > MAX_TRACK_ID_CHARS or not key.isprintable():
        name = f"{bucket}/sha256:{sha256(key.encode()).hexdigest()}"
    occurrence = entry.sequencer or entry.version or entry.etag
    return _validated(
        NewTrack,
        {
            "track_id": name,
            "audio": {
                "uri": f"s3://{bucket}/{quote(key)}"
                + (f"?versionId={quote(version, safe='')}" if version else ""),
                "etag": entry.etag or None,
                "size_bytes": entry.size,
            },
            "uploaded_at": event.time or None,
            "source_event_id": f"{event.source} {bucket}/{key} {occurrence}"
            if occurrence
            else None,
        },
    )


def _object_key(key: str, *, encoded: bool) -> str:
    """The object's own key: S3 and MinIO send it encoded as in a web form, Ceph as it is."""
    try:
        plain = unquote_plus(key, errors="strict") if encoded else key
    except UnicodeDecodeError:
        raise EventMalformed(f"Its object key {_quoted(key)} is not UTF-8.") from None
    if len(plain.encode()) > MAX_KEY_BYTES:
        raise EventMalformed(f"Its object key is longer than {MAX_KEY_BYTES} bytes.")
    return plain


# Telling what is wrong ----------------------------------------------------------------------


def _validated(model: type[Model], document: Any) -> Model:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        told = "; ".join(
            f"{_quoted('.'.join(str(part) for part in fault['loc']))}: "
            + fault["msg"].removeprefix("Value error, ")
            for fault in faults[:MAX_FAULTS_TOLD]
        )
        more = len(faults) - MAX_FAULTS_TOLD
        raise EventMalformed(
            f"The event doesn't fit its schema: {told}"
            + (f"; and {more} more." if more > 0 else ".")
        ) from None


def _quoted(value: object) -> str:
    """Foreign text, made short and harmless to print."""
    text = ascii(value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."

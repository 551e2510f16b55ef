"""Results out: tags and embedding to their topics, failures to the dead-letter topic.

Every send waits until all in-sync replicas have the message. What Kafka can't take now is raised as
`PublishFailed`; what it never will (too large) as `ResultTooLarge`.
"""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)

from schemas.events import ModelRef, NewTrack, Processing, TrackFeatures, TrackTags
from worker.analysis import Analysis
from worker.errors import PublishFailed, ResultTooLarge, TrackFailed
from worker.kafka import connection
from worker.record import Record
from worker.settings import KafkaSettings

EVENT_NAMESPACE = uuid.UUID("6f1d8f2c-6a3c-5b0e-9a57-2b8f0c6f3f0d")
TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)
HEADER = "timbre-"
MAX_KEY_BYTES = 64 * 1024  # of a dead letter that goes without its value
LAST_TIMESTAMP_S = datetime.max.replace(tzinfo=UTC).timestamp() - 1

Headers = list[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class Failure:
    """A track that could not be tagged, or an event that could not be read: no `track` then."""

    error: TrackFailed
    attempts: int = 1
    track: NewTrack | None = None


def event_id(track: NewTrack, model: ModelRef) -> str:
    """The same event and model give the same id, however often and wherever it is delivered."""
    audio = track.audio
    identity = [
        track.track_id,
        audio.uri,
        audio.sha256,
        audio.etag,
        track.uploaded_at.isoformat() if track.uploaded_at else None,
        track.source_event_id,
        model.name,
        model.version,
    ]
    if track.metadata:  # passed through, so a correction of it is another event
        identity.append(json.dumps(track.metadata, sort_keys=True))
    return str(uuid.uuid5(EVENT_NAMESPACE, json.dumps(identity)))


def results(
    track: NewTrack, analysis: Analysis, model: ModelRef, processing: Processing
) -> tuple[TrackTags, TrackFeatures]:
    """The two events that answer a new-track event."""
    identity = event_id(track, model)
    tags = TrackTags(
        event_id=identity,
        track_id=track.track_id,
        audio=analysis.audio.model_copy(update={"uri": track.audio.uri}),
        tags=analysis.tags,
        uncertain=analysis.uncertain,
        windows=analysis.windows,
        vote=analysis.vote,
        model=analysis.model,
        taggram=analysis.taggram,
        metadata=track.metadata,
        processing=processing,
    )
    features = TrackFeatures(
        event_id=identity,
        track_id=track.track_id,
        model=analysis.model,
        embedding=analysis.embedding,
        dims=len(analysis.embedding),
        processing=processing,
    )
    return tags, features


class Publisher:
    """One producer for all that goes out."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._open = AsyncExitStack()
        self._producer: AIOKafkaProducer

    async def __aenter__(self) -> Self:
        starting = connection.started(connection.producer(self._settings), self._settings)
        self._producer = await self._open.enter_async_context(starting)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._open.aclose()

    async def publish(self, event: TrackTags | TrackFeatures) -> None:
        """Deliver a track's tags or its embedding.

        Raises
        ------
        PublishFailed
            Kafka did not confirm; the event may or may not be there, under the same event id.
        ResultTooLarge
            Kafka takes no message of that size.
        """
        kafka = self._settings
        topic = kafka.topic_tags if isinstance(event, TrackTags) else kafka.topic_features
        await self._send(topic, event.track_id.encode(), event.to_bytes())

    async def dead_letter(
        self, record: Record, failures: Sequence[Failure], model: ModelRef
    ) -> None:
        """Deliver the original message, byte for byte, with the reason in added headers.

        It is sent once, however many of its tracks failed: the first gives the reason, which tells
        of the others by number.

        A message that Kafka takes no more with its headers added goes without its value, its own
        headers and a very long key; the headers then give the value's size and hash beside its
        origin.

        Raises
        ------
        PublishFailed
            Kafka did not confirm.
        """
        first, *others = failures
        retryable = any(failure.error.retryable for failure in failures)
        reason = {
            "reason-code": first.error.code,
            "reason": first.error.message + _others(others),
            "retryable": str(retryable).lower(),
            "stage": first.error.stage,
            "attempts": str(first.attempts),
            "origin-topic": record.topic,
            "origin-partition": str(record.partition),
            "origin-offset": str(record.offset),
            "origin-timestamp": moment(record.timestamp_s).isoformat(),
            "failed-at": datetime.now(UTC).isoformat(),
            "model": f"{model.name}@{model.version}",
        }
        if first.track is not None:
            reason["track-id"] = first.track.track_id
        if record.unread:
            reason["value-omitted-bytes"] = str(record.unread_bytes)
        kept = [(name, value) for name, value in record.headers if not name.startswith(HEADER)]
        headers = kept + _headers(reason)
        topic = self._settings.topic_dead_letter
        try:
            await self._send(topic, record.key, record.value, headers)
        except ResultTooLarge:
            value = record.value or b""
            omitted = _headers(
                {
                    "value-omitted-bytes": str(len(value)),
                    "value-omitted-sha256": hashlib.sha256(value).hexdigest(),
                }
            )
            key = None if len(record.key or b"") > MAX_KEY_BYTES else record.key
            await self._send(topic, key, None, _headers(reason) + omitted)

    async def _send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers | None = None
    ) -> None:
        if key is None and value is None:
            key = b""  # aiokafka refuses what Kafka takes: a message of neither
        try:
            async with asyncio.timeout(2 * self._settings.request_timeout_s):
                await self._producer.send_and_wait(topic, value, key=key, headers=headers or [])
        except TOO_LARGE as error:
            raise ResultTooLarge(
                f"Kafka takes no message of this size on {topic} ({len(value or b'')} bytes); "
                "raise the topic's max.message.bytes, or switch the taggram off."
            ) from error
        except InvalidTimestampError as error:
            raise PublishFailed(
                f"Kafka refuses the time of a message on {topic}: this machine's clock and the "
                "broker's are too far apart. Set them right, or the topic's "
                "message.timestamp.type to LogAppendTime."
            ) from error
        except (KafkaError, TimeoutError, OSError) as error:
            compacted = ", and is not compacted: the message has no key" if key is None else ""
            raise PublishFailed(
                f"Kafka did not confirm a message on {topic} ({type(error).__name__}); "
                f"check the broker, and that the topic exists and may be written{compacted}."
            ) from error


def _others(failures: Sequence[Failure]) -> str:
    if not failures:
        return ""
    codes = ", ".join(sorted({failure.error.code for failure in failures}))
    return f" {len(failures)} more of its message failed ({codes})."


def _headers(fields: dict[str, str]) -> Headers:
    return [
        (HEADER + name, value.encode(errors="backslashreplace")) for name, value in fields.items()
    ]


def moment(timestamp_s: float) -> datetime:
    """A record's time; a producer's timestamp may be any number, and no reason to fail."""
    return datetime.fromtimestamp(min(max(timestamp_s, 0.0), LAST_TIMESTAMP_S), UTC)

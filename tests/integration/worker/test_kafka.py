"""What every client of the broker has in common."""

import asyncio
import time

from aiokafka.client import AIOKafkaClient

from worker.kafka.connection import client_options
from worker.settings import KafkaSettings


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

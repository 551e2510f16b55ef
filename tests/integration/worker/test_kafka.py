"""What every client of the broker has in common."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random

import pytest
from aiokafka.admin import NewTopic
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import RequestTimedOutError

from tests.broker import administering
from tests.conftest import MakeTopic
from tests.integration.worker.test_dead_letters import MODEL, record
from tests.waiting import until
from worker.errors import AudioNotFound, PublishFailed
from worker.kafka import aiokafka_faults
from worker.kafka.connection import client_options, producer
from worker.publish import Failure, Publisher
from worker.services.kafka import Kafka
from worker.services.service import HOST
from worker.settings import KafkaSettings


@asynccontextmanager
async def client_of(servers: str, **options: int) -> AsyncIterator[AIOKafkaClient]:
    client = AIOKafkaClient(**client_options(KafkaSettings(bootstrap_servers=servers)), **options)
    await client.bootstrap()
    try:
        yield client
    finally:
        await client.close()


class TestMetadataUpdates:
    async def test_are_paced_however_often_they_are_asked_for(self, kafka: str) -> None:
        async with client_of(kafka, retry_backoff_ms=100) as client:
            started_s, updates = time.monotonic(), 0
            while time.monotonic() - started_s < 0.55:
                assert await client.force_metadata_update()
                updates += 1
            assert 2 <= updates <= 8

    async def test_come_at_once_where_the_last_is_some_time_ago(self, kafka: str) -> None:
        async with client_of(kafka, retry_backoff_ms=2000) as client, asyncio.timeout(1):
            assert await client.force_metadata_update()


async def test_a_broker_that_is_silent_holds_up_what_is_asked_of_others_for_a_while_only(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiokafka_faults, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        servers = f"127.0.0.1:{silent.getsockname()[1]},{kafka}"
        async with asyncio.timeout(10), client_of(servers):
            pass


class Following(Kafka):
    """A second broker, which another controls."""

    def __init__(self, folder: Path, jars: list[Path], first: Kafka) -> None:
        super().__init__(folder, jars)
        self._first = first

    def _configuration(self) -> dict[str, object]:
        configuration = super()._configuration()
        _, controller = self._first.inner_ports
        return configuration | {
            "process.roles": "broker",
            "node.id": 2,
            "controller.quorum.voters": f"1@{HOST}:{controller}",
            "listeners": configuration["advertised.listeners"],
        }


@pytest.fixture
def brokers(tmp_path: Path, jars: list[Path]) -> Iterator[tuple[Kafka, Kafka]]:
    """Numbers 1 and 2 of one cluster."""
    first = Kafka(tmp_path / "first", jars)
    second = Following(tmp_path / "second", jars, first)
    try:
        for broker in (first, second):
            broker.launch()
        for broker in (first, second):
            broker.wait_ready()
        yield first, second
    finally:
        for broker in (first, second):
            broker.remove()


async def test_what_goes_to_a_broker_that_freezes_is_given_up_in_time_and_the_next_leader_asked(
    brokers: tuple[Kafka, Kafka], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiokafka_faults, "CONNECT_TIMEOUT_S", 1.0)
    first, second = brokers
    settings = KafkaSettings(bootstrap_servers=first.address, request_timeout_s=5)
    async with administering(settings) as admin:
        led_by_the_second = NewTopic("results", -1, -1, {0: [2, 1]})
        await admin.create_topics([led_by_the_second])
    async with producer(settings) as sending:
        await sending.send_and_wait("results", b"taken")
        second.pause()
        paused_s = time.monotonic()
        with pytest.raises(RequestTimedOutError):
            await sending.send_and_wait("results", b"given up")
        assert 4 < time.monotonic() - paused_s < 8
        await sending.send_and_wait("results", b"taken by the first")
        assert time.monotonic() - paused_s < 11


async def test_a_message_is_delivered_once_every_replica_in_sync_has_it(
    brokers: tuple[Kafka, Kafka],
) -> None:
    first, second = brokers
    settings = KafkaSettings(bootstrap_servers=first.address)
    async with administering(settings) as admin:
        await admin.create_topics([NewTopic("results", -1, -1, {0: [1, 2]})])
    async with producer(settings) as sending:
        await sending.send_and_wait("results", b"copied")
        second.pause()
        delivery = await sending.send("results", b"not yet copied")
        await asyncio.wait({delivery}, timeout=2)
        assert not delivery.done()
        second.resume()
        await delivery


async def test_a_message_is_taken_once_it_has_a_leader_and_replicas_enough(
    brokers: tuple[Kafka, Kafka],
) -> None:
    first, second = brokers
    own = KafkaSettings(bootstrap_servers=first.address, request_timeout_s=2)
    both = {"min.insync.replicas": "2"}
    async with administering(own) as admin:
        led_by_the_second = NewTopic("led", -1, -1, {0: [2]})
        copied_there = NewTopic("copied", -1, -1, {0: [1, 2]}, topic_configs=both)
        await admin.create_topics([led_by_the_second, copied_there])
    letter = (record(own, 0, b"{}"), [Failure(AudioNotFound("Nothing there."))], MODEL)

    async def refusal(topic: str) -> str | None:
        async with Publisher(own.model_copy(update={"topic_dead_letter": topic})) as publisher:
            try:
                await publisher.dead_letter(*letter)
            except PublishFailed as error:
                return error.message
        return None

    async def taken(topic: str) -> bool:
        return await refusal(topic) is None

    await asyncio.to_thread(second.stop)
    assert "LeaderNotAvailableError" in str(await refusal("led"))
    assert "NotEnoughReplicasError" in str(await refusal("copied"))
    await asyncio.to_thread(second.start)
    for topic in ("led", "copied"):
        await until(partial(taken, topic))


async def test_no_message_takes_long_to_be_compressed(
    kafka_settings: KafkaSettings, topic: MakeTopic
) -> None:
    few_letters = format(Random(0).getrandbits(1 << 20), "b").encode()
    async with producer(kafka_settings) as sending:
        started_s = time.process_time()
        await sending.send_and_wait(await topic(), few_letters)
        assert time.process_time() - started_s < 0.5

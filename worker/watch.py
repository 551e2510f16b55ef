"""`timbre watch`: results as they arrive, beside any worker and without a consumer group."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord
from pydantic import ValidationError

from schemas.events import DeadLetter, TrackTags
from worker import kafka
from worker.dead_letters import parse
from worker.errors import ServicesUnavailable
from worker.settings import KafkaSettings

log = logging.getLogger(__name__)

METADATA_ATTEMPTS = 20
METADATA_PAUSE_S = 0.25


class Watch:
    """Iterates over tags, and over dead letters where `failures` is set, until it is left.

    From its start on nothing is missed; `from_beginning` begins with the oldest there is.
    """

    def __init__(
        self, settings: KafkaSettings, *, from_beginning: bool = False, failures: bool = False
    ) -> None:
        self._settings = settings
        self._from_beginning = from_beginning
        self._topics = [settings.topic_tags]
        if failures:
            self._topics.append(settings.topic_dead_letter)
        self._consumer = AIOKafkaConsumer(
            **kafka.client_options(settings), group_id=None, enable_auto_commit=False
        )

    async def __aenter__(self) -> Self:
        """Find the topics' partitions and where to begin.

        Raises
        ------
        ServicesUnavailable
            Kafka can't be reached, or a topic is not there.
        """
        try:
            await self._consumer.start()
            partitions = [tp for topic in self._topics for tp in await self._partitions(topic)]
            self._consumer.assign(partitions)
            offsets = (
                await self._consumer.beginning_offsets(partitions)
                if self._from_beginning
                else await self._consumer.end_offsets(partitions)
            )
            for partition, offset in offsets.items():
                self._consumer.seek(partition, offset)
        except BaseException as error:
            await self._consumer.stop()
            if isinstance(error, KafkaError):
                raise ServicesUnavailable(
                    f"Kafka at {self._settings.bootstrap_servers} can't be reached "
                    f"({type(error).__name__}); check that it runs, and "
                    "TIMBRE_KAFKA__BOOTSTRAP_SERVERS."
                ) from error
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._consumer.stop()

    async def __aiter__(self) -> AsyncIterator[TrackTags | DeadLetter]:
        async for message in self._consumer:
            result = self._read(message)
            if result is not None:
                yield result

    def _read(self, message: "ConsumerRecord[bytes, bytes]") -> TrackTags | DeadLetter | None:
        if message.topic != self._settings.topic_tags:
            return parse(message)
        try:
            return TrackTags.from_bytes(message.value or b"")
        except ValidationError:
            log.warning(
                "Not a result of Timbre, left out: %s-%d@%d",
                message.topic, message.partition, message.offset,
            )  # fmt: skip
            return None

    async def _partitions(self, topic: str) -> list[TopicPartition]:
        for _ in range(METADATA_ATTEMPTS):
            if topic in await self._consumer.topics():
                numbers = self._consumer.partitions_for_topic(topic) or set()
                return [TopicPartition(topic, number) for number in sorted(numbers)]
            await asyncio.sleep(METADATA_PAUSE_S)
        raise ServicesUnavailable(
            f"Kafka at {self._settings.bootstrap_servers} has no topic {topic}; make it, or name "
            "the topics in use with TIMBRE_KAFKA__TOPIC_*."
        )

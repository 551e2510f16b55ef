"""What tests ask and tell a broker that workers don't."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest

from worker.kafka.connection import client_options
from worker.settings import KafkaSettings

# In Kafka's protocol.
TOPIC, LITERAL = 2, 3
DENY, ALLOW = 2, 3
ALL, READ, WRITE, DESCRIBE = 2, 3, 4, 8


@asynccontextmanager
async def administering(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**client_options(kafka))
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def limit_messages(kafka: KafkaSettings, topic: str, max_bytes: int) -> None:
    """Have the broker refuse larger messages on a topic, and else do with it as by default."""
    limit = {"max.message.bytes": str(max_bytes)}
    async with administering(kafka) as admin:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, limit)])


@asynccontextmanager
async def forbidden(kafka: KafkaSettings, topic: str, *operations: int) -> AsyncIterator[None]:
    """Nobody may do this with a topic, and everybody all else."""
    rules = [(operation, DENY) for operation in operations] + [(ALL, ALLOW)]
    acls = [(TOPIC, topic, LITERAL, "User:*", "*", *rule) for rule in rules]
    async with administering(kafka) as admin:
        for acl in acls:
            made = await admin._send_request(CreateAclsRequest(*acl))
            assert [code for code, _ in made.creation_responses] == [0]
        yield
        for acl in acls:
            await admin._send_request(DeleteAclsRequest(*acl))


async def offsets(kafka: KafkaSettings, partitions: int) -> list[int]:
    """Committed offsets of the group, by partition of the topic of new tracks."""
    tps = [TopicPartition(kafka.topic_new, number) for number in range(partitions)]
    async with AIOKafkaConsumer(
        **client_options(kafka), group_id=kafka.group, enable_auto_commit=False
    ) as reader:
        reader.assign(tps)
        return [await reader.committed(tp) or 0 for tp in tps]


async def committed(kafka: KafkaSettings, partitions: int) -> int:
    """The same, added up."""
    return sum(await offsets(kafka, partitions))

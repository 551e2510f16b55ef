"""The topics of a worker, made where they are not there yet."""

from collections.abc import Iterable

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, for_code

from worker.errors import ServicesUnavailable
from worker.kafka.connection import client_options, unreachable
from worker.settings import KafkaSettings

TOPIC_ALREADY_EXISTS = 36
# One replica is too few where the broker asks for several of each message. Aiokafka takes this only
# beside an assignment, which may be empty.
AS_THE_BROKER_HAS_IT = -1


async def create_topics(kafka: KafkaSettings, topics: Iterable[str], partitions: int) -> None:
    """Make topics of so many partitions each; one that exists is left as it is.

    Raises
    ------
    ServicesUnavailable
        The broker can't be reached or refuses.
    """
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await admin.start()
        response = await admin.create_topics(
            [NewTopic(name, partitions, AS_THE_BROKER_HAS_IT, {}) for name in topics]
        )
    except KafkaError as error:
        raise unreachable(kafka, error) from error
    finally:
        await admin.close()
    for name, code, *reason in response.topic_errors:
        if code not in {0, TOPIC_ALREADY_EXISTS}:
            raise ServicesUnavailable(f"Topic {name} can't be made: {for_code(code)} {reason}")

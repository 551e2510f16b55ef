"""`timbre submit`: new-track events onto the topic, as a platform would publish them."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from aiokafka.errors import KafkaError

from schemas.events import NewTrack
from worker.kafka import connection
from worker.settings import KafkaSettings

MAX_UNCONFIRMED = 1000


@dataclass
class Submission:
    """How a submission went: events confirmed by topic, and those Kafka did not take."""

    delivered: dict[str, int] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Track id and reason"""


async def submit(
    settings: KafkaSettings,
    tracks: Iterable[NewTrack],
    progress: Callable[[NewTrack], None] = lambda track: None,
) -> Submission:
    """Publish `tracks` and wait until every in-sync replica has each; backfill on its own topic.

    `progress` is called for every track once its fate is known.

    Raises
    ------
    ServicesUnavailable
        Kafka can't be reached.
    """
    submission = Submission()
    room = asyncio.Semaphore(MAX_UNCONFIRMED)
    async with (
        connection.started(connection.producer(settings), settings) as producer,
        asyncio.TaskGroup() as group,
    ):

        async def deliver(track: NewTrack) -> None:
            topic = settings.topic_backfill if track.priority == "backfill" else settings.topic_new
            try:
                await producer.send_and_wait(topic, track.to_bytes(), key=track.track_id.encode())
                submission.delivered[topic] = submission.delivered.get(topic, 0) + 1
            except KafkaError as error:
                submission.failed.append((track.track_id, f"{topic}: {error!r}"))
            finally:
                room.release()
                progress(track)

        for track in tracks:
            await room.acquire()
            group.create_task(deliver(track))
    return submission

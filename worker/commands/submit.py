"""`timbre submit`: new-track events onto the topic, as a platform would publish them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from aiokafka.errors import KafkaError
from rich.progress import TimeRemainingColumn
from rich.text import Text

from schemas.events import NewTrack
from worker.commands import console
from worker.commands.sources import tracks
from worker.errors import SourceInvalid
from worker.kafka import connection
from worker.settings import KafkaSettings, Settings

IDS_SHOWN = 20
MAX_UNCONFIRMED = 1000


def submit_tracks(settings: Settings, sources: Sequence[str], *, backfill: bool) -> int:
    """Publish every track that `sources` name; 0 when Kafka has them all, 1 when some failed.

    Their ids are printed, in a terminal only where they are few.
    """
    found = list(tracks(sources, "backfill" if backfill else "upload"))
    if not found:
        raise SourceInvalid("There is nothing to submit: the tables are empty.")
    remarks = console.err()
    with console.progress(remarks, "Submitting", TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=len(found))
        submission = asyncio.run(
            submit(settings.kafka, found, lambda track: progress.advance(task))
        )
    out = console.out()
    if len(found) <= IDS_SHOWN or not out.is_terminal:
        for track in found:
            out.print(Text.assemble(track.track_id, "  ", (track.audio.uri, "dim")))
    for topic, count in submission.delivered.items():
        out.print(f"Submitted {console.counted(count, 'track')} to {topic}", markup=False)
    for track_id, reason in submission.failed:
        remarks.print(Text.assemble(("Not submitted", "red"), f" {track_id}: {reason}"))
    return 1 if submission.failed else 0


@dataclass
class Submission:
    """How a submission went: events confirmed by topic, and those Kafka did not take."""

    delivered: Counter[str] = field(default_factory=Counter)
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
                submission.delivered[topic] += 1
            except KafkaError as error:
                submission.failed.append((track.track_id, f"{topic}: {error!r}"))
            finally:
                room.release()
                progress(track)

        for track in tracks:
            await room.acquire()
            group.create_task(deliver(track))
    return submission

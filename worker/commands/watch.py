"""`timbre watch`: results as they arrive, beside any worker and without a consumer group."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from schemas.events import DeadLetter, TrackTags
from worker.commands import console
from worker.dead_letters import oldest_first, parse
from worker.kafka import connection
from worker.settings import KafkaSettings, Settings

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_MS = 10_000  # somebody waits for it
GENRES_SHOWN = 2
TAGS_SHOWN = 4

Result = TrackTags | DeadLetter


def watch_results(
    settings: Settings,
    *,
    from_beginning: bool = False,
    failures: bool = False,
    count: int | None = None,
    as_json: bool = False,
) -> None:
    """Print results as they arrive, until `count` or Ctrl-C."""

    async def follow() -> None:
        out, seen = console.out(), 0
        async with watching(
            settings.kafka, from_beginning=from_beginning, failures=failures
        ) as results:
            if not as_json:
                topic = settings.kafka.topic_tags
                console.err().print(f"Watching {topic}; Ctrl-C ends.", style="dim")
            async for result in results:
                if as_json:
                    console.json_line(result.to_bytes().decode())
                else:
                    print_line(out, result)
                seen += 1
                if seen == count:
                    return

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        return


def print_line(out: Console, result: Result) -> None:
    """One result in one line: track, genres, other tags; or track and what went wrong."""
    if isinstance(result, DeadLetter):
        name = result.track_id or "(no track id)"
        line = Text.assemble(_cell(out, name), ("✗ ", "red"), (result.reason.code, "red"), " ")
        line.append(result.reason.message, style="dim")
    else:
        line = Text.assemble(_cell(out, result.track_id), ("✓ ", "green"))
        if result.uncertain:
            line.append("uncertain ", style="yellow")
        parts = []
        for number, tags in enumerate(console.by_head(result.tags).values()):
            shown = console.best(tags, TAGS_SHOWN if number else GENRES_SHOWN)
            parts.append(Text("  ").join(map(console.label, shown)))
        line.append_text(Text("  ·  ", style="dim").join(parts))
        if result.processing.cached:
            line.append("  cached", style="dim")
    console.line(out, line)


def _cell(out: Console, name: str) -> Text:
    """A track's id as a column: cut in a terminal, whole where something else may read it."""
    width = console.ID_WIDTH
    cut = name[: width - 1] + "…" if out.is_terminal and len(name) > width else name
    return Text(f"{cut:<{width}} ", style="bold")


@asynccontextmanager
async def watching(
    settings: KafkaSettings, *, from_beginning: bool = False, failures: bool = False
) -> AsyncIterator[AsyncIterator[Result]]:
    """Tags, and dead letters where `failures` is set, as they arrive.

    From its start on nothing is missed; `from_beginning` begins with what there is, oldest first.

    Raises
    ------
    ServicesUnavailable
        Kafka can't be reached, a topic is not there, or Kafka refuses to go on, as where the right
        to read was taken away.
    """
    topics = [settings.topic_tags] + ([settings.topic_dead_letter] if failures else [])
    consumer = AIOKafkaConsumer(
        *topics,
        **connection.client_options(settings) | {"request_timeout_ms": REQUEST_TIMEOUT_MS},
        group_id=None,
        auto_offset_reset="earliest" if from_beginning else "latest",
    )
    async with connection.started(consumer, settings, topics):  # waits for the topics
        # Asking for a position settles it: what is published from here on is seen.
        for partition in consumer.assignment():
            await consumer.position(partition)
        backlog = await consumer.end_offsets(consumer.assignment()) if from_beginning else {}
        async with aclosing(_results(consumer, backlog, settings.topic_tags)) as results:
            yield results


async def _results(
    consumer: AIOKafkaConsumer, backlog: Mapping[TopicPartition, int], topic_tags: str
) -> AsyncGenerator[Result, None]:
    async with aclosing(_messages(consumer, backlog)) as messages:
        async for message in messages:
            if message.topic != topic_tags:
                yield parse(message)
            elif (tags := _tags(message)) is not None:
                yield tags


async def _messages(
    consumer: AIOKafkaConsumer, backlog: Mapping[TopicPartition, int]
) -> AsyncGenerator["ConsumerRecord[bytes, bytes]", None]:
    async with aclosing(oldest_first(consumer, backlog)) as messages:
        async for message in messages:
            yield message
    async for message in consumer:
        yield message


def _tags(message: "ConsumerRecord[bytes, bytes]") -> TrackTags | None:
    try:
        return TrackTags.from_bytes(message.value or b"")
    except ValidationError:
        log.warning(
            "Not a result of Timbre, left out: %s-%d@%d",
            message.topic, message.partition, message.offset,
        )  # fmt: skip
        return None

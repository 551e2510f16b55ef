"""`timbre watch`: results as they arrive, beside any worker and without a consumer group."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from aiokafka.structs import ConsumerRecord
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from schemas.events import DeadLetter, TrackTags
from worker.commands import console
from worker.dead_letters import oldest_first, parse
from worker.errors import ServicesUnavailable
from worker.kafka import connection
from worker.settings import KafkaSettings, Settings

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_MS = 10_000  # somebody waits for it
ID_WIDTH = 28
GENRES_SHOWN = 2
TAGS_SHOWN = 4


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
        async with Watch(
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


def print_line(out: Console, result: TrackTags | DeadLetter) -> None:
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
    cut = name[: ID_WIDTH - 1] + "…" if out.is_terminal and len(name) > ID_WIDTH else name
    return Text(f"{cut:<{ID_WIDTH}} ", style="bold")


class Watch:
    """Iterates over tags, and over dead letters where `failures` is set, until it is left.

    From its start on nothing is missed; `from_beginning` begins with what there is, oldest first.
    """

    def __init__(
        self, settings: KafkaSettings, *, from_beginning: bool = False, failures: bool = False
    ) -> None:
        self._settings = settings
        self._from_beginning = from_beginning
        self._backlog: dict[TopicPartition, int] = {}
        self._topics = [settings.topic_tags]
        if failures:
            self._topics.append(settings.topic_dead_letter)
        self._consumer = AIOKafkaConsumer(
            *self._topics,
            **connection.client_options(settings) | {"request_timeout_ms": REQUEST_TIMEOUT_MS},
            group_id=None,
            auto_offset_reset="earliest" if from_beginning else "latest",
        )

    async def __aenter__(self) -> Self:
        """Find the topics' partitions and where to begin.

        Raises
        ------
        ServicesUnavailable
            Kafka can't be reached, or a topic is not there.
        """
        try:
            await self._consumer.start()  # waits for the topics
            # Asking for a position settles it: what is published from here on is seen.
            for partition in self._consumer.assignment():
                await self._consumer.position(partition)
            if self._from_beginning:
                self._backlog = await self._consumer.end_offsets(self._consumer.assignment())
        except BaseException as error:
            await self._consumer.stop()
            if isinstance(error, KafkaError):
                raise self._unavailable(error) from error
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._consumer.stop()

    async def __aiter__(self) -> AsyncIterator[TrackTags | DeadLetter]:
        """The results.

        Raises
        ------
        ServicesUnavailable
            Kafka refuses to go on, as where the right to read was taken away.
        """
        try:
            async with aclosing(self._messages()) as messages:
                async for message in messages:
                    result = self._read(message)
                    if result is not None:
                        yield result
        except KafkaError as error:
            raise self._unavailable(error) from error

    async def _messages(self) -> AsyncGenerator["ConsumerRecord[bytes, bytes]", None]:
        async with aclosing(oldest_first(self._consumer, self._backlog)) as backlog:
            async for message in backlog:
                yield message
        async for message in self._consumer:
            yield message

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

    def _unavailable(self, error: KafkaError) -> ServicesUnavailable:
        if isinstance(error, UnknownTopicOrPartitionError):
            return connection.no_topic(self._settings, self._topics)
        return connection.unreachable(self._settings, error)

"""What became of every event, told from the topics alone. Imports nothing of the worker's.

An event that Kafka holds in the topic of new tracks must end in tags or in a dead letter. Answers
may be there several times, and then must say the same outside of `processing`.
"""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, TopicPartition

TOLERANCE = 1e-4
HEADER = "timbre-"
PER_FAILURE = {"failed-at", "attempts", "reason"}
POLL_MS = 200

Place = tuple[str, int, int]
"""Topic, partition and offset."""
Identity = tuple[str, str]
"""Track id and address of the audio: what results repeat of the event that they answer."""


@dataclass(frozen=True, slots=True)
class Topics:
    """Names of a worker's topics."""

    new: tuple[str, ...]
    tags: str
    features: str
    dead_letter: str

    def all(self) -> tuple[str, ...]:
        return (*self.new, self.tags, self.features, self.dead_letter)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of events and of what answered them.

    `tags` and `dead_letters` count events answered so, `duplicates` every further answer to one,
    `differing` events whose answers contradict each other, as features beside a dead letter do, or
    are of other audio than theirs.
    """

    events: int
    tags: int
    dead_letters: int
    lost: int
    duplicates: int
    differing: int


@dataclass
class _Event:
    place: Place
    identity: Identity | None
    sent_s: float


@dataclass
class Checker:
    """Reads the topics, as often as asked, and keeps what they hold.

    Parameters
    ----------
    connection
        Keyword arguments by which aiokafka reaches the broker.
    served
        SHA-256 of what lies at an address, where that is known.
    """

    connection: Mapping[str, Any]
    topics: Topics
    served: Mapping[str, str] = field(default_factory=dict)
    events: list[_Event] = field(default_factory=list)
    tags: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    features: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    letters: dict[Place, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    answered_s: list[float] = field(default_factory=list)
    """When answers were first seen (`time.monotonic`), in order"""
    seen_s: dict[str, float] = field(default_factory=dict)
    """By track id, when its tags were first seen"""
    _seen_s: dict[tuple[str, str | Place], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """When each answer was: by topic, and by event id or the event's place"""

    async def __aenter__(self) -> Self:
        self._consumer = AIOKafkaConsumer(
            **self.connection,
            group_id=None,
            enable_auto_commit=False,
            fetch_max_wait_ms=POLL_MS,
            max_partition_fetch_bytes=16 * 1024 * 1024,
        )
        await self._consumer.start()
        await self.follow()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._consumer.stop()

    async def follow(self) -> None:
        """Read every topic that is there, new ones from their beginning."""
        before = {tp: await self._consumer.position(tp) for tp in self._consumer.assignment()}
        partitions = []
        for topic in self.topics.all():
            await self._consumer._client.add_topic(topic)
        await self._consumer._client.force_metadata_update()
        for topic in self.topics.all():
            numbers = self._consumer.partitions_for_topic(topic) or set()
            partitions += [TopicPartition(topic, number) for number in numbers]
        self._consumer.assign(partitions)
        for tp in partitions:
            self._consumer.seek(tp, before.get(tp, 0))

    async def poll(self) -> None:
        """Take in what has arrived since, waiting a moment for it."""
        batch = await self._consumer.getmany(timeout_ms=POLL_MS)
        now_s = time.monotonic()
        for messages in batch.values():
            for message in messages:
                self._note(message, now_s)

    async def read_to_end(self) -> None:
        """Take in all there is now."""
        partitions = list(self._consumer.assignment())
        ends = await self._consumer.end_offsets(partitions)
        while any([await self._consumer.position(tp) < ends[tp] for tp in partitions]):
            await self.poll()

    @property
    def unanswered(self) -> list[Place]:
        """Events that have neither a dead letter nor both of their results yet."""
        ended_s = self._ended_s()
        return [event.place for event in self.events if event.place not in ended_s]

    def answered(self) -> Counter[int]:
        """How many events have their answer, by partition."""
        sent = Counter(event.place[1] for event in self.events)
        return sent - Counter(place[1] for place in self.unanswered)

    def verdict(self) -> Verdict:
        """Counts over all that was read."""
        sent = Counter(event.identity for event in self.events)
        lettered = Counter(event.identity for event in self.events if event.place in self.letters)
        tagged = Counter(_identity(group[0]) for group in self.tags.values())
        both = sum(max(0, n + lettered[name] - sent[name]) for name, n in tagged.items())
        without_tags = len(self.features.keys() - self.tags.keys())
        told = [group[0]["audio"] for group in self.tags.values()]
        mistaken = sum(self.served.get(a["uri"], a["sha256"]) != a["sha256"] for a in told)
        answers = [*self.tags.values(), *self.features.values(), *self.letters.values()]
        duplicates = [*self.tags.values(), *self.letters.values()]
        return Verdict(
            events=len(self.events),
            tags=len(self.tags),
            dead_letters=len(self.letters),
            lost=len(self.unanswered),
            duplicates=sum(len(group) - 1 for group in duplicates),
            differing=both + without_tags + mistaken + sum(map(_differ, answers)),
        )

    def reasons(self) -> Counter[str]:
        """Dead letters by reason code."""
        return Counter(group[0]["reason-code"] for group in self.letters.values())

    def recovery_s(self, moments: list[float]) -> float:
        """The longest time from one of the moments to a partition's next answer.

        Partitions that had nothing to answer then don't count.
        """
        ended_s, longest_s = self._ended_s(), 0.0
        for moment_s in moments:
            waits_s: dict[int, list[float]] = defaultdict(list)
            for event in self.events:
                wait_s = ended_s.get(event.place, math.inf) - moment_s
                if event.sent_s <= moment_s and wait_s > 0:
                    waits_s[event.place[1]].append(wait_s)
            longest_s = max([longest_s, *map(min, waits_s.values())])
        return round(longest_s, 2)

    def _ended_s(self) -> dict[Place, float]:
        """When the dead letter of an event was seen, or both of its results.

        Of events of one identity so many count as answered as there are answers, the first sent
        first.
        """
        ended_s = {place: self._seen_s[self.topics.dead_letter, place][0] for place in self.letters}
        results_s: dict[Identity, list[float]] = defaultdict(list)
        for event_id, group in self.tags.items():
            tags_s = self._seen_s[self.topics.tags, event_id]
            features_s = self._seen_s[self.topics.features, event_id]
            results_s[_identity(group[0])] += map(max, zip(tags_s, features_s, strict=False))
        for times_s in results_s.values():
            times_s.sort(reverse=True)
        for event in self.events:
            if event.place not in ended_s and event.identity and results_s[event.identity]:
                ended_s[event.place] = results_s[event.identity].pop()
        return ended_s

    def _note(self, message: Any, now_s: float) -> None:
        place = (message.topic, message.partition, message.offset)
        if message.topic in self.topics.new:
            age_s = time.time() - message.timestamp / 1000
            self.events.append(_Event(place, _announced(message.value), now_s - age_s))
        elif message.topic == self.topics.dead_letter:
            letter = _letter(message)
            origin = (
                letter["origin-topic"],
                int(letter["origin-partition"]),
                int(letter["origin-offset"]),
            )
            self.letters[origin].append(letter)
            self._seen_s[message.topic, origin].append(now_s)
            self.answered_s.append(now_s)
        else:
            content = json.loads(message.value)
            content.pop("processing")
            kept = self.tags if message.topic == self.topics.tags else self.features
            kept[content["event_id"]].append(content)
            self._seen_s[message.topic, content["event_id"]].append(now_s)
            if kept is self.tags:
                self.answered_s.append(now_s)
                self.seen_s.setdefault(content["track_id"], now_s)


def track_id(value: bytes | None) -> bytes | None:
    """The id of the track that a plain event names; None where it can't be told."""
    try:
        named = json.loads(value or b"")["track_id"]
        return named.encode() if isinstance(named, str) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _announced(value: bytes | None) -> Identity | None:
    """What results of a plain event repeat; None where it can't be told."""
    try:
        event = json.loads(value or b"")
        named, uri = event["track_id"], event["audio"]["uri"]
        return (named, uri) if isinstance(named, str) and isinstance(uri, str) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _identity(tags: dict[str, Any]) -> Identity:
    return tags["track_id"], tags["audio"]["uri"]


def _letter(message: Any) -> dict[str, Any]:
    """A dead letter as a flat object: Timbre's headers by name, and the original."""
    letter: dict[str, Any] = {"key": message.key, "value": message.value, "headers": []}
    for name, value in message.headers:
        if name.startswith(HEADER):
            letter[name.removeprefix(HEADER)] = value.decode()
        else:
            letter["headers"].append((name, value))
    return letter


def _differ(group: list[dict[str, Any]]) -> bool:
    return not all(same(one, other) for one, other in pairwise(group))


def same(one: Any, other: Any) -> bool:
    """Whether two answers say the same: numbers within the tolerance, tags by label."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = one.keys() - PER_FAILURE
        return names == other.keys() - PER_FAILURE and all(
            (same_tags if name == "tags" else same)(one[name], other[name]) for name in names
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE
    return bool(one == other)


def same_tags(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether tags are of the same heads and labels, and say the same of each.

    Their order may differ, where scores lie so close that the tolerance turns them round.
    """
    ours, theirs = ({(tag["head"], tag["label"]): tag for tag in tags} for tags in (one, other))
    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)

"""The checker of the faults sees what it is there to see."""

import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from tests.conftest import MakeTopics
from tests.faults.checker import Checker, Topics, Verdict, same_tags
from worker.kafka import connection
from worker.settings import KafkaSettings

URI = "https://x.example/1"


class Topic:
    """Writes what a worker would."""

    def __init__(self, own: KafkaSettings, producer: AIOKafkaProducer) -> None:
        self.own = own
        self._producer = producer

    async def event(self, track_id: str, uri: str = URI) -> int:
        value = json.dumps({"track_id": track_id, "audio": {"uri": uri}})
        sent = await self._producer.send_and_wait(self.own.topic_new, value.encode())
        return int(sent.offset)

    async def tags(
        self, track_id: str, score: float = 0.5, *, features: bool = True, **more: Any
    ) -> None:
        tags = {
            "audio": {"uri": URI, "sha256": "a" * 64},
            "tags": [{"head": "genre", "label": "jazz", "score": score}],
        }
        await self._result(self.own.topic_tags, track_id, tags | more)
        if features:
            await self.features(track_id, score)

    async def features(self, track_id: str, first: float = 0.5) -> None:
        await self._result(self.own.topic_features, track_id, {"embedding": [first, 0.0]})

    async def dead_letter(self, offset: int, code: str = "audio_not_found") -> None:
        headers = {
            "reason-code": code,
            "origin-topic": self.own.topic_new,
            "origin-partition": "0",
            "origin-offset": str(offset),
        }
        await self._producer.send_and_wait(
            self.own.topic_dead_letter,
            b"{}",
            headers=[(f"timbre-{name}", value.encode()) for name, value in headers.items()],
        )

    async def _result(self, topic: str, track_id: str, content: dict[str, Any]) -> None:
        event = {"event_id": f"event of {track_id}", "track_id": track_id}
        result = event | content | {"processing": {"at": str(id(content))}}
        await self._producer.send_and_wait(topic, json.dumps(result).encode())

    async def verdict(self) -> Verdict:
        own = self.own
        topics = Topics((own.topic_new,), own.topic_tags, own.topic_features, own.topic_dead_letter)
        served = {URI: "a" * 64}
        async with Checker(connection.client_options(own), topics, served) as checker:
            await checker.read_to_end()
            return checker.verdict()


@pytest.fixture
async def topic(topics: MakeTopics) -> AsyncIterator[Topic]:
    own = await topics()
    async with AIOKafkaProducer(**connection.client_options(own)) as producer:
        yield Topic(own, producer)


async def test_an_event_without_an_answer_is_lost(topic: Topic) -> None:
    await topic.event("tagged")
    await topic.tags("tagged")
    await topic.dead_letter(await topic.event("failed"))
    await topic.event("forgotten")

    verdict = await topic.verdict()

    assert (verdict.events, verdict.tags, verdict.dead_letters) == (3, 1, 1)
    assert (verdict.lost, verdict.duplicates, verdict.differing) == (1, 0, 0)


async def test_of_several_events_of_a_track_each_needs_its_answer(topic: Topic) -> None:
    await topic.event("track")
    await topic.event("track", "https://x.example/2")
    await topic.tags("track")
    await topic.event("again")
    await topic.event("again")
    await topic.tags("again")

    verdict = await topic.verdict()

    assert (verdict.events, verdict.lost, verdict.differing) == (4, 2, 0)


async def test_a_dead_letter_and_then_tags_of_the_same_event_sent_again_agree(topic: Topic) -> None:
    await topic.dead_letter(await topic.event("again"))
    await topic.event("again")
    await topic.tags("again")

    verdict = await topic.verdict()

    assert (verdict.lost, verdict.differing) == (0, 0)


async def test_an_event_with_tags_and_no_features_is_lost(topic: Topic) -> None:
    await topic.event("halved")
    await topic.tags("halved", features=False)

    assert (await topic.verdict()).lost == 1


async def test_a_second_answer_that_says_the_same_is_a_duplicate(topic: Topic) -> None:
    await topic.event("twice")
    await topic.tags("twice", 0.5)
    await topic.tags("twice", 0.50005)

    verdict = await topic.verdict()

    assert (verdict.lost, verdict.duplicates, verdict.differing) == (0, 1, 0)


@pytest.mark.parametrize("second", [{"score": 0.51}, {"uncertain": True}])
async def test_a_second_answer_that_says_something_else_differs(
    topic: Topic, second: dict[str, Any]
) -> None:
    await topic.event("twice")
    await topic.tags("twice")
    await topic.tags("twice", **second)

    assert (await topic.verdict()).differing > 0


async def test_tags_of_other_audio_than_was_served_differ(topic: Topic) -> None:
    await topic.event("mistaken")
    await topic.tags("mistaken", audio={"uri": URI, "sha256": "b" * 64})

    assert (await topic.verdict()).differing == 1


async def test_an_event_with_tags_and_a_dead_letter_differs(topic: Topic) -> None:
    offset = await topic.event("both")
    await topic.tags("both")
    await topic.dead_letter(offset)

    assert (await topic.verdict()).differing == 1


async def test_features_beside_a_dead_letter_differ(topic: Topic) -> None:
    await topic.dead_letter(await topic.event("failed"))
    await topic.features("failed")

    verdict = await topic.verdict()

    assert (verdict.lost, verdict.differing) == (0, 1)


def test_recovery_is_told_of_the_partition_that_waits_longest() -> None:
    checker = Checker({}, Topics(("new",), "tags", "features", "letters"))

    def note(at_s: float, topic: str, track: str, partition: int = 0, offset: int = 0) -> None:
        sent = {"track_id": track, "audio": {"uri": URI}}
        value = json.dumps(sent | {"event_id": track, "processing": {}}).encode()
        checker._note(
            SimpleNamespace(
                topic=topic,
                partition=partition,
                offset=offset,
                timestamp=time.time() * 1000,
                value=value,
            ),
            at_s,
        )

    note(1, "new", "prompt", partition=0)
    note(1, "new", "next", partition=0, offset=1)
    note(1, "new", "slow", partition=1)
    note(1, "new", "before", partition=2)
    note(9, "new", "after", partition=3)
    for at_s, track in ((2, "before"), (5, "prompt"), (8, "slow"), (8.3, "next"), (20, "after")):
        note(at_s, "tags", track)
        note(at_s, "features", track)

    assert checker.recovery_s([]) == 0
    assert checker.recovery_s([3]) == pytest.approx(5, abs=0.1)
    assert checker.recovery_s([3, 4.5]) == pytest.approx(5, abs=0.1)
    assert checker.recovery_s([8.5]) == 0


def tags(*labelled: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"head": "genre", "label": label, "score": score} for label, score in labelled]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param([("rock", 0.9)], [("jazz", 0.9)], id="another label"),
        pytest.param([("rock", 0.9)], [], id="a head is gone"),
        pytest.param([("rock", 0.9), ("jazz", 0.4)], [("rock", 0.9)], id="the second is gone"),
        pytest.param([("rock", 0.9), ("jazz", 0.0)], [("rock", 0.9)], id="the least is gone"),
        pytest.param([("rock", 0.9)], [("rock", 0.8)], id="another score"),
    ],
)
def test_tags_that_are_missing_or_others_contradict(
    one: list[tuple[str, float]], other: list[tuple[str, float]]
) -> None:
    assert not same_tags(tags(*one), tags(*other))
    assert not same_tags(tags(*other), tags(*one))


def test_tags_whose_scores_are_close_may_change_places() -> None:
    one = tags(("rock", 0.40004), ("jazz", 0.4))
    assert same_tags(one, tags(("jazz", 0.40003), ("rock", 0.4)))

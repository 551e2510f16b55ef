"""No message is too odd to become a dead letter: one that could not would stop its partition."""

import pytest

from schemas.events import ModelRef
from tests.conftest import MakeTopics
from worker.dead_letters import list_dead_letters
from worker.errors import EventMalformed
from worker.publish import Failure, Publisher
from worker.record import Record
from worker.settings import Settings

HUGE = b"x" * 11_000_000


@pytest.mark.parametrize(
    ("key", "value", "timestamp_s"),
    [
        pytest.param(None, None, 0.0, id="neither key nor value"),
        pytest.param(b"key", b"{}", 1e18, id="a timestamp beyond the calendar"),
        pytest.param(b"key", b"{}", -1.0, id="no timestamp"),
        pytest.param(b"key", HUGE, 0.0, id="a value larger than Kafka takes back"),
        pytest.param(HUGE, b"{}", 0.0, id="a key larger than Kafka takes back"),
    ],
)
async def test_any_message_becomes_a_dead_letter_with_its_origin(
    topics: MakeTopics, key: bytes | None, value: bytes | None, timestamp_s: float
) -> None:
    own = await topics()
    record = Record(own.topic_new, 3, 14, timestamp_s, key, value, ())

    async with Publisher(own) as publisher:
        failure = Failure(EventMalformed("The event is odd."))
        await publisher.dead_letter(record, [failure], ModelRef(name="model", version="1"))
    letters = [letter async for _, letter in list_dead_letters(Settings(kafka=own))]

    assert [(letter.origin.partition, letter.origin.offset) for letter in letters] == [(3, 14)]
    assert letters[0].reason.code == "event_malformed"

import asyncio
import random
import re
import sys
import tempfile
import time
import tracemalloc
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import (
    BrokerResponseError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)
from aiokafka.protocol.commit import OffsetFetchRequest, OffsetFetchResponse_v3
from faust.transport.consumer import Consumer as FaustConsumer

from tests.broker import DESCRIBE, READ, administering, committed, forbidden
from tests.conftest import MakeTopics, new_topics
from tests.tls import GuardedKafka
from tests.waiting import until
from tests.worker_process import environment
from worker.kafka import connection, faust_app
from worker.kafka import consumer as consumer_module
from worker.kafka.consumer import Consumer, Handle
from worker.kafka.faust_app import App
from worker.kafka.place import MAX_RESTING, Place
from worker.metrics import Metrics
from worker.record import Record
from worker.services.kafka import Kafka
from worker.services.topics import create_topics
from worker.settings import MIB, KafkaSettings, Settings, WorkerSettings

EVENTS = 200
MILLIONS = 3


class Seen(list[Record]):
    """A handler that keeps what it is given."""

    async def __call__(self, record: Record, _: Place) -> None:
        self.append(record)

    @property
    def offsets(self) -> list[int]:
        return [record.offset for record in self]

    @property
    def values(self) -> list[bytes | None]:
        return [record.value for record in self]


class SeenByTopic(defaultdict[str, list[int]]):
    """A handler that keeps the offsets that it is given."""

    def __init__(self) -> None:
        super().__init__(list)

    async def __call__(self, record: Record, _: Place) -> None:
        self[record.topic].append(record.offset)


@asynccontextmanager
async def consuming(settings: Settings, handle: Handle) -> AsyncIterator[Consumer]:
    consumer = Consumer(settings, handle, Metrics())
    running = asyncio.create_task(consumer.run())
    try:
        yield consumer
    finally:
        consumer.stop()
        await running


def settings_of(own: KafkaSettings, **worker: object) -> Settings:
    options = {"max_in_flight": 8, "rebalance_grace_s": 1.0, "stop_deadline_s": 5.0} | worker
    return Settings(
        kafka=own.model_copy(update={"session_timeout_s": 6.0}),
        worker=WorkerSettings.model_validate(options),
    )


async def send(own: KafkaSettings, count: int = EVENTS, topic: str | None = None) -> None:
    async with AIOKafkaProducer(**connection.client_options(own)) as producer:
        for number in range(count):
            key = str(number).encode()
            await producer.send(topic or own.topic_new, key, key=key, headers=[("n", key)])


def ports_of_our_own() -> set[int]:
    """What this process listens at."""
    connections = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


async def test_every_event_is_handled_once_and_committed_at_a_graceful_stop(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=3)
    seen = Counter[bytes | None]()

    async def handle(record: Record, _: Place) -> None:
        await asyncio.sleep(random.uniform(0, 0.02))
        assert record.headers == (("n", record.key),)
        seen[record.value] += 1

    await send(own)
    async with consuming(settings_of(own), handle):
        await until(lambda: seen.total() >= EVENTS)

    assert set(seen.values()) == {1}
    assert await committed(own, 3) == EVENTS


async def test_nothing_is_written_to_disk(
    topics: MakeTopics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders with names known to all would be taken by another user's worker, or by anybody."""
    own = await topics(partitions=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async with consuming(settings_of(own), Seen()) as consumer:
        await until(lambda: consumer.assigned)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BROKER_URL", "kafka://127.0.0.1:9"),
        ("CONSUMER_AUTO_OFFSET_RESET", "latest"),
        ("TIMEZONE", "Nowhere"),
        ("APP_WEB_ENABLED", "true"),
    ],
)
async def test_what_the_environment_tells_others_is_not_for_faust(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    own = await topics(partitions=1)
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WEB_PORT", "0")
    seen, listening = Seen(), ports_of_our_own()

    await send(own, 10)
    async with consuming(settings_of(own), seen):
        await until(lambda: len(seen) == 10)
        assert ports_of_our_own() == listening


async def test_topics_made_after_the_start_are_seen_soon(
    kafka_settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "METADATA_AGE_S", 1.0)
    ending = uuid.uuid4().hex[:12]
    own = kafka_settings.model_copy(
        update={name: f"{name}-{ending}" for name in ("group", "topic_new", "topic_backfill")}
    )
    seen = Seen()

    async with consuming(settings_of(own), seen) as consumer:
        await until(lambda: consumer.assigned)
        await create_topics(own, [own.topic_new], 2)
        await send(own, 10)
        await until(lambda: len(seen) == 10, timeout_s=30)


async def test_what_is_in_flight_at_a_stop_finishes_and_is_committed(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    begun, done = list[int](), list[int]()
    let_go = asyncio.Event()

    async def finish_late(record: Record, _: Place) -> None:
        begun.append(record.offset)
        await let_go.wait()
        done.append(record.offset)

    await send(own, 50)
    async with consuming(settings_of(own), finish_late) as consumer:
        await until(lambda: len(begun) == 8)
        consumer.stop()
        asyncio.get_running_loop().call_later(1, let_go.set)
    assert begun == sorted(done) == list(range(8)), (
        "nothing is given back, and nothing new is taken"
    )
    assert await committed(own, 1) == 8


async def test_what_hangs_at_a_stop_is_given_back_and_delivered_again(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    first, second = Seen(), Seen()

    async def hang_on_the_tenth(record: Record, _: Place) -> None:
        if record.offset == 10:
            await asyncio.Event().wait()
        first.append(record)

    await send(own, 50)
    async with consuming(settings_of(own, stop_deadline_s=3.0), hang_on_the_tenth):
        await until(lambda: len(first) >= 40)
    assert await committed(own, 1) == 10

    async with consuming(settings_of(own), second):
        await until(lambda: len(second) == 40)
    assert b"10" in second.values
    assert await committed(own, 1) == 50


async def test_what_comes_during_a_stop_is_left_alone(topics: MakeTopics) -> None:
    """Were it acknowledged, so would be what hangs before it."""
    own = await topics(partitions=1)
    taken = list[int]()

    async def hang_on_the_first(record: Record, _: Place) -> None:
        taken.append(record.offset)
        if record.offset == 0:
            await asyncio.Event().wait()

    await send(own, 10)
    async with consuming(settings_of(own), hang_on_the_first) as consumer:
        await until(lambda: len(taken) == 10)
        consumer.stop()
        await send(own, 10)
    assert len(taken) == 10
    assert await committed(own, 1) == 0


async def test_a_partition_may_run_ahead_of_its_oldest_event_only_so_far(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    release = asyncio.Event()
    done = list[int]()

    async def hang_on_the_first(record: Record, _: Place) -> None:
        if record.offset == 0:
            await release.wait()
        done.append(record.offset)

    await send(own, 100)
    async with consuming(settings_of(own, max_ahead=20), hang_on_the_first):
        await until(lambda: len(done) == 19)
        await asyncio.sleep(1)
        assert len(done) == 19
        release.set()
        await until(lambda: len(done) == 100)
    assert await committed(own, 1) == 100


async def test_backfill_that_hangs_does_not_hold_back_uploads(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    uploads = list[int]()

    async def handle(record: Record, _: Place) -> None:
        if record.topic == own.topic_backfill:
            await asyncio.Event().wait()
        uploads.append(record.offset)

    await send(own, 300, own.topic_backfill)
    async with consuming(settings_of(own, stop_deadline_s=2.0), handle):
        await asyncio.sleep(2)
        await send(own, EVENTS)
        await until(lambda: len(uploads) == EVENTS)


async def test_events_that_rest_leave_their_places_to_others(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    done, working, most = list[int](), 0, 0

    async def rest_at_first(record: Record, place: Place) -> None:
        nonlocal working, most
        if record.offset < 20:
            await place.rest(2.0)
        working += 1
        most = max(most, working)
        await asyncio.sleep(0.01)
        working -= 1
        done.append(record.offset)

    await send(own, 60)
    async with consuming(settings_of(own, max_in_flight=4), rest_at_first):
        await until(lambda: len(done) == 60)
    assert sorted(done[:40]) == list(range(20, 60))
    assert most <= 4, "who comes back waits for a place"
    assert await committed(own, 1) == 60


async def test_events_of_one_key_take_their_turn_and_hold_no_place_meanwhile(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    first_may_end = asyncio.Event()
    done = list[int]()

    async def the_first_is_slow(record: Record, place: Place) -> None:
        if record.offset == 0:
            await first_may_end.wait()
        await place.turn()
        done.append(record.offset)

    for _ in range(3):
        await send(own, 10)
    async with consuming(settings_of(own, max_in_flight=2), the_first_is_slow):
        await until(lambda: len(done) == 27)
        await asyncio.sleep(0.5)
        assert not {0, 10, 20} & set(done), "key 0 came thrice, and the first is not done"
        first_may_end.set()
        await until(lambda: len(done) == 30)
    assert done[27:] == [0, 10, 20]
    assert await committed(own, 1) == 30


async def test_events_of_one_key_wait_for_all_before_them_whatever_those_end_as(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    first_may_end = asyncio.Event()
    failed, done = list[int](), list[int]()

    async def the_first_is_slow_and_others_fail(record: Record, place: Place) -> None:
        if record.offset in (1, 2):  # and make a dead letter, which waits for nothing
            failed.append(record.offset)
            return
        if record.offset == 0:
            await first_may_end.wait()
        await place.turn()
        done.append(record.offset)

    async with consuming(settings_of(own), the_first_is_slow_and_others_fail):
        for _ in range(3):
            await send(own, 1)
        await until(lambda: failed == [1, 2])
        await send(own, 2)
        await until(lambda: 4 in done)
        await asyncio.sleep(0.5)
        assert done == [4], "that of another key"
        first_may_end.set()
        await until(lambda: len(done) == 3)
    assert done == [4, 0, 3]


async def test_events_that_rest_are_given_back_at_once_at_a_stop(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    resting, working = list[int](), list[int]()

    async def handle(record: Record, place: Place) -> None:
        if record.offset >= 5:
            resting.append(record.offset)
            await place.rest(600.0)
        await place.rest(0.01)
        working.append(record.offset)
        await asyncio.sleep(1)

    await send(own, 10)
    async with consuming(settings_of(own, stop_deadline_s=50.0), handle):
        await until(lambda: len(resting) == len(working) == 5)
        stopped_s = time.monotonic()
    assert time.monotonic() - stopped_s < 10, "and not after the grace, which is 30 s"
    assert await committed(own, 1) == 5


async def test_events_that_rest_do_not_hold_up_a_rebalance(topics: MakeTopics) -> None:
    own = await topics(partitions=2)
    resting = list[int]()

    async def handle(record: Record, place: Place) -> None:
        resting.append(record.offset)
        await place.rest(600.0)

    await send(own, 5)
    settings = settings_of(own, rebalance_grace_s=50.0)
    async with consuming(settings, handle):
        await until(lambda: len(resting) == 5)
        async with consuming(settings, handle) as second:
            await until(lambda: second.assigned and len(resting) == 10, timeout_s=25)


async def test_a_rebalance_during_a_stop_waits_for_what_is_in_flight(topics: MakeTopics) -> None:
    """Or the event would be worked on twice at once, and a track's later event overtake it."""
    own = await topics(partitions=2)
    finish = asyncio.Event()
    others = Seen()

    async def handle(record: Record, _: Place) -> None:
        await finish.wait()

    await send(own, 8)
    async with consuming(settings_of(own, stop_deadline_s=15), handle) as consumer:
        await until(lambda: consumer.in_flight == 8)
        consumer.stop()
        async with consuming(settings_of(own), others) as another:
            await asyncio.sleep(4)
            assert not others
            finish.set()
            await until(lambda: another.assigned)
    assert not others
    assert await committed(own, 2) == 8


async def test_a_rebalance_waits_for_all_of_the_grace(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the worker asks for no other; faust's own is 60 s.
    monkeypatch.setattr(consumer_module, "App", partial(App, broker_rebalance_timeout=2.0))
    own = await topics(partitions=1)
    begun, done = Seen(), Seen()

    async def slowly(record: Record, _: Place) -> None:
        begun.append(record)
        await asyncio.sleep(5)
        done.append(record)

    settings = settings_of(own, rebalance_grace_s=8.0, stop_deadline_s=15.0)
    async with consuming(settings, slowly):
        await send(own, 3)
        await until(lambda: len(begun) == 3)
        async with consuming(settings, slowly) as joining:
            await until(lambda: joining.assigned)
            await until(lambda: len(done) == 3)
    assert begun.offsets == [0, 1, 2]


async def test_what_finishes_before_a_rebalance_is_committed(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await topics(partitions=1)
    loop, committing = asyncio.get_running_loop(), asyncio.Event()
    commit = GroupCoordinator._do_commit_offsets
    seen = Seen()

    async def slowly(*args: Any) -> None:
        monkeypatch.undo()
        loop.call_soon_threadsafe(committing.set)
        await asyncio.sleep(3)
        await commit(*args)

    async def handle(record: Record, _: Place) -> None:
        if record.offset > 0:
            await committing.wait()
        seen.append(record)

    async with consuming(settings_of(own), handle):
        await send(own, 5)
        monkeypatch.setattr(GroupCoordinator, "_do_commit_offsets", slowly)
        await committing.wait()
        async with consuming(settings_of(own), handle) as joining:
            await until(lambda: joining.assigned)
            await send(own, 5)
            await until(lambda: 9 in seen.offsets)
    assert sorted(seen.offsets) == list(range(10))


async def test_a_stop_does_not_wait_for_a_new_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer_module, "RESTART_BACKOFF_S", (600.0, 600.0))
    metrics = Metrics()

    async def die(_: object) -> None: ...

    consumer = Consumer(settings_of(KafkaSettings()), Seen(), metrics)
    monkeypatch.setattr(consumer, "_run_app", die)
    running = asyncio.create_task(consumer.run())
    await until(lambda: metrics.registry.get_sample_value("timbre_consumer_restarts_total") == 1)
    consumer.stop()
    await asyncio.wait_for(running, timeout=5)


async def test_events_that_the_brokers_disk_spoilt_are_unread_and_those_around_them_whole(
    tmp_path: Path, jars: list[Path]
) -> None:
    broker = Kafka(tmp_path / "kafka", jars)
    seen = Seen()
    try:
        await asyncio.to_thread(broker.start)
        own = await new_topics(KafkaSettings(bootstrap_servers=broker.address), partitions=1)
        async with AIOKafkaProducer(**connection.client_options(own)) as producer:
            for value in (b"before", b"spoilt", b"behind"):
                await producer.send_and_wait(own.topic_new, value)
        await asyncio.to_thread(broker.stop)
        [log] = broker.folder.glob(f"data/{own.topic_new}-0/*.log")
        kept = log.read_bytes()
        log.write_bytes(kept.replace(b"spoilt", b"sp\xffilt"))
        await asyncio.to_thread(broker.start)
        async with consuming(settings_of(own), seen):
            await until(lambda: len(seen) == 3)
    finally:
        broker.remove()
    assert seen.values == [b"before", None, b"behind"]
    assert [record.unread for record in seen] == [False, True, False]


async def test_only_so_many_events_rest_at_once(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    resting = list[int]()

    async def handle(record: Record, place: Place) -> None:
        resting.append(record.offset)
        await place.rest(600.0)

    await send(own, MAX_RESTING + 20)
    settings = settings_of(own, max_ahead=2 * MAX_RESTING, stop_deadline_s=2.0)
    async with consuming(settings, handle):
        await until(lambda: len(resting) == MAX_RESTING + 8)
        await asyncio.sleep(1)
        assert len(resting) == MAX_RESTING + 8, "beside them only those with a place in flight"


async def test_an_event_whose_handling_raises_is_tried_again(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    attempts = Counter[int]()

    async def fail_twice(record: Record, _: Place) -> None:
        attempts[record.offset] += 1
        if record.offset == 3 and attempts[3] < 3:
            raise RuntimeError("not this time")

    await send(own, 10)
    async with consuming(settings_of(own), fail_twice):
        await until(lambda: attempts.total() == 12)
    assert await committed(own, 1) == 10


async def test_a_consumer_that_dies_is_built_anew_and_goes_on_where_it_was(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    done = Counter[int]()
    dying = list[asyncio.Task[object]]()

    async def die_at_the_tenth(record: Record, _: Place) -> None:
        if record.offset == 10 and not dying:
            await until(lambda: all(done[offset] for offset in range(10)))
            assert consumer._app is not None
            dying.append(asyncio.create_task(consumer._app.stop()))
            await asyncio.Event().wait()
        done[record.offset] += 1

    await send(own, 50)
    async with consuming(settings_of(own), die_at_the_tenth) as consumer:
        await until(lambda: len(done) == 50)
    assert [done[offset] for offset in range(11)] == [1] * 11, "what was done before was committed"
    assert await committed(own, 1) == 50


async def test_a_topic_that_is_not_there_is_told_and_read_once_it_is_beside_one_that_is(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "METADATA_AGE_S", 1.0)
    existing = await topics(partitions=1)
    own = existing.model_copy(update={"topic_new": existing.topic_new + "-later"})
    seen = SeenByTopic()
    async with consuming(settings_of(own), seen) as consumer:
        await until(lambda: consumer.assigned)
        assert topics_told_of(caplog) == [own.topic_new]
        await send(own, 3, own.topic_backfill)
        await until(lambda: seen == {own.topic_backfill: [0, 1, 2]})
        caplog.clear()
        await create_topics(own, [own.topic_new], 1)
        await send(own, 10)
        await until(lambda: seen[own.topic_new] == list(range(10)), timeout_s=20)
        assert topics_told_of(caplog) == []


@pytest.mark.parametrize("operations", [(READ, DESCRIBE), (READ,)], ids=["hidden", "shown"])
async def test_a_topic_that_may_not_be_read_is_told_and_read_once_it_may_be_beside_one_that_may(
    secured: GuardedKafka,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    operations: tuple[int, ...],
) -> None:
    monkeypatch.setattr(consumer_module, "METADATA_AGE_S", 1.0)
    monkeypatch.setattr(faust_app, "REFUSED_FOR_S", 1.0)
    own = await new_topics(secured.client_settings())
    seen = SeenByTopic()

    await send(own, 10)
    async with AsyncExitStack() as stack:
        async with forbidden(own, own.topic_new, *operations):
            await stack.enter_async_context(consuming(settings_of(own), seen))
            await until(lambda: topics_told_of(caplog), timeout_s=20)
            await send(own, 3, own.topic_backfill)
            await until(lambda: seen == {own.topic_backfill: [0, 1, 2]}, timeout_s=20)
            assert set(topics_told_of(caplog)) == {own.topic_new}
        await until(lambda: seen[own.topic_new] == list(range(10)), timeout_s=20)
    assert await committed(own, 1) == 10


def topics_told_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Those of which a warning says that no events come from them."""
    return re.findall(r"No events come from (\S+),", caplog.text)


async def test_other_workers_are_not_told_of_where_no_topic_is_there(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture
) -> None:
    existing = await topics(partitions=1)
    absent = {name: f"{existing.group}-{name}" for name in ("topic_new", "topic_backfill")}
    async with consuming(settings_of(existing.model_copy(update=absent)), Seen()) as consumer:
        await until(lambda: consumer.assigned)
    assert caplog.text.count("No events come from") == 2
    assert "other workers" not in caplog.text


async def test_a_topic_that_is_assigned_is_there_before_this_worker_has_heard_of_it(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(App, "knows", lambda *_: False)
    async with consuming(settings_of(await topics(partitions=1)), Seen()) as consumer:
        await until(lambda: consumer.assigned)
    assert "No events come from" not in caplog.text


async def test_a_worker_that_its_group_refuses_joins_once_it_may(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture
) -> None:
    own = await topics(partitions=1)
    seen = Seen()

    await send(own, 10)
    async with AIOKafkaConsumer(
        own.topic_new,
        **connection.client_options(own),
        group_id=own.group,
        enable_auto_commit=False,
        partition_assignment_strategy=[RangePartitionAssignor],
    ) as stranger:
        await until(stranger.assignment)
        async with consuming(settings_of(own), seen) as consumer:
            await until(lambda: consumer._app)
            await until(lambda: consumer._app is None, timeout_s=20)
            assert not consumer.assigned
            assert "check that no other consumers are in it (TIMBRE_KAFKA__GROUP)" in caplog.text
            await stranger.stop()
            await until(lambda: len(seen) == 10, timeout_s=20)


async def test_a_session_timeout_that_the_brokers_do_not_allow_is_told(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture
) -> None:
    own = await topics(partitions=1)
    an_hour = own.model_copy(update={"session_timeout_s": 3600.0})

    async with consuming(Settings(kafka=an_hour), Seen()):
        await until(lambda: "that TIMBRE_KAFKA__SESSION_TIMEOUT_S lies" in caplog.text)


async def test_a_worker_that_asks_for_nothing_for_long_stays_in_its_group(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "METADATA_AGE_S", 1.0)
    # Where the worker asks for no other; faust's own is 1000 s.
    monkeypatch.setattr(consumer_module, "App", partial(App, broker_max_poll_interval=1.0))
    existing = await topics(partitions=1)
    names = ("topic_new", "topic_backfill")
    own = existing.model_copy(update={name: getattr(existing, name) + "-later" for name in names})
    taking_results = asyncio.Event()
    seen = Seen()

    async def handle(record: Record, _: Place) -> None:
        await taking_results.wait()
        seen.append(record)

    async with consuming(settings_of(own), handle) as consumer:
        await until(lambda: consumer.assigned)
        await asyncio.sleep(2.5)  # without partitions
        await create_topics(own, [own.topic_new, own.topic_backfill], 1)
        for name in names:
            await send(own, 100, getattr(own, name))
        await until(lambda: consumer.in_flight)
        await asyncio.sleep(3)  # with all that it may hold
        taking_results.set()
        await until(lambda: len(seen) == 200, timeout_s=20)


@pytest.mark.parametrize("refusal", [GroupLoadInProgressError, NotCoordinatorForGroupError])
async def test_offsets_that_a_broker_does_not_tell_are_not_taken_for_missing(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch, refusal: type[BrokerResponseError]
) -> None:
    """So answers one that has just begun to coordinate the group, and one that no longer does."""
    own = await topics(partitions=1)
    send_to_broker = AIOKafkaClient.send
    seen, heals_s = Seen(), float("inf")

    async def refuse(client: Any, node: int, request: Any, **options: Any) -> Any:
        nonlocal heals_s
        if isinstance(request, OffsetFetchRequest) and time.monotonic() < heals_s:
            heals_s = min(heals_s, time.monotonic() + 1)
            return OffsetFetchResponse_v3(throttle_time_ms=0, topics=[], error_code=refusal.errno)
        return await send_to_broker(client, node, request, **options)

    await send(own, 10)
    async with consuming(settings_of(own), seen):
        await until(lambda: len(seen) == 10)
    monkeypatch.setattr(AIOKafkaClient, "send", refuse)
    async with consuming(settings_of(own), seen):
        await send(own, 1)
        await until(lambda: len(seen) > 10)
    assert seen.offsets[10:] == [10]


async def test_what_a_poll_brings_that_began_before_a_rebalance_is_not_passed_over(
    topics: MakeTopics, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await topics(partitions=1)
    seen, to_come = Seen(), list[int]()
    seek = FaustConsumer.perform_seek

    async def seek_as_events_come(consumer: FaustConsumer) -> None:
        if to_come:
            await send(own, to_come.pop())
            await asyncio.sleep(0.5)
        await seek(consumer)

    monkeypatch.setattr(FaustConsumer, "perform_seek", seek_as_events_come)
    async with consuming(settings_of(own), seen) as consumer:
        await until(lambda: consumer.assigned)
        assert consumer._app is not None
        faust_consumer: Any = consumer._app.consumer
        thread = faust_consumer._thread
        coordinator = thread._ensure_consumer()._coordinator
        await asyncio.sleep(0.2)  # a poll waits, for up to a second
        to_come.append(10)
        thread.thread_loop.call_soon_threadsafe(coordinator.request_rejoin)
        await until(lambda: seen.offsets == list(range(10)), timeout_s=10)


async def test_a_topic_that_is_deleted_holds_up_no_other(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture
) -> None:
    own = await topics(partitions=1)
    deleted = asyncio.Event()

    async def handle(record: Record, _: Place) -> None:
        if record.topic == own.topic_backfill:
            await deleted.wait()

    async def all_committed() -> bool:
        return await committed(own, 1) == 10

    await send(own, 3, own.topic_backfill)
    async with consuming(settings_of(own), handle) as consumer, administering(own) as admin:

        async def is_away() -> bool:
            return own.topic_backfill not in await admin.list_topics()

        await until(lambda: consumer.in_flight == 3)
        await admin.delete_topics([own.topic_backfill])
        await until(is_away)
        deleted.set()
        await until(lambda: "OffsetCommit failed" in caplog.text)
        await send(own, 10)
        await until(all_committed, timeout_s=20)


CONSUMER_THAT_STAYS = """
import asyncio, sys
from worker.app import run_worker
from worker.kafka.consumer import Consumer
from worker.settings import load

async def stay():
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass

async def die(app):
    await app.start()

async def take_down(self, app):
    await stay()

Consumer._run_app = staticmethod(die)
Consumer._take_down = take_down
sys.exit(run_worker(load()))
"""


async def test_a_process_whose_consumer_cannot_be_taken_down_ends_with_status_1(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    settings = environment(own, redis_url, redis_prefix, TIMBRE_WORKER__STOP_DEADLINE_S="2")
    log = tmp_path / "worker.log"
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CONSUMER_THAT_STAYS, env=settings, stdout=output, stderr=output
        )
        try:
            status = await asyncio.wait_for(process.wait(), timeout=60)
        finally:
            if process.returncode is None:
                process.kill()
    assert status == 1, log.read_text()
    assert "died and could not be taken down; the process ends" in log.read_text()


async def test_a_topic_made_anew_while_there_is_lag_is_read_from_its_beginning(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    new = [b"new %d" % number for number in range(20)]
    seen = list[bytes | None]()

    async def handle(record: Record, _: Place) -> None:
        if record.value not in new:
            await asyncio.Event().wait()
        seen.append(record.value)

    await send(own, 30)  # more than come anew, so that Kafka can tell
    async with consuming(settings_of(own), handle) as consumer:
        await until(lambda: consumer.in_flight)
        async with administering(own) as admin:
            await admin.delete_topics([own.topic_new])
            await create_topics(own, [own.topic_new], 1)
        async with AIOKafkaProducer(**connection.client_options(own)) as producer:
            for value in new:
                # One by one, or batches that wait for a leader could change places.
                await producer.send_and_wait(own.topic_new, value)
        await until(lambda: new[-1] in seen, timeout_s=30)

    assert seen == new
    assert await committed(own, 1) == 20


async def test_what_kafka_gives_again_from_an_earlier_offset_is_read_again(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture
) -> None:
    own = await topics(partitions=1)
    seen = Seen()

    async with consuming(settings_of(own), seen) as consumer:
        await send(own, 10)
        await until(lambda: len(seen) == 10)
        app: Any = consumer._app
        reader = app.consumer._thread
        # As where Kafka refuses an offset that a log restored with fewer events doesn't reach.
        await reader.call_thread(reader._consumer.seek, TopicPartition(own.topic_new, 0), 4)
        await until(lambda: len(seen) == 16)

    assert sorted(seen.offsets) == sorted([*range(10), *range(4, 10)])
    assert "is read again from offset 4 on" in caplog.text
    assert await committed(own, 1) == 10


async def test_a_partition_that_begins_again_while_it_is_paused_is_not_paused_for_good(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    let_go = asyncio.Event()
    seen = list[int]()

    async def handle(record: Record, _: Place) -> None:
        await let_go.wait()
        seen.append(record.offset)

    await send(own, 100)
    async with consuming(settings_of(own), handle) as consumer:
        await until(lambda: any(p.paused for p in consumer._partitions.values()))
        (partition,) = consumer._partitions.values()
        await until(lambda: partition.last_offset == 99)
        await consumer._take(FetchedBeforeThePause(partition.waiting[0]))
        let_go.set()
        await send(own, 10)
        await until(lambda: seen[-10:] == list(range(100, 110)), timeout_s=20)


class FetchedBeforeThePause:
    def __init__(self, *events: object) -> None:
        self._events = events

    def noack(self) -> "FetchedBeforeThePause":
        return self

    async def events(self) -> AsyncIterator[object]:
        for event in self._events:
            yield event


async def test_events_of_transactions_are_read_at_once_whatever_becomes_of_them(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    seen = Seen()

    async with (
        consuming(settings_of(own), seen),
        AIOKafkaProducer(**connection.client_options(own), transactional_id=own.group) as producer,
    ):
        await producer.begin_transaction()
        await producer.send_and_wait(own.topic_new, b"aborted")
        await producer.abort_transaction()
        await producer.begin_transaction()
        await producer.send_and_wait(own.topic_new, b"left open")
        await send(own, 1)
        await until(lambda: seen.values == [b"aborted", b"left open", b"0"], timeout_s=20)
    assert await committed(own, 1) == 4, "with the marker of the first"


async def test_behind_millions_of_events_that_expired_it_goes_on_in_bounded_memory(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=1)
    seen = Seen()

    await send(own, 10)
    async with consuming(settings_of(own), seen):
        await until(lambda: len(seen) == 10)
    for _ in range(MILLIONS):
        await send_empty(own, 1_000_000)
    begin = MILLIONS * 1_000_000 + 10
    async with administering(own) as admin:
        await admin.delete_records({TopicPartition(own.topic_new, 0): RecordsToDelete(begin)})
    await send(own, 10)
    tracemalloc.start()
    try:
        async with consuming(settings_of(own), seen):
            await until(lambda: len(seen) == 20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert seen.offsets[10:] == list(range(begin, begin + 10))
    assert await committed(own, 1) == begin + 10
    assert peak_bytes < 50 * MIB


async def send_empty(own: KafkaSettings, count: int) -> None:
    """Send events of nothing at all, as many a batch as are asked for."""
    async with AIOKafkaProducer(
        **connection.client_options(own), compression_type="zstd", max_batch_size=64 * MIB
    ) as producer:
        batch = producer.create_batch()
        for _ in range(count):
            batch.append(key=None, value=None, timestamp=0)
        await (await producer.send_batch(batch, own.topic_new, partition=0))


async def test_each_worker_that_joins_has_partitions_while_there_are_as_many(
    topics: MakeTopics,
) -> None:
    settings = settings_of(await topics(partitions=4))
    workers = list[Consumer]()

    def shared(shares: list[int]) -> bool:
        return sorted(len(list(worker.positions())) for worker in workers) == shares

    async with AsyncExitStack() as stack:
        for shares in ([8], [4, 4], [2, 2, 4], [2, 2, 2, 2]):  # of two topics
            workers.append(await stack.enter_async_context(consuming(settings, Seen())))
            await until(partial(shared, shares), timeout_s=20)


async def test_workers_that_join_and_leave_lose_nothing(topics: MakeTopics) -> None:
    own = await topics(partitions=6)
    seen = set[bytes | None]()

    async def handle(record: Record, _: Place) -> None:
        await asyncio.sleep(random.uniform(0, 0.1))
        seen.add(record.value)

    settings = settings_of(own)
    await send(own, 600)
    async with consuming(settings, handle):
        for _ in range(2):
            async with consuming(settings, handle):
                await asyncio.sleep(3)
        await until(lambda: len(seen) == 600)
    assert await committed(own, 6) == 600

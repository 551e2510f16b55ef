import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.cluster import ClusterMetadata
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import SecretStr

from model.bundle import Bundle
from tests.broker import committed
from tests.conftest import MakeTopics
from tests.integration.worker.test_consumer import Seen, consuming, send, settings_of
from tests.unit.worker.small_network import SmallNet
from tests.unit.worker.test_batch import MARK, Hanging, Tracks, batcher_of, noise
from tests.waiting import until
from tests.web import answering
from worker import health
from worker.app import Worker
from worker.batch.batcher import Batcher
from worker.errors import DeviceHung, SettingsInvalid
from worker.health import Health, HttpServer
from worker.kafka import connection, lag
from worker.kafka import consumer as consumer_module
from worker.kafka.consumer import Consumer, Handle
from worker.kafka.lag import LagProbe
from worker.kafka.place import Place
from worker.metrics import Metrics
from worker.record import Record
from worker.settings import (
    BatchSettings,
    FetchSettings,
    HttpSettings,
    KafkaSettings,
    RedisSettings,
    Settings,
)

STALLED_AFTER_S = 1.0


@pytest.fixture
async def batcher() -> AsyncIterator[Batcher]:
    async with batcher_of(SmallNet()) as batcher:
        yield batcher


@pytest.fixture(autouse=True)
def _measure_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag, "LAG_INTERVAL_S", 0.2)


def impatient(own: KafkaSettings, **worker: object) -> Settings:
    """A worker that is soon stalled, whether events are worked on or not."""
    deadlines = {"track_deadline_s": 0.8 * STALLED_AFTER_S, "backoff_max_s": 0.2 * STALLED_AFTER_S}
    stops = {"stalled_after_s": STALLED_AFTER_S, "stop_deadline_s": 2.0}
    return settings_of(own, **stops | deadlines | worker)


@asynccontextmanager
async def watched(
    settings: Settings, handle: Handle, metrics: Metrics | None = None
) -> AsyncIterator[Health]:
    """A consumer with all that its health is told by."""
    async with (
        batcher_of(SmallNet()) as batcher,
        consuming(settings, handle) as consumer,
        LagProbe(settings, consumer, metrics or Metrics()) as probe,
    ):
        yield Health(settings.worker, probe, consumer, batcher)


async def hang(_: Record, __: Place) -> None:
    """What a handler does that never ends."""
    await asyncio.Event().wait()


def server_of(batcher: Batcher, **http: object) -> HttpServer:
    """The port of a worker that consumes nothing."""
    settings, metrics = settings_of(KafkaSettings()), Metrics()
    consumer = Consumer(settings, Seen(), metrics)
    state = Health(settings.worker, LagProbe(settings, consumer, metrics), consumer, batcher)
    return HttpServer(HttpSettings.model_validate({"port": 0, **http}), metrics, state)


async def test_a_worker_is_live_while_it_progresses_and_not_when_it_hangs_with_lag(
    topics: MakeTopics,
) -> None:
    own = await topics(partitions=2)
    settings = impatient(own)
    metrics = Metrics()
    hang = asyncio.Event()
    handled = 0

    async def handle(record: Record, place: Place) -> None:
        nonlocal handled
        handled += 1
        if hang.is_set():
            await asyncio.Event().wait()

    async with watched(settings, handle, metrics) as state:
        await until(lambda: state.why_not_ready() is None)

        await send(own, 20)
        await until(lambda: handled == 20)
        await until(lambda: state.probe.lag == 0)
        await asyncio.sleep(2 * STALLED_AFTER_S)
        assert state.why_not_live() is None, "idle without lag is healthy"

        hang.set()
        await send(own, 5)
        await until(lambda: state.probe.lag == 5)
        await until(lambda: state.why_not_live() is not None)
        assert "5 events of lag" in (state.why_not_live() or "")
        lags = [
            metrics.registry.get_sample_value(
                "timbre_consumer_lag", {"topic": own.topic_new, "partition": str(number)}
            )
            or 0
            for number in range(2)
        ]
        assert sum(lags) == 5

        state.stopping = True
        assert state.why_not_ready() == "stopping"


async def test_an_event_sent_in_a_transaction_leaves_no_lag_behind(topics: MakeTopics) -> None:
    own = await topics(partitions=2)
    seen = asyncio.Event()
    handled = list[int]()

    async def handle(record: Record, place: Place) -> None:
        await seen.wait()
        handled.append(record.offset)

    async with (
        consuming(settings_of(own), handle) as consumer,
        LagProbe(settings_of(own), consumer, Metrics()) as probe,
    ):
        await until(lambda: consumer.assigned)
        async with (
            AIOKafkaProducer(
                **connection.client_options(own), transactional_id=own.group
            ) as producer,
            producer.transaction(),
        ):
            await producer.send_and_wait(own.topic_new, b"an event", partition=0)
        await until(lambda: probe.lag > 0)
        seen.set()
        await until(lambda: probe.lag == 0)
        assert handled == [0]
    assert await committed(own, 2) == 1, "the marker lies behind"

    async with (
        consuming(settings_of(own), handle) as consumer,
        LagProbe(settings_of(own), consumer, Metrics()) as probe,
    ):
        await until(lambda: consumer.assigned)
        for _ in range(20):
            await asyncio.sleep(0.1)
            assert probe.lag == 0, "nor after a restart"
        assert handled == [0]


class Dying(Consumer):
    """A consumer whose life ends soon after it has partitions."""

    def _make_app(self) -> Any:
        app = super()._make_app()
        stopping = list[asyncio.Task[None]]()

        async def die() -> None:
            await asyncio.sleep(0.5)
            await app.stop()

        async def on_assigned(*_: object, **__: object) -> None:
            stopping.append(asyncio.create_task(die()))

        app.on_partitions_assigned.connect(on_assigned, weak=False)
        return app


async def test_an_event_that_is_slow_may_take_until_its_deadline(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    settings = impatient(own, track_deadline_s=3.0)
    started_s = list[float]()

    async def handle(record: Record, place: Place) -> None:
        started_s.append(time.monotonic())
        await asyncio.Event().wait()

    async with watched(settings, handle) as state:
        await until(lambda: state.consumer.assigned)
        await send(own, 1)
        await until(lambda: state.probe.lag == 1 and state.consumer.in_flight == 1)
        while time.monotonic() - started_s[0] < 2:
            assert state.why_not_live() is None, "it is within its deadline"
            await asyncio.sleep(0.1)
        await until(lambda: state.why_not_live() is not None, timeout_s=5)


async def test_a_worker_is_live_while_the_tracks_of_an_event_end_one_after_another(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tmp_path: Path
) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        times = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": '"e"'}
        answer = web.StreamResponse(headers=times | {"Content-Length": "100000"})
        await answer.prepare(request)
        while True:
            await answer.write(b"x")
            await asyncio.sleep(0.05)

    own = await topics(partitions=1)
    notified = [
        {
            "eventName": "s3:ObjectCreated:Put",
            "s3": {"bucket": {"name": "b-1"}, "object": {"key": k}},
        }
        for k in "abcdefgh"
    ]
    async with answering(drip) as s3_endpoint:
        settings = impatient(own, track_deadline_s=3.0).model_copy(
            update={
                "fetch": FetchSettings(
                    s3_endpoint=s3_endpoint, stall_timeout_s=2.2, spool_dir=tmp_path
                ),
                "redis": RedisSettings(url=SecretStr(redis_url), prefix=redis_prefix),
                "batch": BatchSettings(device="cpu"),
                "http": HttpSettings(port=0),
            }
        )
        async with (
            Worker(settings, Bundle.load("fast")) as worker,
            aiohttp.ClientSession(f"http://127.0.0.1:{worker.http.port}") as http,
        ):
            work = asyncio.create_task(worker.run())
            await until(lambda: worker.consumer.assigned)
            async with AIOKafkaProducer(**connection.client_options(own)) as producer:
                await producer.send_and_wait(
                    own.topic_new, json.dumps({"Records": notified}).encode()
                )
            await until(lambda: worker.consumer.in_flight == 1)
            while worker.consumer.in_flight:
                async with http.get("/health/live") as answer:
                    assert answer.status == 200, await answer.text()
                await asyncio.sleep(0.1)
            worker.consumer.stop()
            await work


async def test_an_event_may_begin_after_others_have_rested_for_long(topics: MakeTopics) -> None:
    own = await topics(partitions=1)
    settings = impatient(own, max_in_flight=1, track_deadline_s=2.0)
    done = list[int]()

    async def handle(record: Record, place: Place) -> None:
        await asyncio.sleep(1.5)
        if record.offset < 2:
            await place.rest(60.0)
        done.append(record.offset)

    async with watched(settings, handle) as state:
        await until(lambda: state.consumer.assigned)
        await send(own, 3)
        async with asyncio.timeout(30):
            while not done:
                assert state.why_not_live() is None, "a rest is the end of an attempt"
                await asyncio.sleep(0.1)


async def test_a_worker_whose_consumer_dies_again_and_again_is_not_live(
    topics: MakeTopics, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "RESTART_BACKOFF_S", (0.2, 0.4))
    own = await topics(partitions=2)
    metrics = Metrics()

    def restarts() -> float:
        return metrics.registry.get_sample_value("timbre_consumer_restarts_total") or 0

    settings = impatient(own, rebalance_grace_s=0.1, stop_deadline_s=5.0)
    consumer = Dying(settings, hang, metrics)
    running = asyncio.create_task(consumer.run())
    async with LagProbe(settings, consumer, metrics) as probe:
        state = Health(settings.worker, probe, consumer, batcher)
        assert state.why_not_live() is None, "it waits for its first assignment"
        await until(lambda: restarts() >= 2)
        assert state.why_not_live() is None, "there is nothing to be done"

        await send(own, 5)
        await until(lambda: state.why_not_live() is not None)
        after = restarts() + 2
        while restarts() < after:
            assert "5 events of lag" in (state.why_not_live() or ""), "not by a new start"
            await asyncio.sleep(0.05)
    consumer.stop()
    await running


async def test_a_worker_without_partitions_is_live_while_the_others_lag(
    topics: MakeTopics, batcher: Batcher
) -> None:
    own = await topics(partitions=1)
    settings = impatient(own, rebalance_grace_s=0.1)

    await send(own, 5)
    async with (
        consuming(settings, hang) as first,
        consuming(settings, hang) as second,
        consuming(settings, hang) as third,
        LagProbe(settings, first, Metrics()) as one,
        LagProbe(settings, second, Metrics()) as two,
        LagProbe(settings, third, Metrics()) as three,
    ):
        states = [
            Health(settings.worker, probe, consumer, batcher)
            for probe, consumer in ((one, first), (two, second), (three, third))
        ]

        def lags() -> list[int]:
            return sorted(probe.lag for probe in (one, two, three))

        await until(lambda: first.assigned and second.assigned and third.assigned)
        await until(lambda: lags() == [0, 0, 5])
        await asyncio.sleep(3 * STALLED_AFTER_S)
        assert [state.why_not_live() is None for state in states].count(True) == 2


async def test_a_worker_is_not_ready_while_lag_cannot_be_measured_and_it_is_after_any_fault(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that is being replaced is not there for a while."""
    own, options, metrics = await topics(), connection.client_options, Metrics()
    there = False

    def certificate_first(settings: KafkaSettings) -> dict[str, Any]:
        if not there:
            raise SettingsInvalid("not there")
        return options(settings)

    def measured_s() -> float:
        name = "timbre_consumer_lag_measured_timestamp_seconds"
        return metrics.registry.get_sample_value(name) or 0.0

    await send(own, 10)
    async with consuming(settings_of(own), hang) as consumer, batcher_of(SmallNet()) as batcher:
        await until(lambda: consumer.assigned)
        monkeypatch.setattr(connection, "client_options", certificate_first)
        async with LagProbe(settings_of(own), consumer, metrics) as probe:
            state = Health(impatient(own).worker, probe, consumer, batcher)
            began_s = measured_s()
            assert state.why_not_ready() is None, "it has just begun to ask"
            await until(lambda: "could not be asked" in (state.why_not_ready() or ""))
            assert state.why_not_live() is None, "a new start would not bring Kafka back"
            assert "Consumer lag can't be measured now (SettingsInvalid)" in caplog.text
            assert measured_s() == began_s
            there = True
            await until(lambda: probe.lag == 10, timeout_s=20)
            assert "could not be asked" not in (state.why_not_ready() or "")
            assert began_s + STALLED_AFTER_S < measured_s() <= time.time()


async def test_partitions_beside_one_without_a_leader_go_on_and_their_lag_is_measured(
    topics: MakeTopics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that holds the one with what lag it had would be taken for stalled."""
    monkeypatch.setattr(lag, "PROBE_TIMEOUT_S", 2.0)
    own = await topics(partitions=2)
    leader = ClusterMetadata.leader_for_partition
    has_leader, metrics = True, Metrics()
    let_go = asyncio.Event()
    done = Counter[int]()

    def no_leader(cluster: ClusterMetadata, tp: TopicPartition) -> int | None:
        return -1 if tp.partition == 1 and not has_leader else leader(cluster, tp)

    async def handle(record: Record, _: Place) -> None:
        await let_go.wait()
        done[record.partition] += 1

    async def send_to(partition: int) -> None:
        async with AIOKafkaProducer(**connection.client_options(own)) as producer:
            await producer.send_and_wait(own.topic_new, b"more", partition=partition)

    def measured() -> list[bool]:
        """Whether each of the partitions has its metric."""
        label = {"topic": own.topic_new}
        samples = (
            metrics.registry.get_sample_value("timbre_consumer_lag", label | {"partition": number})
            for number in "01"
        )
        return [sample is not None for sample in samples]

    await send(own, 20)
    async with watched(impatient(own), handle, metrics) as state:
        await until(lambda: state.probe.lag == 20)
        assert measured() == [True, True]
        monkeypatch.setattr(ClusterMetadata, "leader_for_partition", no_leader)
        has_leader = False
        let_go.set()
        await until(lambda: state.probe.lag == 0, timeout_s=15)
        await asyncio.sleep(2 * STALLED_AFTER_S)
        assert state.why_not_live() is None
        assert measured() == [True, False]
        assert "Consumer lag can't be measured now" in caplog.text
        before = done.copy()
        await send_to(0)
        await until(lambda: done - before == {0: 1}, timeout_s=20)
        has_leader = True
        await send_to(1)
        await until(lambda: done - before == {0: 1, 1: 1}, timeout_s=20)
        await until(lambda: measured() == [True, True], timeout_s=20)


async def test_a_worker_on_whose_device_batches_hang_is_not_live() -> None:
    network = Hanging()

    async with batcher_of(network, timeout_s=0.3, max_stuck=1) as batcher:
        async with (
            server_of(batcher) as server,
            aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as http,
        ):
            async with http.get("/health/live") as answer:
                assert answer.status == 200
                assert await answer.json() == {"status": "ok", "reason": None}
            with pytest.raises(DeviceHung):
                await Tracks(batcher).send("hung", noise(1, first=MARK))
            async with http.get("/health/live") as answer:
                assert answer.status == 503
                trouble = await answer.json()
                assert trouble["status"] == "unavailable"
                assert "device is lost" in trouble["reason"]
        network.release.set()


async def test_the_port_serves_metrics_and_health_and_nothing_else(topics: MakeTopics) -> None:
    settings = settings_of(await topics())
    async with (
        watched(settings, Seen()) as state,
        HttpServer(HttpSettings(port=0), Metrics(), state) as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as http,
    ):
        await until(lambda: state.consumer.assigned)
        for path, status in {
            "/metrics": 200,
            "/health/live": 200,
            "/health/ready": 200,
            "/": 404,
            "/table/": 404,
            "/stats/": 404,
            "/graph": 404,
        }.items():
            async with http.get(path) as answer:
                assert answer.status == status, path
        async with http.get("/metrics") as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE_LATEST  # or it is not scraped
        async with http.post("/health/live") as answer:
            assert answer.status == 405
        state.batcher._last_batch_hung = True
        for path, status in {"/health/live": 200, "/health/ready": 503}.items():
            async with http.get(path) as answer:
                assert answer.status == status, path


async def test_connections_that_never_ask_leave_room_for_others(batcher: Batcher) -> None:
    async with server_of(batcher) as server:
        before = psutil.Process().num_fds()
        slow = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        for _ in range(5 * health.MAX_CONNECTIONS):
            slow.append(await asyncio.open_connection("127.0.0.1", server.port))
            slow[-1][1].write(b"GET /health/live HTTP/1.1\r\nX-Slow: ")
        await until(slow[0][0].at_eof)
        assert not slow[-1][0].at_eof()
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as http,
            http.get("/health/live") as answer,
        ):
            assert answer.status == 200
        held = psutil.Process().num_fds() - before - len(slow)
        assert held <= health.MAX_CONNECTIONS + 8
        for _, writer in slow:
            writer.close()


async def test_who_does_not_read_the_answer_holds_up_no_stop(batcher: Batcher) -> None:
    async with server_of(batcher) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)
        web_server = server._runner.server
        assert web_server is not None
        await until(lambda: web_server.connections)
        transport = web_server.connections[0].transport
        assert transport is not None
        await until(lambda: transport.get_write_buffer_size() > 64 * 1024)
        stopped_s = time.monotonic()
    assert time.monotonic() - stopped_s < 10
    writer.transport.abort()
    await asyncio.sleep(0)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
async def test_a_port_that_cannot_be_had_is_a_fault_of_the_settings(
    batcher: Batcher, host: str
) -> None:
    async with server_of(batcher) as first:
        second = server_of(batcher, host=host, port=first.port)
        with pytest.raises(SettingsInvalid, match=f"on {host}:{first.port} .*TIMBRE_HTTP__"):
            await second.__aenter__()

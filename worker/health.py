"""The worker's own port: `/metrics`, `/health/live`, `/health/ready`, and nothing else.

Live means progress while there is lag: a worker whose consumer died silently answers HTTP, has
events to work on, and finishes none. Lag is therefore asked of the broker, by a client of its own.
An event that is worked on has until its own deadline, so that a slow one ends as a dead letter and
not with the worker.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Self

from aiohttp import web
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client import CONTENT_TYPE_LATEST

from worker.batch.batcher import Batcher
from worker.errors import SettingsInvalid
from worker.kafka import connection
from worker.kafka.consumer import Consumer
from worker.metrics import Metrics
from worker.settings import HttpSettings, Settings, WorkerSettings

log = logging.getLogger(__name__)

LAG_INTERVAL_S = 5.0
PROBE_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 1.0
# Each takes a descriptor, and fetches need some as well.
MAX_CONNECTIONS = 64
READ_BYTES = 1024  # the broker gives a whole batch of events where the first is larger


class LagProbe:
    """Measures how far behind the assigned partitions are, and whether anything moves.

    `lag` is the number of events behind the partitions' ends, unfinished ones included.
    """

    def __init__(self, settings: Settings, consumer: Consumer, metrics: Metrics) -> None:
        self._settings = settings
        self._consumer = consumer
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None
        self._shown: set[tuple[str, int]] = set()
        self.lag = 0
        self._lagging_since_s: float | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="consumer lag")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def stalled_s(self) -> float:
        """Seconds for which there was lag and no progress; 0 while all is well."""
        if self._lagging_since_s is None:
            return 0.0
        return time.monotonic() - max(self._lagging_since_s, self._consumer.last_progress_s)

    async def _run(self) -> None:
        while True:
            try:
                await self._watch()
            except (KafkaError, OSError, TimeoutError) as error:
                log.warning("Consumer lag can't be measured now (%s)", type(error).__name__)
            await asyncio.sleep(LAG_INTERVAL_S)

    async def _watch(self) -> None:
        group = AIOKafkaConsumer(
            **connection.client_options(self._settings.kafka),
            group_id=self._settings.kafka.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # as the worker's own consumer
            max_partition_fetch_bytes=READ_BYTES,
        )
        try:
            await group.start()
            while True:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    self._note(await self._measure(group))
                await asyncio.sleep(LAG_INTERVAL_S)
        finally:
            await group.stop()  # also where it could not start

    async def _measure(self, group: AIOKafkaConsumer) -> dict[tuple[str, int], int]:
        positions = {(topic, number): at for topic, number, at in self._consumer.positions()}
        partitions = [TopicPartition(*place) for place in positions]
        if not partitions:
            return {}
        group.assign(partitions)
        ends = await group.end_offsets(partitions)
        lags = await asyncio.gather(
            *(self._behind(group, tp, positions[tp], ends[tp]) for tp in partitions)
        )
        return dict(zip(positions, lags, strict=True))

    @staticmethod
    async def _behind(group: AIOKafkaConsumer, tp: TopicPartition, at: int | None, end: int) -> int:
        """Offsets from the first event at or behind `at` to the end."""
        if at is None:  # nothing read since the assignment: the group's offset tells
            at = await group.committed(tp)
        if at is None:
            at = (await group.beginning_offsets([tp]))[tp]
        if at >= end:
            return 0
        # What lies there may be no event: a transaction ends with a marker, and events expire.
        group.seek(tp, at)
        found = await group.getmany(tp, timeout_ms=round(READ_TIMEOUT_S * 1000), max_records=1)
        first: int = found[tp][0].offset if found else await group.position(tp)
        return max(0, end - first)

    def _note(self, lags: dict[tuple[str, int], int]) -> None:
        for topic, number in self._shown - lags.keys():
            self._metrics.consumer_lag.remove(topic, str(number))
        for (topic, number), lag in lags.items():
            self._metrics.consumer_lag.labels(topic, str(number)).set(lag)
        self._shown = set(lags)
        self.lag = sum(lags.values())
        if self.lag == 0:
            self._lagging_since_s = None
        elif self._lagging_since_s is None:
            self._lagging_since_s = time.monotonic()


@dataclass
class Health:
    """What makes the worker live and ready; each reason is a sentence, None means all is well."""

    settings: WorkerSettings
    probe: LagProbe
    consumer: Consumer
    batcher: Batcher
    stopping: bool = False

    def why_not_live(self) -> str | None:
        if not self.batcher.live:
            return "the device is lost: batches hang on it or fail"
        stalled_s = self.probe.stalled_s()
        if stalled_s > self._patience_s():
            return f"no progress for {stalled_s:.0f} s with {self.probe.lag} events of lag"
        return None

    def _patience_s(self) -> float:
        """Seconds without progress that are in order.

        Every attempt at a track begins with some progress (a track before it ended or rests), so
        where one is worked on, progress may be as far off as the end of that attempt.
        """
        worker = self.settings
        if self.consumer.in_flight == 0:
            return worker.stalled_after_s
        return max(worker.stalled_after_s, worker.track_deadline_s + worker.backoff_max_s)

    def why_not_ready(self) -> str | None:
        if self.stopping:
            return "stopping"
        if not self.consumer.assigned:
            return "no partitions assigned (yet, or during a rebalance)"
        if not self.batcher.healthy:
            return "the last batch hung on the device"
        return self.why_not_live()


class HttpServer:
    """Serves metrics and health on `settings.host:settings.port`; `port` tells the one taken."""

    def __init__(self, settings: HttpSettings, metrics: Metrics, health: Health) -> None:
        self._settings = settings
        self._metrics = metrics
        self._health = health
        app = web.Application()
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/health/live", self._get_live)
        app.router.add_get("/health/ready", self._get_ready)
        self._runner = web.AppRunner(app, access_log=None)
        self._listener: asyncio.Server | None = None
        self.port = settings.port

    async def __aenter__(self) -> Self:
        """Listen.

        Raises
        ------
        SettingsInvalid
            The port is taken, or the address is not this machine's.
        """
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._accept, host, port
            )
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsInvalid(
                f"Metrics and health can't be served on {host}:{port} ({error.strerror}); "
                "set TIMBRE_HTTP__HOST and TIMBRE_HTTP__PORT, 0 for any free port."
            ) from error
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    def _accept(self) -> asyncio.Protocol:
        """One more connection; where they are too many the oldest go, as they may never ask."""
        server = self._runner.server
        assert server is not None, "the runner is set up"
        for oldest in server.connections[:-MAX_CONNECTIONS]:
            oldest.force_close()
        return server()

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _get_live(self, _: web.Request) -> web.Response:
        return _answer(self._health.why_not_live())

    async def _get_ready(self, _: web.Request) -> web.Response:
        return _answer(self._health.why_not_ready())


def _answer(trouble: str | None) -> web.Response:
    return web.json_response(
        {"status": "ok" if trouble is None else "unavailable", "reason": trouble},
        status=200 if trouble is None else 503,
    )

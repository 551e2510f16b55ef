"""Consumer lag, asked of the broker by a client of its own: the worker's consumer may have died."""

import asyncio
import logging
import time
from typing import Self

from aiokafka import AIOKafkaConsumer, TopicPartition

from worker.kafka import connection
from worker.kafka.consumer import Consumer
from worker.metrics import Metrics
from worker.settings import Settings

log = logging.getLogger(__name__)

LAG_INTERVAL_S = 5.0
PROBE_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 1.0
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
        self._measured()  # nothing to measure yet

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

    def unmeasured_s(self) -> float:
        """Seconds since the lag was last measured: beyond some, nothing is known of it."""
        return time.monotonic() - self._measured_s

    async def _run(self) -> None:
        while True:
            try:
                await self._watch()
            except Exception as error:  # whatever it is: without lag a dead consumer looks well
                why, _ = connection.obstacle(error)
                log.warning("Consumer lag can't be measured now (%s)", why)
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
                await self._measure(group)
                await asyncio.sleep(LAG_INTERVAL_S)
        finally:
            await group.stop()  # also where it could not start

    async def _measure(self, group: AIOKafkaConsumer) -> None:
        positions = {(topic, number): at for topic, number, at in self._consumer.positions()}
        partitions = [TopicPartition(*place) for place in positions]
        if not partitions:
            self._note({})
            return
        group.assign(partitions)
        lags = await asyncio.gather(
            *(self._behind(group, tp, positions[tp]) for tp in partitions), return_exceptions=True
        )
        known = {tp: lag for tp, lag in zip(positions, lags, strict=True) if isinstance(lag, int)}
        if known:
            self._note(known)
        for lag in lags:
            if isinstance(lag, BaseException):
                raise lag  # a client made anew asks who leads now

    @staticmethod
    async def _behind(group: AIOKafkaConsumer, tp: TopicPartition, at: int | None) -> int:
        """Offsets from the first event at or behind `at` to the end."""
        async with asyncio.timeout(PROBE_TIMEOUT_S):  # it may have no leader, unlike others
            end: int = (await group.end_offsets([tp]))[tp]
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
        self._measured()
        if self.lag == 0:
            self._lagging_since_s = None
        elif self._lagging_since_s is None:
            self._lagging_since_s = time.monotonic()

    def _measured(self) -> None:
        self._measured_s = time.monotonic()
        self._metrics.consumer_lag_measured.set_to_current_time()

"""The faust app of the consumer: what faust does wrong, put right where no option reaches it.

Private parts of it are overridden, so its version is pinned exactly.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import faust
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

log = logging.getLogger(__name__)

ERRORS_EVERY_S = 0.5
REFUSED_FOR_S = 5.0  # until a topic that may not be read is asked for again


class App(faust.App):
    """Gives back what doesn't finish in time instead of waiting for it."""

    logger = logging.getLogger("faust.app")
    before_rebalance: Callable[[], Awaitable[None]]

    def knows(self, topic: str) -> bool:
        """Whether Kafka tells this consumer of partitions of a topic."""
        consumer: Any = self.consumer
        return bool(consumer._thread._ensure_consumer().partitions_for_topic(topic))

    async def _consumer_wait_empty(self, consumer: Any, logger: Any) -> None:
        await self.before_rebalance()
        # What was given back is never acknowledged here, so faust must not wait for it.
        consumer._unacked_messages.clear()
        await super()._consumer_wait_empty(consumer, logger)

    def _create_directories(self) -> None:
        """Make none: tables would lie there, and there are no tables."""

    def _new_transport(self) -> Any:
        return _Transport(self.conf.broker_consumer, self)


class _NoOffsets(dict[TP, int | None]):
    """Where faust notes how far it has read and committed: nothing stays."""

    def __missing__(self, tp: TP) -> None:
        return None

    def __setitem__(self, tp: TP, offset: int | None) -> None:
        pass

    def update(self, *offsets: Any) -> None:
        pass


class _Thread(driver.AIOKafkaConsumerThread):
    """Gives nothing that faust would drop, as it does what comes around a rebalance.

    A poll waits for up to a second, and may so bring what lies in partitions that were assigned
    meanwhile. Aiokafka takes that for read, and what comes behind it is committed.

    Nor a refusal of one topic, after which faust would read nothing of the other, and tell nobody.
    """

    async def _fetch_records(self, consumer: Any, *args: Any, **options: Any) -> Any:
        assigned = consumer._subscription.subscription.assignment
        try:
            records = await super()._fetch_records(consumer, *args, **options)
        except TopicAuthorizationFailedError as error:
            self._leave_for_now(consumer, *error.args)
            return {}
        if self.consumer.flow_active and consumer._subscription.subscription.assignment is assigned:
            return records
        for tp in records.keys() & consumer.assignment():
            consumer.seek(tp, records[tp][0].offset)
        return {}

    def _leave_for_now(self, consumer: Any, topic: str) -> None:
        """Ask for nothing of a topic that may not be read for a while."""
        refused = {tp for tp in consumer.assignment() if tp.topic == topic} - consumer.paused()
        if not refused:
            return
        log.warning("No events come from %s, which this user may not read", topic)
        consumer.pause(*refused)
        asyncio.get_running_loop().call_later(REFUSED_FOR_S, self._ask_again, consumer, refused)

    @staticmethod
    def _ask_again(consumer: Any, refused: set[Any]) -> None:
        consumer.resume(*(refused & consumer.assignment()))


class _Consumer(driver.Consumer):
    """Takes and commits offsets as Kafka and the ledger have them.

    Faust passes over what lies before what it read, as all of a topic made anew or restored does,
    and commits beyond it. Where offsets are missing, as behind events that expired, it lists them
    in memory, gigabytes for a hundred million.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_offset = self._committed_offset = _NoOffsets()

    def _new_consumer_thread(self) -> Any:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    def _new_offset(self, tp: TP) -> int | None:
        acknowledged = self._acked.pop(tp, None)
        self._acked_index.pop(tp, None)
        return acknowledged[-1] + 1 if acknowledged else None

    async def maybe_wait_for_commit_to_finish(self) -> bool:
        """Wait, and commit all the same: what is on its way knows nothing of what ended since."""
        while self._commit_fut is not None:
            await asyncio.wait({self._commit_fut})
        return False

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Keep what is acknowledged and not committed yet; faust forgets it before it commits."""
        self._active_partitions.difference_update(revoked)
        self._paused_partitions.difference_update(revoked)
        await self._on_partitions_revoked(revoked)

    @faust.Service.task
    async def _raise_errors(self) -> None:
        """Die of what keeps it out of its group, to be built anew.

        Aiokafka tries nothing more until it is asked for the error, and faust never asks.
        """
        while not self.should_stop:
            await self.sleep(ERRORS_EVERY_S)
            kafka = self._thread._ensure_consumer()
            try:
                await self._thread.call_thread(kafka._coordinator.check_errors)
            except KafkaError as error:
                log.warning(
                    "The group refuses this worker (%s); check that no other consumers are in it "
                    "(TIMBRE_KAFKA__GROUP), that this user may read it, and that "
                    "TIMBRE_KAFKA__SESSION_TIMEOUT_S lies between the brokers' "
                    "group.min.session.timeout.ms and group.max.session.timeout.ms",
                    error,
                )
                raise


class _Transport(driver.Transport):
    Consumer = _Consumer

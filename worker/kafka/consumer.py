"""Events in, acknowledged in offset order: with `faust_app` the only module that knows faust.

Every partition has a ledger and a pump of its own. Faust's agent hands events over and never waits,
so a partition that is held back (by its ledger or by the limit in flight) is paused at the broker
instead of holding back the others. Before a rebalance and at a stop, what is in flight gets a while
to finish; the rest is given back unacknowledged, and Kafka delivers it again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from faust.types import TP, EventT

from worker.backoff import Backoff
from worker.errors import ConsumerLost
from worker.kafka.connection import faust_credentials
from worker.kafka.faust_app import App
from worker.kafka.ledger import Ledger
from worker.kafka.place import Place, Places
from worker.kafka.wakefulness import Wakefulness
from worker.metrics import Metrics
from worker.record import Record
from worker.settings import Settings

log = logging.getLogger(__name__)

PAUSE_ABOVE = 32
RESUME_BELOW = 8
# After a partition is resumed faust asks for it once a second, so this is also how many events of
# one partition a worker takes in a second. Their bytes are bounded by `record_batches.POLL_BYTES`.
POLL_RECORDS = 512
COMMIT_INTERVAL_S = 0.2
METADATA_AGE_S = 10.0  # so soon are topics seen that were made, or given partitions, meanwhile
# Aiokafka leaves the group, for good, where a worker asks for nothing for so long: one that waits
# without partitions, or for Kafka to take results.
MAX_POLL_INTERVAL_S = 10 * 365 * 24 * 3600.0
REBALANCE_TIMEOUT_S = 60.0  # beyond the grace: the group goes on without whoever takes longer
RESTART_BACKOFF_S = (0.5, 30.0)
HEARTBEATS_PER_SESSION = 6
CANCEL_TIMEOUT_S = 2.0


Handle = Callable[[Record, Place], Awaitable[None]]


class _Partition:
    """One assigned partition: events waiting, events in flight, and the ledger over both."""

    def __init__(self, tp: TP, consumer: "Consumer", places: Places) -> None:
        self.tp = tp
        self.ledger = Ledger(consumer.settings.worker.max_ahead)
        self.waiting: deque[EventT[Any]] = deque()
        self.running: dict[asyncio.Task[None], Place] = {}
        # Of those running, by key.
        self._latest: WeakValueDictionary[bytes, asyncio.Task[None]] = WeakValueDictionary()
        self.paused = False
        self.last_offset = -1
        self._consumer = consumer
        self._places = places
        self._wake = asyncio.Event()
        self._pump = asyncio.create_task(self._run(), name=f"pump {tp.topic}-{tp.partition}")

    def add(self, event: EventT[Any]) -> None:
        self.last_offset = event.message.offset
        self.waiting.append(event)
        self._wake.set()
        if len(self.waiting) > PAUSE_ABOVE:
            self.paused = True
            self._consumer.pause(self.tp)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            while self.waiting:
                await self.ledger.room()
                await self._places.free.acquire()
                event = self.waiting.popleft()
                self.ledger.open(event.message.offset, event.ack)
                self._start(_record(event))
                if self.paused and len(self.waiting) < RESUME_BELOW:
                    self.paused = False
                    self._consumer.resume(self.tp)
            self._wake.clear()

    def _start(self, record: Record) -> None:
        earlier = self._latest.get(record.key) if record.key else None
        place = Place(self._places, earlier, self._consumer.progressed)
        task = asyncio.create_task(self._work(record, place))
        self.running[task] = place
        if record.key:
            self._latest[record.key] = task
        task.add_done_callback(self.running.pop)

    async def _work(self, record: Record, place: Place) -> None:
        try:
            await self._consumer.work(record, place)
            self._consumer.progressed()
        finally:
            place.leave()
        await place.earlier_ended()  # the next of the key waits for this one alone
        self.ledger.finish(record.offset)

    async def give_back(self, grace_s: float) -> None:
        """Take nothing more, wait for what is in flight, then leave the rest unacknowledged.

        An event that rests is left at once: it may do so for minutes.
        """
        self._pump.cancel()
        left = {task for task, place in self.running.items() if place.resting}
        working = self.running.keys() - left
        _cancel(left)
        if working:
            _, late = await asyncio.wait(working, timeout=grace_s)
            _cancel(late)
            left |= late
        if left:
            log.warning("Gave back %d unfinished events of %s", len(left), self.tp)
            await asyncio.wait(left)
        self.ledger.close()


class Consumer:
    """Reads the event topics and calls `handle` for every record, many at once.

    Parameters
    ----------
    settings
        Topics, group, and the limits in flight.
    handle
        Works on one record to its end, tags or dead letter. Whatever it raises, short of being
        cancelled, it is called again: an event may be given back, never dropped.
    """

    def __init__(self, settings: Settings, handle: Handle, metrics: Metrics) -> None:
        self.settings = settings
        self._handle = handle
        self._metrics = metrics
        kafka, worker = settings.kafka, settings.worker
        self._places = {
            kafka.topic_new: Places(worker.max_in_flight),
            kafka.topic_backfill: Places(worker.max_backfill_in_flight),
        }
        self._partitions: dict[TP, _Partition] = {}
        self._assignment: list[TP] = []
        self._app: App | None = None
        self._stop = asyncio.Event()
        self._ending = False
        self._giving_back = asyncio.Lock()
        self._stop_grace_s = worker.stop_deadline_s * 0.6
        self._rebalance_grace_s = min(worker.rebalance_grace_s, self._stop_grace_s)
        # The group counts from the last heartbeat, which lies before what froze it; one to spare.
        frozen_after_s = kafka.session_timeout_s * (1 - 2 / HEARTBEATS_PER_SESSION)
        self._wakefulness = Wakefulness(frozen_after_s)
        self.last_progress_s = time.monotonic()
        self.assigned = False

    def was_frozen(self, since_s: float) -> bool:
        """Whether the process has stood still since then (`time.monotonic`) for so long that others
        may have its partitions by now.

        Its own deadlines passed meanwhile, and what ended by them tells nothing of a track.
        """
        return self._wakefulness.lapsed(since_s)

    def progressed(self) -> None:
        """Note that an event came to its end, or that work on one moved on.

        Neither an assignment nor the first attempt at an event is progress: a consumer that dies
        again and again comes as far each time.
        """
        self.last_progress_s = time.monotonic()

    def positions(self) -> Iterator[tuple[str, int, int | None]]:
        """Topic, partition and first unfinished offset (None: nothing read yet) of what is ours.

        Between two assignments that is what was ours last: while the consumer dies again and again
        its lag must be seen.
        """
        for tp in self._assignment:
            partition = self._partitions.get(tp)
            yield (tp.topic, tp.partition, partition.ledger.next_offset if partition else None)

    @property
    def in_flight(self) -> int:
        """Events being worked on."""
        return sum(len(partition.running) for partition in self._partitions.values())

    async def work(self, record: Record, place: Place) -> None:
        """Handle one record, whatever it takes."""
        self._metrics.events.labels(record.topic).inc()
        gauge = self._metrics.in_flight.labels(record.topic)
        backoff = Backoff(*RESTART_BACKOFF_S)
        with gauge.track_inprogress():
            while True:
                try:
                    return await self._handle(record, place)
                except Exception:
                    self._metrics.retries.labels("handle", "internal_error").inc()
                    log.exception(
                        "Event %s-%d@%d could not be handled; trying again",
                        record.topic, record.partition, record.offset,
                    )  # fmt: skip
                    await place.wait(backoff.next_s())

    def pause(self, tp: TP) -> None:
        """Ask the broker for no more of a partition for now.

        Not by faust's `pause_partitions`, which drops records already fetched and then commits
        past them.
        """
        if self._app is not None:
            self._app.consumer.on_buffer_full(tp)

    def resume(self, tp: TP) -> None:
        """Undo `pause`."""
        if self._app is not None and tp in self._app.consumer.assignment():
            self._app.consumer.on_buffer_drop(tp)

    async def run(self) -> None:
        """Consume until `stop`; a consumer that dies is built anew, with backoff."""
        backoff = Backoff(*RESTART_BACKOFF_S)
        while not self._stop.is_set():
            started_s = time.monotonic()
            clean = await self._run_once()
            if self._stop.is_set():
                return
            if not clean:
                # Its remains may still be a member of the group and hold partitions.
                raise ConsumerLost(
                    "The Kafka consumer died and could not be taken down; the process ends so that "
                    "its supervisor starts a new one. Nothing is lost."
                )
            if time.monotonic() - started_s > RESTART_BACKOFF_S[1]:
                backoff.reset()
            pause_s = backoff.next_s()
            self._metrics.consumer_restarts.inc()
            log.warning("The Kafka consumer ended; a new one starts in %.1f s", pause_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)

    async def _run_once(self) -> bool:
        app = self._app = self._make_app()
        self._ending = False
        stopping = asyncio.create_task(self._stop.wait())
        running = asyncio.create_task(self._run_app(app))
        awake = asyncio.create_task(self._wakefulness.watch())
        try:
            await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            clean = await self._end(app)
            awake.cancel()
            running.cancel()
            # Not for ever: what runs in there may not heed it.
            _, left = await asyncio.wait({running}, timeout=CANCEL_TIMEOUT_S)
            self._app = None
        return clean and not left

    @staticmethod
    async def _run_app(app: App) -> None:
        try:
            await app.start()
            await app.wait_until_stopped()
        except Exception:
            log.exception("The Kafka consumer failed")

    async def _end(self, app: App) -> bool:
        self._ending = True
        ending = asyncio.create_task(self._take_down(app))
        # A task of its own: faust may swallow a cancellation, and must not hold up its caller.
        _, late = await asyncio.wait({ending}, timeout=self.settings.worker.stop_deadline_s * 0.9)
        if late:
            ending.cancel()
            log.warning("The Kafka consumer did not stop in time; what it held is delivered again")
            return False
        return ending.result()

    async def _take_down(self, app: App) -> bool:
        try:
            await self._give_back(self._stop_grace_s)
            await app.stop()
        except Exception:
            log.exception("The Kafka consumer did not stop cleanly; its events are delivered again")
            return False
        return True

    def stop(self) -> None:
        """Take no new events; `run` returns once those in flight ended or were given back."""
        self._stop.set()

    def _make_app(self) -> App:
        kafka = self.settings.kafka
        app = App(
            kafka.group,
            broker=[f"kafka://{server.strip()}" for server in kafka.bootstrap_servers.split(",")],
            broker_credentials=faust_credentials(kafka),
            broker_session_timeout=kafka.session_timeout_s,
            broker_heartbeat_interval=kafka.session_timeout_s / HEARTBEATS_PER_SESSION,
            broker_request_timeout=max(kafka.request_timeout_s, kafka.session_timeout_s + 5),
            broker_rebalance_timeout=self._rebalance_grace_s + REBALANCE_TIMEOUT_S,
            broker_max_poll_interval=MAX_POLL_INTERVAL_S,
            broker_max_poll_records=POLL_RECORDS,
            broker_commit_interval=COMMIT_INTERVAL_S,
            consumer_max_fetch_size=kafka.max_message_bytes,
            consumer_auto_offset_reset="earliest",
            consumer_metadata_max_age_ms=int(METADATA_AGE_S * 1000),
            stream_buffer_maxsize=2 * POLL_RECORDS,
            stream_wait_empty=True,
            topic_allow_declare=False,
            topic_disable_leader=True,
            reply_create_topic=False,
            web_enabled=False,
            store="memory://",
            loghandlers=[],
            env={},  # whose BROKER_URL, TIMEZONE or APP_WEB_ENABLED would win over all of these
        )
        # Where workers keep copies of each other's tables, which we have none of, partitions stay
        # where they are, and of twelve the seventh to the eleventh worker had none. Not by faust's
        # `table_standby_replicas`: without, it has another protocol, which older workers refuse.
        app.assignor.replicas = 0
        app.before_rebalance = partial(self._give_back, self._rebalance_grace_s)
        app.on_partitions_assigned.connect(self._on_assigned, weak=False)
        for topic in self._places:
            source = app.topic(
                topic,
                key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw",
            )  # fmt: skip
            app.agent(source, name=f"timbre.{topic}")(self._take)
        return app

    async def _take(self, stream: Any) -> None:
        async for event in stream.noack().events():
            # What faust calls a TP here is aiokafka's, which faust itself refuses elsewhere.
            tp = TP(event.message.topic, event.message.partition)
            if self._ending:
                # What is given back lies before it, and would be acknowledged with it.
                self.pause(tp)
                continue
            partition = self._partitions.get(tp)
            if partition is not None and event.message.offset <= partition.last_offset:
                # Kafka went back to an earlier offset: begin again from there.
                log.warning("%s is read again from offset %d on", tp, event.message.offset)
                del self._partitions[tp]
                await partition.give_back(grace_s=0)
                self.resume(tp)  # the one given back may have paused it
                partition = None
            if partition is None:
                partition = self._partitions[tp] = _Partition(tp, self, self._places[tp.topic])
            partition.add(event)

    async def _on_assigned(self, app: App, /, *args: Any, **_: Any) -> None:
        (assigned,) = args
        self._assignment = sorted(assigned)
        self.assigned = True
        told = {tp.topic for tp in assigned}  # by who leads the group, and may know more
        unknown = [topic for topic in self._places if topic not in told and not app.knows(topic)]
        if assigned:
            log.info("Assigned %d partitions", len(assigned))
        elif len(unknown) < len(self._places):
            log.warning("No partitions: other workers have all there are")
        for topic in unknown:
            log.warning(
                "No events come from %s, which doesn't exist yet or may not be read; see its "
                "name in TIMBRE_KAFKA__TOPIC_*, and what Kafka allows this user",
                topic,
            )

    async def _give_back(self, grace_s: float) -> None:
        async with self._giving_back:  # a rebalance during a stop waits for it to be done
            partitions = list(self._partitions.values())
            self._partitions.clear()
            self.assigned = False
            await asyncio.gather(*(partition.give_back(grace_s) for partition in partitions))


def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


def _record(event: EventT[Any]) -> Record:
    message = event.message
    headers: Any = message.headers or ()
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_s=message.timestamp,
        key=message.key,
        value=message.value,
        headers=tuple(headers),
    )

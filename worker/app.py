"""The worker: wires the stages. The only place that knows Kafka, Redis and the stages at once.

An event's way: intake, cache, fetch, decode, windows, batch, vote (the last five in `tagger`),
publish, store. It ends in exactly one of two places, tags or dead letter; only then is it
acknowledged.
"""

import asyncio
import gc
import importlib.metadata
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Any

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from model.bundle import Bundle
from schemas.events import NewTrack, Priority, Processing
from worker import intake, logs, publish
from worker.analysis import Analysis
from worker.cache import Cache
from worker.errors import (
    ConsumerLost,
    DeadlineExceeded,
    DeviceLost,
    FetchFailed,
    PublishFailed,
    TimbreError,
    TrackFailed,
    Unexpected,
    WorkerStopping,
)
from worker.health import Health, HttpServer
from worker.kafka.consumer import Consumer
from worker.kafka.lag import LagProbe
from worker.kafka.place import Place
from worker.kafka.record_batches import bounded_unpacking
from worker.metrics import BatchMetrics, Metrics
from worker.printable import printable
from worker.publish import Failure, Publisher
from worker.record import Record
from worker.settings import Settings
from worker.tagger import Tagger, Timings

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PUBLISH_BACKOFF_S = (0.2, 10.0)
ATTEMPTS_BEFORE_A_WARNING = 3
LOST_DEADLINE_S = 5.0


def run_worker(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit status."""
    logs.configure(settings.worker)
    try:
        bundle = Bundle.load(settings.worker.bundle)
        asyncio.run(_main(settings, bundle))
    except ConsumerLost:
        return 1  # the log has it
    except TimbreError as error:
        log.error("%s", error.message)  # noqa: TRY400  # the sentence says it; a traceback hides it
        return 1
    return 0


async def _main(settings: Settings, bundle: Bundle) -> None:
    worker = Worker(settings, bundle)
    loop = asyncio.get_running_loop()
    # Not by `add_signal_handler`: a closing loop brings back what ends a process at once.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(worker.stop))
    try:
        async with worker:
            # What is there by now, of PyTorch above all, stays: a full collection looked through it
            # all, and held up the event loop for 0.2 s each time.
            gc.collect()
            gc.freeze()
            await _run(worker)
    except asyncio.CancelledError:
        # Stopped before all was there, and what was there is taken down. PyTorch may still be at
        # work in a thread, and abort a process that ends by the usual way.
        os._exit(0)
    finally:
        for number in STOP_SIGNALS:  # another must not change how it ends
            signal.signal(number, signal.SIG_IGN)
        # A start that failed may have left a thread that hangs; at a stop this is under way.
        _end_process_after(settings.worker.stop_deadline_s, status=1)


async def _run(worker: "Worker") -> None:
    try:
        await worker.run()
    except ConsumerLost as error:
        log.error("%s", error.message)  # noqa: TRY400  # the sentence says it
        # What could not be taken down may hold up the rest as well.
        _end_process_after(LOST_DEADLINE_S, status=1)
        raise


def _end_process_after(delay_s: float, *, status: int) -> None:
    """End the process by then, whatever still hangs in it."""
    watchdog = threading.Timer(delay_s, os._exit, args=(status,))
    watchdog.daemon = True
    watchdog.start()


class Worker:
    """One process of the consumer group."""

    def __init__(self, settings: Settings, bundle: Bundle) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self.metrics.build.info(
            {
                "version": importlib.metadata.version("timbre"),
                "model": bundle.name,
                "model_version": bundle.version,
            }
        )
        self.consumer = Consumer(settings, self.handle, self.metrics)
        self.tagger = Tagger(
            settings,
            bundle,
            batch_observer=BatchMetrics(self.metrics, self.consumer.progressed),
            on_retry=lambda code: self.metrics.retries.labels("fetch", code).inc(),
            on_bytes=self.metrics.fetched_bytes.inc,
            on_decoder_restart=self.metrics.decoder_restarts.inc,
        )
        self._cache = Cache(settings.redis, self.tagger.analysis_key, bundle, self.metrics)
        self._publisher = Publisher(settings.kafka)
        self._probe = LagProbe(settings, self.consumer, self.metrics)
        self._health = Health(settings.worker, self._probe, self.consumer, self.tagger.batcher)
        self.http = HttpServer(settings.http, self.metrics, self._health)
        self._stack = AsyncExitStack()
        self._starting: asyncio.Task[Any] | None = None
        self._lost: DeviceLost | None = None

    async def __aenter__(self) -> "Worker":
        self._starting = asyncio.current_task()
        async with AsyncExitStack() as stack:
            stack.enter_context(bounded_unpacking(self._settings.kafka.max_message_bytes))
            for part in (self.http, self._publisher, self._cache, self.tagger, self._probe):
                await stack.enter_async_context(part)
            self._stack = stack.pop_all()
        self._starting = None
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def run(self) -> None:
        """Work on events until `stop`; raises DeviceLost once the device has broken."""
        kafka, model = self._settings.kafka, self.tagger.model
        log.info(
            "Tagging %s with %s@%s; metrics and health on port %d",
            kafka.topic_new, model.name, model.version, self.http.port,
        )  # fmt: skip
        await self.consumer.run()
        log.info("Stopped")
        if self._lost is not None:
            raise self._lost

    def stop(self) -> None:
        """Take nothing new, finish or give back what is in flight, and end inside the deadline.

        A worker that is being entered is left at once: the entering task is cancelled.
        """
        if self._health.stopping:
            return
        log.info("Stopping: no new events; %d in flight", self.consumer.in_flight)
        self._health.stopping = True
        self.consumer.stop()
        # What is left by then hangs for good (a device, a socket) and is delivered again.
        status = 0 if self._lost is None else 1
        _end_process_after(self._settings.worker.stop_deadline_s, status=status)
        if self._starting is not None:
            self._starting.cancel()

    async def handle(self, record: Record, place: Place, *, again: bool = False) -> None:
        """Take one record to its end: tags of each of its tracks, and of those that failed, and
        what can't be read, one dead letter."""
        began_s = time.monotonic()
        try:
            announced = intake.read(record, max_bytes=self._settings.kafka.max_event_bytes)
        except Exception as error:
            await self._dead_letter(record, [Failure(_typed(error))])
            return
        message = Timings()  # of all its tracks together
        failures = []
        for track in announced.tracks:
            failure = await self._handle_track(record, track, place, message)
            await place.take()
            if failure is not None:
                failures.append(failure)
            self.consumer.progressed()  # the next may take as long again
        if announced.fault is not None:
            failures.append(Failure(announced.fault))
        if failures and not again and self.consumer.was_frozen(began_s):
            # Whoever took over may have tagged it. If nobody did, it begins anew.
            self.metrics.retries.labels("handle", "worker_frozen").inc()
            await place.wait(self._settings.kafka.session_timeout_s / 2)
            await self.handle(record, place, again=True)
        elif failures:
            await self._dead_letter(record, failures)

    async def _handle_track(
        self, record: Record, track: NewTrack, place: Place, message: Timings
    ) -> Failure | None:
        """Tag a track and publish what was found; how it failed, if it did."""
        started_s = time.perf_counter()
        timings = Timings()
        priority = self._priority(record, track)
        retrying = self._retrying(place)
        try:
            self._begin_in_time(message)
            with message.measure("analysis"):
                analysis, cached = await self._analyse(track, priority, timings, retrying, place)
            processing = Processing(
                processed_at=datetime.now(UTC),
                timings_s={stage: round(s, 6) for stage, s in timings.seconds.items()},
                cached=cached,
                attempt=_attempts(retrying),
            )
            tags, features = publish.results(track, analysis, self.tagger.model, processing)
            if not cached:
                await self._cache.remember(tags.event_id, analysis)
            await place.turn()
            with timings.measure("publish"):
                # Each by itself, or the tags come again as often as the embedding is refused.
                await self._until_delivered(partial(self._publisher.publish, tags))
                await self._until_delivered(partial(self._publisher.publish, features))
        except WorkerStopping:
            raise  # not the track's fault: it stays unacknowledged
        except DeviceLost as error:  # nor is that, and no other track would fare better
            self._lost = error
            self.stop()
            await place.wait(self._settings.worker.stop_deadline_s)  # until it is given back
            raise
        except Exception as error:
            attempts = _attempts(retrying)
            if isinstance(error, FetchFailed):
                attempts += error.attempts - 1
            self.metrics.observe_stages(timings.seconds)
            return Failure(_typed(error), attempts, track)
        finally:
            message.add("wait", timings.seconds.get("wait", 0.0))
        with timings.measure("store"):
            await self._cache.store(tags, analysis)
        timings.seconds["total"] = time.perf_counter() - started_s
        self.metrics.observe_stages(timings.seconds)
        age_s = time.time() - record.timestamp_s
        self.metrics.count_tagged(analysis, priority, cached=cached, age_s=age_s)
        return None

    def _begin_in_time(self, message: Timings) -> None:
        """Refuse a track once its message has used up its time.

        Otherwise a message of many slow tracks would hold its partition for one deadline each. The
        time that others hold the decoders, and that Kafka takes to accept results, does not count.
        """
        deadline_s = self._settings.worker.track_deadline_s
        took_s = message.seconds.get("analysis", 0.0) - message.seconds.get("wait", 0.0)
        if took_s >= deadline_s:
            raise DeadlineExceeded(
                f"The other tracks of its message took all of the {deadline_s:g} s that one has. "
                "Send fewer Records in a message, raise TIMBRE_WORKER__TRACK_DEADLINE_S where the "
                "worker is loaded, or retry this dead letter: tracks already done are answered "
                "from the cache then."
            )

    async def _analyse(
        self,
        track: NewTrack,
        priority: Priority,
        timings: Timings,
        retrying: AsyncRetrying,
        place: Place,
    ) -> tuple[Analysis, bool]:
        """The analysis and whether it came from the cache; retried where that can help."""
        known = await self._cache.by_event(publish.event_id(track, self.tagger.model))
        if known is None and track.audio.sha256 is not None:
            known = await self._cache.by_audio(track.audio.sha256)
        if known is not None:
            self.metrics.cache.labels("hit").inc()
            return known, True

        found = False

        async def lookup(sha256: str) -> Analysis | None:
            nonlocal found
            analysis = await self._cache.by_audio(sha256)
            found = analysis is not None
            self.metrics.cache.labels("hit" if found else "miss").inc()
            return analysis

        async def attempt() -> Analysis:
            return await self.tagger.tag(
                track.audio.uri,
                priority=priority,
                expected_sha256=track.audio.sha256,
                timings=timings,
                lookup=lookup,
                sleep=place.rest,
            )

        return await retrying(attempt), found

    def _retrying(self, place: Place) -> AsyncRetrying:
        """The attempts at one track."""
        options = self._settings.worker
        return AsyncRetrying(
            retry=retry_if_exception(_tried_again),
            stop=stop_after_attempt(options.attempts),
            wait=wait_random_exponential(options.backoff_initial_s, options.backoff_max_s),
            sleep=place.rest,
            before=self._note_attempt,
            before_sleep=self._count_retry,
            reraise=True,
        )

    def _note_attempt(self, state: RetryCallState) -> None:
        if state.attempt_number > 1:
            self.consumer.progressed()

    async def _until_delivered(self, send: Callable[[], Awaitable[None]]) -> None:
        """Repeat until Kafka has confirmed: there is no other place for a result."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(PublishFailed),
            wait=wait_random_exponential(*PUBLISH_BACKOFF_S),
            before_sleep=self._count_retry,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await send()

    async def _dead_letter(self, record: Record, failures: Sequence[Failure]) -> None:
        await self._until_delivered(
            lambda: self._publisher.dead_letter(record, failures, self.tagger.model)
        )
        error = failures[0].error
        log.info(
            "Dead letter of %s, partition %d, offset %d: %s (%s)",
            record.topic, record.partition, record.offset, printable(error.message), error.code,
        )  # fmt: skip
        for failure in failures:
            self.metrics.dead_letters.labels(failure.error.code).inc()
            priority = self._priority(record, failure.track)
            self.metrics.tracks.labels("dead_letter", priority).inc()

    def _priority(self, record: Record, track: NewTrack | None) -> Priority:
        if record.topic == self._settings.kafka.topic_backfill:
            return "backfill"
        return track.priority if track else "upload"

    def _count_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, TrackFailed | PublishFailed)  # nothing else is retried
        stage = "publish" if isinstance(error, PublishFailed) else error.stage
        self.metrics.retries.labels(stage, error.code).inc()
        if isinstance(error, PublishFailed) and state.attempt_number == ATTEMPTS_BEFORE_A_WARNING:
            log.warning("%s Trying again until it does.", error.message)


def _tried_again(error: BaseException) -> bool:
    """Whether to try a track again at once. A fetch makes its own attempts, and knows how long the
    server asked it to stay away; a lost device needs another process."""
    return (
        isinstance(error, TrackFailed)
        and error.retryable
        and not isinstance(error, FetchFailed | DeviceLost)
    )


def _attempts(retrying: AsyncRetrying) -> int:
    """Attempts begun so far, the one at hand included; one where the cache answered."""
    return int(retrying.statistics.get("attempt_number", 1))


def _typed(error: Exception) -> TrackFailed:
    """The error itself, or, for a fault of our own, one that must not hold up the partition."""
    if isinstance(error, TrackFailed):
        return error
    log.error("Unexpected failure", exc_info=error)
    return Unexpected(f"Timbre failed unexpectedly ({type(error).__name__}); see its log.")

"""Every metric of the worker, by name, in one place. No label ever holds a track id or an address.

Units follow Prometheus's conventions: seconds and bytes, counters end in `_total`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from schemas.events import Priority
from worker.analysis import Analysis
from worker.batch.batcher import BatchObserver, Fault
from worker.errors import PublishFailed, track_failures

OUTCOMES = ("tagged", "cached", "dead_letter")
LOOKUPS = ("hit", "miss", "error")
STAGE_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
# Behind an outage, or among backfill, an event may wait for hours.
END_TO_END_BUCKETS_S = (*STAGE_BUCKETS_S, 1_800.0, 3_600.0, 7_200.0, 21_600.0, 86_400.0)
WAIT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
FILL_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The worker's metrics on a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        info, counter = partial(Info, registry=registry), partial(Counter, registry=registry)
        gauge, histogram = partial(Gauge, registry=registry), partial(Histogram, registry=registry)

        self.build = info("timbre_build", "Version of the worker and its model")
        self.events = counter("timbre_events", "Events consumed", ["topic"])
        self.tracks = counter(
            "timbre_tracks",
            f"Tracks finished, by outcome: {', '.join(OUTCOMES)}",
            ["outcome", "priority"],
        )
        self.dead_letters = counter(
            "timbre_dead_letters",
            "Tracks and events that ended as dead letters, by reason code",
            ["code"],
        )
        self.retries = counter(
            "timbre_retries", "Attempts repeated, by stage and reason code", ["stage", "code"]
        )
        self.cache = counter(
            "timbre_cache_lookups", f"Cache lookups: {', '.join(LOOKUPS)}", ["result"]
        )
        self.redis_backlog = gauge("timbre_redis_backlog", "Results waiting to be stored in Redis")
        self.redis_dropped = counter(
            "timbre_redis_dropped",
            "Results never stored in Redis: backlog full, or their key is another program's",
        )
        self.stage_seconds = histogram(
            "timbre_stage_seconds",
            "Seconds by stage: fetch, wait, decode, batch, vote, publish, store, total",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
        )
        self.end_to_end_seconds = histogram(
            "timbre_end_to_end_seconds",
            "Seconds from the event's time in Kafka to its tags",
            ["priority"],
            buckets=END_TO_END_BUCKETS_S,
        )
        self.fetched_bytes = counter("timbre_fetched_bytes", "Bytes of audio fetched")
        self.audio_seconds = counter("timbre_audio_seconds", "Seconds of audio tagged")
        self.windows = counter("timbre_windows", "Windows: voted, silent", ["kind"])
        self.batch_windows = histogram(
            "timbre_batch_windows", "Windows in a batch", buckets=BATCH_BUCKETS
        )
        self.batch_fill = histogram(
            "timbre_batch_fill", "Windows in a batch over the most there may be",
            buckets=FILL_BUCKETS,
        )  # fmt: skip
        self.batch_wait_seconds = histogram(
            "timbre_batch_wait_seconds", "Seconds a batch's oldest window waited",
            buckets=WAIT_BUCKETS_S,
        )  # fmt: skip
        self.batch_compute_seconds = histogram(
            "timbre_batch_compute_seconds", "Seconds of a batch on the device",
            buckets=WAIT_BUCKETS_S,
        )  # fmt: skip
        self.batch_faults = counter(
            "timbre_batch_faults", "Batches that failed on the device, by kind", ["kind"]
        )
        self.queue_windows = gauge("timbre_queue_windows", "Windows waiting for a batch")
        self.in_flight = gauge("timbre_in_flight", "Events being worked on", ["topic"])
        self.consumer_lag = gauge(
            "timbre_consumer_lag",
            "Events of an assigned partition behind its end, unfinished ones included",
            ["topic", "partition"],
        )
        self.consumer_lag_measured = gauge(
            "timbre_consumer_lag_measured_timestamp_seconds",
            "Unix time at which the lag was last measured",
        )
        self.decoder_restarts = counter(
            "timbre_decoder_restarts", "Decoder processes ended and replaced"
        )
        self.consumer_restarts = counter(
            "timbre_consumer_restarts", "Times the Kafka consumer was built anew"
        )
        self.labels = counter(
            "timbre_labels", "Tracks by their best label of a head", ["head", "label"]
        )
        self.uncertain = counter("timbre_uncertain_tracks", "Tracks on which nothing was clear")
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Make the series that are known: Prometheus can't see the first increment of others."""
        for outcome, priority in product(OUTCOMES, get_args(Priority)):
            self.tracks.labels(outcome, priority)
        for kind in track_failures():
            self.dead_letters.labels(kind.code)
            if kind.retryable:
                self.retries.labels(kind.stage, kind.code)
        self.retries.labels("publish", PublishFailed.code)
        for fault in get_args(Fault):
            self.batch_faults.labels(fault)
        for result in LOOKUPS:
            self.cache.labels(result)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Durations of the stages that a track went through, whatever its end."""
        for stage, duration_s in seconds.items():
            self.stage_seconds.labels(stage).observe(duration_s)

    def count_tagged(
        self, analysis: Analysis, priority: Priority, *, cached: bool, age_s: float
    ) -> None:
        """Count a track that was tagged, `age_s` after its event's time in Kafka."""
        self.tracks.labels("cached" if cached else "tagged", priority).inc()
        self.end_to_end_seconds.labels(priority).observe(max(0.0, age_s))
        best: dict[str, str] = {}
        for tag in analysis.tags:
            best.setdefault(tag.head, tag.label)
        for head, label in best.items():
            self.labels.labels(head, label).inc()
        if analysis.uncertain:
            self.uncertain.inc()
        if not cached:
            windows = analysis.windows
            self.audio_seconds.inc(analysis.audio.duration_s)
            self.windows.labels("silent").inc(windows.silent)
            self.windows.labels("voted").inc(windows.total - windows.silent)

    def render(self) -> bytes:
        """The exposition text of all metrics."""
        return generate_latest(self.registry)


class BatchMetrics(BatchObserver):
    """Tells the metrics what the batcher does; every batch is progress."""

    def __init__(self, metrics: Metrics, progressed: Callable[[], None]) -> None:
        self._metrics = metrics
        self._progressed = progressed

    def on_batch(self, windows: int, fill: float, wait_s: float, compute_s: float) -> None:
        self._metrics.batch_windows.observe(windows)
        self._metrics.batch_fill.observe(fill)
        self._metrics.batch_wait_seconds.observe(wait_s)
        self._metrics.batch_compute_seconds.observe(compute_s)
        self._progressed()

    def on_queue(self, depth: int) -> None:
        self._metrics.queue_windows.set(depth)

    def on_fault(self, kind: Fault) -> None:
        self._metrics.batch_faults.labels(kind).inc()

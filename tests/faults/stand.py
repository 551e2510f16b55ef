"""Where faults are tried: real services, real workers, and a lane of topics for every scenario."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Container, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from aiokafka import AIOKafkaProducer
from pydantic import SecretStr
from redis.asyncio import Redis as AsyncRedis

from tests.broker import offsets
from tests.faults.audio_server import AudioServer
from tests.faults.checker import Checker, Topics, Verdict, track_id
from tests.tls import GuardedKafka, GuardedRedis, Security, tls_proxy
from tests.worker_process import PORT, START_TIMEOUT_S, TIMBRE, metric
from worker.cache import connect
from worker.kafka.connection import client_options
from worker.services.jars import kafka_jars
from worker.services.kafka import Kafka
from worker.services.redis import Redis
from worker.services.service import HOST
from worker.services.topics import create_topics
from worker.settings import KafkaSettings, RedisSettings, ServicesSettings

ROOT = Path(__file__).parents[2]
IN_FLIGHT = 16
SETTINGS = {
    "TIMBRE_FETCH__ALLOWED_NETWORKS": '["127.0.0.0/8"]',
    "TIMBRE_FETCH__STALL_TIMEOUT_S": "2",
    "TIMBRE_FETCH__TIMEOUT_S": "6",
    "TIMBRE_FETCH__ATTEMPTS": "3",
    "TIMBRE_FETCH__BACKOFF_MAX_S": "1",
    "TIMBRE_DECODE__PROCESSES": "1",
    "TIMBRE_BATCH__THREADS": "1",
    "TIMBRE_BATCH__MAX_DELAY_S": "0.02",
    "TIMBRE_KAFKA__SESSION_TIMEOUT_S": "6",
    "TIMBRE_KAFKA__REQUEST_TIMEOUT_S": "5",
    "TIMBRE_WORKER__MAX_IN_FLIGHT": str(IN_FLIGHT),
    "TIMBRE_WORKER__TRACK_DEADLINE_S": "10",
    "TIMBRE_WORKER__ATTEMPTS": "2",
    "TIMBRE_WORKER__BACKOFF_MAX_S": "1",
    "TIMBRE_WORKER__REBALANCE_GRACE_S": "2",
    "TIMBRE_WORKER__STOP_DEADLINE_S": "15",
    "TIMBRE_HTTP__PORT": "0",
    "OMP_NUM_THREADS": "1",
}
"""A worker's settings here: as by default, with deadlines that a test can wait for."""
MAX_REQUEST_BYTES = 256 << 20
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Message:
    """What is produced: by default an event's key is the track id that it names."""

    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


class Failed(AssertionError):
    """A scenario did not go as promised."""


async def until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Wait for a condition; raises `Failed` naming `what` when it doesn't come true in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            raise Failed(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(POLL_S)


class Worker:
    """A real `timbre worker`, or another command that ends in one, as a process of its own."""

    def __init__(self, log: Path, environment: Mapping[str, str], command: list[str]) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, cwd=log.parent
            )

    async def ready(self) -> Self:
        """Wait until it has partitions."""

        def assigned() -> bool:
            if self.process.poll() is not None:
                raise Failed(f"the worker ended with {self.process.returncode}:\n{self.tail()}")
            return "Assigned" in self.text()

        await until(assigned, "a worker with partitions", START_TIMEOUT_S)
        return self

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        return "\n".join(self.text().splitlines()[-15:])

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def port(self) -> int:
        found = PORT.search(self.text())
        if found is None:
            raise Failed(f"the worker told no port:\n{self.tail()}")
        return int(found[1])

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.signal(signal.SIGTERM)
        return await self.ended("the worker's exit after SIGTERM", 30)

    async def ended(self, what: str, timeout_s: float) -> int:
        """Wait until it has ended; its exit status."""
        await until(lambda: not self.running, what, timeout_s)
        return self.process.returncode

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET at its port."""

        def fetch() -> tuple[int, str]:
            url = f"http://127.0.0.1:{self.port}{path}"
            try:
                with urllib.request.urlopen(url, timeout=10) as response:
                    return response.status, response.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(fetch)

    async def metric(self, name: str, **labels: str) -> float:
        _, told = await self.get("/metrics")
        return metric(told, name, **labels)

    def tree(self) -> list[psutil.Process]:
        """It and its decoders."""
        worker = psutil.Process(self.process.pid)
        return [worker, *worker.children(recursive=True)]

    def decoders(self) -> list[psutil.Process]:
        return self.tree()[1:]

    def memory_bytes(self) -> int:
        """Memory of the worker and its decoders, what they share counted once.

        Without mapped files, whose share depends on who else maps them.
        """
        total = 0
        for process in self.tree():
            with contextlib.suppress(OSError):  # a decoder that was just replaced
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                parts = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", rollup, re.MULTILINE)
                total += sum(map(int, parts)) << 10
        return total


class Lane:
    """Topics, group and keys of one scenario, the events sent to them and the workers on them."""

    def __init__(self, stand: "Stand", name: str, partitions: int, checker: Checker) -> None:
        self.stand = stand
        self.partitions = partitions
        self.checker = checker
        self.workers: list[Worker] = []
        self.folder = stand.folder / name
        self.folder.mkdir()
        self.spool = self.folder / "spool"
        self.prefix = f"{name}:"
        self.group = name
        self.settings = {
            **SETTINGS,
            **stand.environment(),
            "TIMBRE_FETCH__SPOOL_DIR": str(self.spool),
            "TIMBRE_KAFKA__GROUP": self.group,
            "TIMBRE_KAFKA__TOPIC_NEW": checker.topics.new[0],
            "TIMBRE_KAFKA__TOPIC_BACKFILL": checker.topics.new[1],
            "TIMBRE_KAFKA__TOPIC_TAGS": checker.topics.tags,
            "TIMBRE_KAFKA__TOPIC_FEATURES": checker.topics.features,
            "TIMBRE_KAFKA__TOPIC_DEAD_LETTER": checker.topics.dead_letter,
            "TIMBRE_REDIS__PREFIX": self.prefix,
        }

    def worker(
        self, *, launcher: str | None = None, wrapper: Sequence[str] = (), **settings: object
    ) -> Worker:
        """Start a worker.

        Parameters
        ----------
        launcher
            A trick of the module of that name.
        wrapper
            A command that runs the one after it.
        settings
            As `kafka__group="x"`.
        """
        given = {f"TIMBRE_{name.upper()}": str(value) for name, value in settings.items()}
        outer = {k: v for k, v in os.environ.items() if not k.startswith("TIMBRE_")}
        environment = outer | self.settings | given | {"PYTHONPATH": str(ROOT)}
        command = [str(TIMBRE), "worker"]
        if launcher is not None:
            command = [sys.executable, "-m", "tests.faults.launcher", launcher]
        log = self.folder / f"worker-{len(self.workers)}.log"
        worker = Worker(log, environment, [*wrapper, *command])
        self.workers.append(worker)
        return worker

    async def ready(self, count: int = 1, **options: Any) -> list[Worker]:
        """Start so many workers and wait until each has partitions."""
        workers = [self.worker(**options) for _ in range(count)]
        await asyncio.gather(*(worker.ready() for worker in workers))
        return workers

    @property
    def new(self) -> str:
        return self.checker.topics.new[0]

    @property
    def backfill(self) -> str:
        return self.checker.topics.new[1]

    def event(self, uri: str, *, track_id: str | None = None, **more: object) -> bytes:
        """An event as a platform would send it."""
        track_id = track_id or uuid.uuid4().hex
        return json.dumps({"track_id": track_id, "audio": {"uri": uri}, **more}).encode()

    def tracks(self, numbers: Iterable[int]) -> list[bytes]:
        """Events of sound tracks, each distinct."""
        url = self.stand.audio.url
        return [self.event(url(number), track_id=f"track-{number}") for number in numbers]

    async def send(
        self,
        events: Iterable[bytes | Message],
        *,
        topic: str | None = None,
        per_s: float | None = None,
        compression: str | None = None,
    ) -> None:
        """Produce events, all at once or at a rate, each to a partition by its key."""
        async with AIOKafkaProducer(
            **self.stand.connection,
            max_request_size=MAX_REQUEST_BYTES,
            linger_ms=2,
            compression_type=compression,
        ) as producer:
            for count, event in enumerate(events, 1):
                message = event if isinstance(event, Message) else Message(event, track_id(event))
                await producer.send(
                    topic or self.new, message.value, key=message.key, headers=list(message.headers)
                )
                if per_s is not None and count % 10 == 0:
                    await producer.flush()
                    await asyncio.sleep(10 / per_s)

    async def send_batch(self, events: Iterable[bytes], *, compression: str) -> None:
        """Produce all in one batch, however much that is before it is packed."""
        async with AIOKafkaProducer(
            **self.stand.connection, max_batch_size=1 << 30, compression_type=compression
        ) as producer:
            batch = producer.create_batch()
            for event in events:
                batch.append(key=None, value=event, timestamp=None)
            batch.close()
            await (await producer.send_batch(batch, self.new, partition=0))

    async def until_answered(self, events: int, timeout_s: float, *, unanswered: int = 0) -> None:
        """Read until so many events are there and all but `unanswered` have their answer."""
        checker = self.checker
        end_s = time.monotonic() + timeout_s
        while len(checker.events) < events or len(checker.unanswered) > unanswered:
            if time.monotonic() > end_s:
                logs = "\n".join(f"-- {w.log.name}\n{w.tail()}" for w in self.workers[-3:])
                raise Failed(
                    f"{len(checker.unanswered)} of {len(checker.events)} events unanswered after "
                    f"{timeout_s:g} s: {checker.unanswered[:5]}\n{logs}"
                )
            await checker.poll()

    async def until_more(self, answers: int, timeout_s: float) -> None:
        """Read until so many more answers have come, or none is missing."""
        before, end_s = len(self.checker.answered_s), time.monotonic() + timeout_s
        while len(self.checker.answered_s) < before + answers and (
            self.checker.unanswered or not self.checker.events
        ):
            if time.monotonic() > end_s:
                raise Failed(f"no {answers} more answers in {timeout_s:g} s")
            await self.checker.poll()

    async def watch(self, seconds: float) -> None:
        """Let time pass, reading what arrives."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            await self.checker.poll()

    async def make_topics(self) -> None:
        """Make the topics that were missing."""
        topics = self.checker.topics.all()
        await create_topics(self.stand.kafka_settings, topics, self.partitions)
        await self.checker.follow()

    def redis(self) -> AsyncRedis:
        """A client of the Redis that the workers use."""
        return connect(self.stand.redis_settings)

    async def stored(self) -> int:
        """Tracks whose hash is in Redis."""
        async with self.redis() as client:
            return len([key async for key in client.scan_iter(f"{self.prefix}track:*", 1000)])

    async def until_stored(self, tracks: int, timeout_s: float) -> None:
        """Wait until so many tracks have their hash in Redis."""
        end_s = time.monotonic() + timeout_s
        while (found := await self.stored()) < tracks:
            if time.monotonic() > end_s:
                raise Failed(f"{found} of {tracks} tracks in Redis after {timeout_s:g} s")
            await asyncio.sleep(0.3)

    async def offsets(self) -> list[int]:
        """Committed offsets of the group, by partition of the topic of new tracks."""
        own = {"group": self.group, "topic_new": self.new}
        return await offsets(self.stand.kafka_settings.model_copy(update=own), self.partitions)

    async def committed(self) -> int:
        """Committed offsets, added up."""
        return sum(await self.offsets())

    async def verdict(self) -> Verdict:
        """Stop the workers, read all there is, and judge it."""
        await self.stop()
        await self.checker.read_to_end()
        return self.checker.verdict()

    async def stop(self) -> None:
        """End all workers: gracefully, and by force those that don't end."""
        for worker in self.workers:
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGTERM)
        with contextlib.suppress(Failed):
            await until(lambda: not any(w.running for w in self.workers), "the workers' exit", 25)
        for worker in self.workers:
            worker.kill()


class Stand:
    """A Kafka, a Redis and a server of audio for as long as the context lasts."""

    def __init__(self, *, security: Security | None = None) -> None:
        self.security = security
        self.audio = AudioServer()
        self.counted: Verdict | None = None
        """On the lane that was left last, as far as its topics were read"""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="timbre-faults-"))
            self.folder = Path(folder)
            jars = kafka_jars(ServicesSettings().cache_dir / "kafka")
            self.kafka = self._kafka(self.folder / "kafka", jars)
            self.redis = self._redis(self.folder / "redis")
            for service in (self.kafka, self.redis):
                stack.callback(service.remove)
                service.launch()
            for service in (self.kafka, self.redis):
                await asyncio.to_thread(service.wait_ready)
            self.redis_address = self.redis.address
            if self.security is not None:
                port = await stack.enter_async_context(tls_proxy(self.redis.port, self.security))
                self.redis_address = f"rediss://{HOST}:{port}/0"
            await stack.enter_async_context(self.audio)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def environment(self) -> dict[str, str]:
        """By which workers find the services; without passwords."""
        return {
            "TIMBRE_KAFKA__BOOTSTRAP_SERVERS": self.kafka.address,
            "TIMBRE_REDIS__URL": self.redis_address,
        }

    def _kafka(self, folder: Path, jars: list[Path]) -> Kafka:
        if self.security is None:
            return Kafka(folder, jars)
        return GuardedKafka(folder, jars, self.security)

    def _redis(self, folder: Path) -> Redis:
        if self.security is None:
            return Redis(folder)
        return GuardedRedis(folder, self.security.password)

    @property
    def kafka_settings(self) -> KafkaSettings:
        if isinstance(self.kafka, GuardedKafka):
            return self.kafka.client_settings()
        return KafkaSettings(bootstrap_servers=self.kafka.address)

    @property
    def redis_settings(self) -> RedisSettings:
        if self.security is None:
            return RedisSettings(url=SecretStr(self.redis_address))
        return RedisSettings(
            url=SecretStr(self.redis_address),
            password=SecretStr(self.security.password),
            ssl_ca_file=self.security.ca_file,
        )

    @property
    def connection(self) -> dict[str, Any]:
        """By which aiokafka reaches the broker."""
        return client_options(self.kafka_settings)

    @asynccontextmanager
    async def lane(
        self, name: str, partitions: int = 4, *, missing: Container[str] = ()
    ) -> AsyncIterator[Lane]:
        """New topics; the workers on them are ended at the end, and the services made whole.

        Parameters
        ----------
        missing
            Of `tags`, `features`, `dead-letter`: topics that `Lane.make_topics` makes later.
        """
        self.audio.requests.clear()
        name = f"{name}-{uuid.uuid4().hex[:8]}"
        topics = Topics(
            new=(f"{name}.new", f"{name}.backfill"),
            tags=f"{name}.tags",
            features=f"{name}.features",
            dead_letter=f"{name}.dead-letter",
        )
        made = [topic for topic in topics.all() if topic.partition(".")[2] not in missing]
        await create_topics(self.kafka_settings, made, partitions)
        async with Checker(self.connection, topics, self.audio.served) as checker:
            lane = Lane(self, name, partitions, checker)
            try:
                yield lane
            finally:
                self.counted = checker.verdict()
                for worker in lane.workers:
                    worker.signal(signal.SIGCONT)
                    worker.kill()
                self.audio.released.set()
                self.audio.released = asyncio.Event()
                self.audio.delay_s = 0.0
                for service in (self.kafka, self.redis):
                    if service.running:
                        service.resume()
                    else:
                        await asyncio.to_thread(service.start)

"""A real `timbre worker` as a process of its own, and what it says on its topics and its port."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import ConsumerRecord
from prometheus_client.parser import text_string_to_metric_families

from worker.kafka import connection
from worker.settings import KafkaSettings

TIMBRE = Path(sys.executable).with_name("timbre")
START_TIMEOUT_S = 90
PORT = re.compile(r"metrics and health on port (\d+)")
OWN = ("group", *(name for name in KafkaSettings.model_fields if name.startswith("topic_")))
"""Settings that keep workers on one Kafka apart."""


def environment(own: KafkaSettings, redis_url: str, prefix: str, **more: str) -> dict[str, str]:
    """The environment of a worker with topics and keys of its own; `more` are further settings.

    The fast bundle starts sooner; what is said of the default one must ask for it.
    """
    given = {
        "TIMBRE_REDIS__URL": redis_url,
        "TIMBRE_REDIS__PREFIX": prefix,
        "TIMBRE_HTTP__PORT": "0",
        "TIMBRE_WORKER__BUNDLE": "fast",
        "TIMBRE_KAFKA__SESSION_TIMEOUT_S": "6",
        "TIMBRE_FETCH__ALLOWED_NETWORKS": '["127.0.0.0/8"]',
    }
    for name in ("bootstrap_servers", *OWN):
        given[f"TIMBRE_KAFKA__{name.upper()}"] = getattr(own, name)
    return os.environ | given | more


def metric(told: str, name: str, **labels: str) -> float:
    """The sum of the samples of that full name with these labels, of what `/metrics` told."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(told)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A running worker: its port is known, so it answers HTTP."""

    process: "subprocess.Popen[str]"
    log: Path
    port: int

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.get("/metrics"), name, **labels)


def start_worker(settings: Mapping[str, str], log: Path) -> "subprocess.Popen[str]":
    """A worker that has only just begun to start."""
    with log.open("w") as output:
        return subprocess.Popen(
            [TIMBRE, "worker"], env=dict(settings), stderr=output, stdout=output, text=True
        )


@asynccontextmanager
async def running_worker(settings: Mapping[str, str], log: Path) -> AsyncIterator[WorkerProcess]:
    """A worker until the context is left, then stopped as an operator would."""
    process = start_worker(settings, log)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (port := PORT.search(log.read_text())):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.05)
        yield WorkerProcess(process, log, int(port[1]))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, 40)
        finally:
            process.kill()


async def send(
    own: KafkaSettings, *events: Mapping[str, Any] | bytes, topic: str | None = None
) -> None:
    """Publish events; a mapping becomes JSON under its track id."""
    async with AIOKafkaProducer(**connection.client_options(own)) as producer:
        for event in events:
            value, key = event, None
            if not isinstance(event, bytes):
                value, key = json.dumps(event).encode(), event["track_id"].encode()
            await producer.send_and_wait(topic or own.topic_new, value, key=key)


async def receive(
    own: KafkaSettings, topic: str, count: int, timeout_s: float = 90
) -> list["ConsumerRecord[bytes, bytes]"]:
    """The first `count` messages of a topic."""
    messages = list[ConsumerRecord[bytes, bytes]]()
    async with (
        asyncio.timeout(timeout_s),
        AIOKafkaConsumer(
            topic, **connection.client_options(own), auto_offset_reset="earliest"
        ) as reader,
    ):
        while len(messages) < count:
            messages.append(await reader.getone())
    return messages


async def receive_json(
    own: KafkaSettings, topic: str, count: int, timeout_s: float = 90
) -> dict[str, dict[str, Any]]:
    """The same as objects, by key."""
    return {
        message.key.decode(): json.loads(message.value)
        for message in await receive(own, topic, count, timeout_s)
    }

"""Every query of the dashboard, asked of a real Prometheus that scraped a working worker."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import time
import wave
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import yaml

from model.bundle import Bundle
from tests.conftest import MakeTopics
from tests.unit.deploy.compose import ROOT, services
from tests.worker_process import TIMBRE, environment
from worker.kafka.connection import producer
from worker.services.service import free_ports
from worker.settings import KafkaSettings

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/timbre.json").read_text())
QUERIES = [
    (panel["title"], target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}
FINISHED = "sum(timbre_tracks_total) or vector(0)"
UNFINISHED = "(sum(timbre_in_flight) + sum(timbre_consumer_lag))"
SCRAPE_S = 1
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
WORK_TIMEOUT_S = 90.0
WAVES = 2
"""A rate is the difference of two scrapes: what is counted for the first time shows none."""

Series = list[dict[str, Any]]


def filled(query: str) -> str:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def healthcheck(url: str) -> subprocess.CompletedProcess[str]:
    """What a container's healthcheck runs."""
    return subprocess.run(
        [sys.executable, ROOT / "deploy/healthcheck.py", url],
        capture_output=True,
        text=True,
        check=False,
    )


def chord(path: Path, seconds: float, *frequencies_hz: float) -> Path:
    at_s = np.arange(int(seconds * 16_000)) / 16_000
    samples = np.mean([np.sin(2 * np.pi * f * at_s) for f in frequencies_hz], axis=0)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((samples * 20_000).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
async def kafka_of_worker(topics: MakeTopics) -> KafkaSettings:
    return await topics(partitions=2)


@contextmanager
def running(
    command: Sequence[str | Path], ready: str, log: Path, environment: Mapping[str, str]
) -> Iterator[None]:
    """A server process, from when the URL `ready` answers 200 until the end of the context."""
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while healthcheck(ready).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def worker(
    kafka_of_worker: KafkaSettings, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The address of a worker, started as its image starts it, and where it may read files."""
    music = tmp_path_factory.mktemp("music")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    settings = environment(
        kafka_of_worker,
        redis_url,
        f"{kafka_of_worker.group}:",
        TIMBRE_FETCH__FILE_ROOTS=json.dumps([str(music)]),
        TIMBRE_FETCH__ATTEMPTS="2",
        TIMBRE_FETCH__BACKOFF_INITIAL_S="0.05",
        TIMBRE_FETCH__SPOOL_DIR=str(tmp_path_factory.mktemp("spool")),
        TIMBRE_WORKER__ATTEMPTS="2",
        TIMBRE_WORKER__BACKOFF_INITIAL_S="0.05",
        TIMBRE_DECODE__PROCESSES="1",
        TIMBRE_HTTP__PORT=address.partition(":")[2],
    )
    log = tmp_path_factory.mktemp("worker") / "log"
    with running([TIMBRE, "worker"], f"http://{address}/health/ready", log, settings):
        yield address, music


@pytest.fixture(scope="module")
def prometheus(worker: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus with the compose file's flags and configuration.

    Only the worker's address, which compose's DNS knows, and the interval are others.
    """
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}
    (job,) = configuration["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [worker[0]]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))

    address = f"127.0.0.1:{free_ports(1)[0]}"
    given = dict(flag.split("=") for flag in services()["prometheus"]["command"])
    ours = {
        "--config.file": folder / "prometheus.yml",
        "--storage.tsdb.path": folder / "data",
        "--web.listen-address": address,
    }
    command = ["prometheus", *(f"{name}={value}" for name, value in (given | ours).items())]
    with running(command, f"http://{address}/-/ready", folder / "log", os.environ):
        yield address


async def ask(prometheus: str, path: str, **parameters: str) -> Any:
    """What Prometheus answers; an error is a failure of the test."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{prometheus}/api/v1/{path}", params=parameters) as response,
    ):
        answer = await response.json()
    assert answer["status"] == "success", answer
    assert not answer.get("warnings"), answer
    return answer["data"]


async def until_told(prometheus: str, query: str) -> None:
    """Wait until a query of a comparison gives 1."""
    async with asyncio.timeout(WORK_TIMEOUT_S):
        while await value(prometheus, query) != 1:
            await asyncio.sleep(SCRAPE_S / 2)


async def value(prometheus: str, query: str) -> float:
    (series,) = (await ask(prometheus, "query", query=query))["result"]
    return float(series["value"][1])


@pytest.fixture(scope="module")
async def scraped(worker: tuple[str, Path], prometheus: str, kafka_of_worker: KafkaSettings) -> str:
    """The address of a Prometheus that saw the worker tag, answer from the cache, retry and fail.

    A wave holds the same kinds of tracks as the one before, so that every rate has two scrapes.
    """
    _, music = worker
    closed = f"http://127.0.0.1:{free_ports(1)[0]}/gone.mp3"
    sent = 0
    async with producer(kafka_of_worker) as kafka:
        for number in range(WAVES):
            new = chord(music / f"new-{number}.wav", 7, 220, 277 + number)
            old = chord(music / f"old-{number}.wav", 4, 440, 550 + number)
            bad = music / f"bad-{number}.mp3"
            bad.write_bytes(bytes(range(256)) * 8)
            tracks = [
                (kafka_of_worker.topic_new, f"new-{number}", new.as_uri()),
                (kafka_of_worker.topic_backfill, f"old-{number}", old.as_uri()),
                (kafka_of_worker.topic_new, f"bad-{number}", bad.as_uri()),
                (kafka_of_worker.topic_new, f"gone-{number}", closed),
            ]
            again = (kafka_of_worker.topic_new, f"again-{number}", new.as_uri())
            for batch in (tracks, [again]):
                for topic, track_id, uri in batch:
                    event = {"track_id": track_id, "audio": {"uri": uri}}
                    await kafka.send_and_wait(
                        topic, json.dumps(event).encode(), key=track_id.encode()
                    )
                sent += len(batch)
                await until_told(prometheus, f"({FINISHED}) >= bool {sent}")
    # The lag is measured every few seconds.
    await until_told(prometheus, f"{UNFINISHED} == bool 0")
    await asyncio.sleep(2 * SCRAPE_S)
    return prometheus


@pytest.mark.parametrize(
    ("title", "query"), QUERIES, ids=[f"{n}-{title}" for n, (title, _) in enumerate(QUERIES)]
)
async def test_a_query_of_the_dashboard_finds_its_data(
    scraped: str, title: str, query: str
) -> None:
    now_s = time.time()
    series: Series = (await ask(scraped, "query", query=filled(query)))["result"]
    await ask(
        scraped,
        "query_range",
        query=filled(query),
        start=str(now_s - 60),
        end=str(now_s),
        step="5",
    )
    assert series, f"{title}: nothing found"
    for one in series:
        assert math.isfinite(float(one["value"][1])), one
        assert all(one["metric"].values()), one


async def test_the_numbers_are_those_of_what_was_submitted(
    scraped: str, worker: tuple[str, Path], kafka_of_worker: KafkaSettings
) -> None:
    sizes = {path.name: path.stat().st_size for path in worker[1].iterdir()}
    fetched = sum(sizes.values()) + sum(sizes[f"new-{number}.wav"] for number in range(WAVES))
    stages = {"fetch": 5, "decode": 3, "batch": 2, "vote": 2, "publish": 3, "store": 3, "total": 3}
    in_each_wave = {
        f'timbre_events_total{{topic="{kafka_of_worker.topic_new}"}}': 4,
        f'timbre_events_total{{topic="{kafka_of_worker.topic_backfill}"}}': 1,
        'timbre_tracks_total{outcome="tagged", priority="upload"}': 1,
        'timbre_tracks_total{outcome="tagged", priority="backfill"}': 1,
        'timbre_tracks_total{outcome="cached", priority="upload"}': 1,
        'timbre_tracks_total{outcome="dead_letter"}': 2,
        'timbre_dead_letters_total{code="audio_unreadable"}': 1,
        'timbre_dead_letters_total{code="fetch_unavailable"}': 1,
        'timbre_retries_total{stage="fetch", code="fetch_unavailable"}': 1,
        'timbre_cache_lookups_total{result="hit"}': 1,
        'timbre_cache_lookups_total{result="miss"}': 3,
        'timbre_windows_total{kind="voted"}': 5,
        "timbre_batch_windows_sum": 5,
        'timbre_labels_total{head="genre"}': 3,
        "timbre_end_to_end_seconds_count": 3,
        "timbre_in_flight": 0,
        "timbre_consumer_lag": 0,
        "timbre_queue_windows": 0,
        "timbre_decoder_restarts_total": 0,
        **{f'timbre_stage_seconds_count{{stage="{stage}"}}': n for stage, n in stages.items()},
    }
    found = {series: await value(scraped, f"sum({series}) or vector(0)") for series in in_each_wave}
    assert found == {series: WAVES * number for series, number in in_each_wave.items()}
    assert await value(scraped, "timbre_fetched_bytes_total") == fetched
    assert await value(scraped, "timbre_audio_seconds_total") == pytest.approx(11 * WAVES, abs=0.1)
    assert await value(scraped, "sum(timbre_end_to_end_seconds_sum)") > 0
    (build,) = (await ask(scraped, "query", query="timbre_build_info"))["result"]
    bundle = Bundle.load("fast")
    told = {"model": bundle.name, "model_version": bundle.version}
    assert build["metric"].items() >= told.items()


async def test_the_variable_of_the_dashboard_lists_the_workers(
    scraped: str, worker: tuple[str, Path]
) -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert variable["definition"] == "label_values(timbre_build_info, instance)"
    workers = await ask(scraped, "label/instance/values", **{"match[]": "timbre_build_info"})
    assert workers == [worker[0]]


async def test_a_container_that_is_not_ready_fails_its_healthcheck(
    worker: tuple[str, Path],
) -> None:
    wrong = await asyncio.to_thread(healthcheck, f"http://{worker[0]}/health/no-such")
    nobody = await asyncio.to_thread(
        healthcheck, f"http://127.0.0.1:{free_ports(1)[0]}/health/ready"
    )
    assert (wrong.returncode, nobody.returncode) == (1, 1)
    assert "refused" in nobody.stdout


async def test_a_proxy_that_a_container_is_given_is_not_asked_for_its_health(
    worker: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    answer = await asyncio.to_thread(healthcheck, f"http://{worker[0]}/health/live")
    assert answer.returncode == 0, answer.stdout


def test_prometheus_accepts_the_configuration_of_the_compose_file() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    subprocess.run(
        ["promtool", "check", "config", ROOT / "deploy/prometheus/prometheus.yml"], check=True
    )

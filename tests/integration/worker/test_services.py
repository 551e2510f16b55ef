import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import redis
from aiokafka import AIOKafkaConsumer

from tests.conftest import MakeTopic, MakeTopics
from tests.tls import GuardedKafka
from tests.worker_process import TIMBRE, receive, send
from worker.errors import ServicesUnavailable
from worker.kafka.connection import client_options, producer, started
from worker.services import service
from worker.services.kafka import Kafka
from worker.services.local import Addresses, local_services
from worker.services.redis import Redis
from worker.services.topics import create_topics
from worker.settings import KafkaSettings, load

WITHOUT_TLS = {"ssl_ca_file": None}
WITHOUT_PASSWORD = {"sasl_username": None, "sasl_password": None}


async def read(kafka: KafkaSettings, topic: str, count: int) -> list[bytes]:
    return [message.value for message in await receive(kafka, topic, count)]


async def test_a_topic_made_by_the_factory_carries_messages(
    kafka_settings: KafkaSettings, topic: MakeTopic
) -> None:
    name = await topic("notes")
    await send(kafka_settings, b"la", topic=name)
    assert await read(kafka_settings, name, 1) == [b"la"]


async def test_making_a_topic_twice_leaves_it_as_it_is(
    kafka_settings: KafkaSettings, topic: MakeTopic
) -> None:
    name = await topic("notes", partitions=2)
    await create_topics(kafka_settings, [name], 5)
    async with AIOKafkaConsumer(name, **client_options(kafka_settings)) as consumer:
        assert consumer.partitions_for_topic(name) == {0, 1}


async def test_a_worker_gets_topics_and_a_group_of_its_own(topics: MakeTopics) -> None:
    one, other = await topics(), await topics()
    assert one.topic_new != other.topic_new
    assert one.group != other.group


async def test_topics_at_an_address_without_kafka_say_what_to_check() -> None:
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:9")
    with pytest.raises(ServicesUnavailable, match="TIMBRE_KAFKA__"):
        await create_topics(nowhere, ["notes"], 1)


def test_services_named_by_the_environment_are_used_and_none_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIMBRE_KAFKA__BOOTSTRAP_SERVERS", "broker:9092")
    monkeypatch.setenv("TIMBRE_REDIS__URL", "redis://store:6379/3")
    with local_services(load()) as addresses:
        assert addresses == Addresses("broker:9092", "redis://store:6379/3")
    assert addresses.environment() == {
        "TIMBRE_KAFKA__BOOTSTRAP_SERVERS": "broker:9092",
        "TIMBRE_REDIS__URL": "redis://store:6379/3",
    }


def test_redis_killed_and_started_again_has_the_same_address_and_data(tmp_path: Path) -> None:
    server = Redis(tmp_path / "redis").start()
    address = server.address
    with redis.Redis.from_url(address) as client:
        client.set("genre", "jazz")
        time.sleep(1.1)  # the append-only file is flushed once a second
        server.kill()
        assert not server.running
        server.start()
        assert server.address == address
        assert client.get("genre") == b"jazz"
    server.remove()
    assert not server.folder.exists()


def test_a_paused_redis_answers_once_it_is_resumed(tmp_path: Path) -> None:
    server = Redis(tmp_path / "redis").start()
    try:
        with redis.Redis.from_url(server.address, socket_timeout=0.3, retry=None) as client:
            server.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            server.resume()
            assert client.ping()
    finally:
        server.remove()


async def test_topics_have_as_many_replicas_as_their_cluster_asks_for(
    tmp_path: Path, jars: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one, a cluster that asks for two of each message would refuse all."""
    configuration = Kafka._configuration
    asking = {"default.replication.factor": 2}
    monkeypatch.setattr(Kafka, "_configuration", lambda broker: configuration(broker) | asking)
    broker = Kafka(tmp_path / "kafka", jars).start()
    try:
        with pytest.raises(ServicesUnavailable, match="InvalidReplicationFactor"):
            await create_topics(KafkaSettings(bootstrap_servers=broker.address), ["notes"], 1)
    finally:
        broker.remove()


async def test_a_secured_kafka_serves_by_tls_and_password(secured: GuardedKafka) -> None:
    scram = secured.client_settings()
    plain = scram.model_copy(update={"sasl_mechanism": "PLAIN"})
    await create_topics(scram, ["notes"], 1)
    await send(scram, b"do", topic="notes")
    await send(plain, b"re", topic="notes")
    assert await read(scram, "notes", 2) == [b"do", b"re"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sasl_password": "guess"}, "password is refused.* check .*SASL_USERNAME.*SASL_PASSWORD"),
        ({"sasl_password": "guess", "sasl_mechanism": "PLAIN"}, "is refused.*SASL_PASSWORD"),
        ({"sasl_mechanism": "SCRAM-SHA-256"}, "mechanism is not offered.* check .*SASL_MECHANISM"),
        (WITHOUT_TLS, "certificate is refused: .*issuer.* check .*SSL_CA_FILE"),
        ({"bootstrap_servers": "localhost"}, "refused: Hostname mismatch.* check .*SERVERS"),
        (WITHOUT_TLS | {"security_protocol": "SASL_PLAINTEXT"}, "check .*SECURITY_PROTOCOL"),
        (WITHOUT_PASSWORD | {"security_protocol": "SSL"}, "check .*SECURITY_PROTOCOL"),
    ],
)
async def test_a_secured_kafka_serves_no_other_way_and_why_is_told(
    secured: GuardedKafka, changed: dict[str, str | None], told: str
) -> None:
    known = secured.client_settings().model_dump()
    if changed.get("bootstrap_servers") == "localhost":
        changed = {"bootstrap_servers": f"localhost:{secured.port}"}
    stranger = KafkaSettings.model_validate(known | changed)
    with pytest.raises(ServicesUnavailable, match=told) as caught:
        async with started(producer(stranger), stranger):
            pass
    assert "guess" not in str(caught.value)
    with pytest.raises(ServicesUnavailable, match=told):
        await create_topics(stranger, ["notes"], 1)


def test_a_service_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = Redis(tmp_path / "redis")
    other = Redis(tmp_path / "other").start()
    try:
        server.start()
        server.stop()
        server.port = other.port
        with pytest.raises(ServicesUnavailable, match=r"(?s)redis\.log:.*Address already in use"):
            server.start()
    finally:
        other.remove()


def test_services_end_with_a_starter_that_is_killed() -> None:
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "import tempfile\n"
        "from worker.services.redis import Redis\n"
        "server = Redis(Path(tempfile.mkdtemp(prefix='timbre-killed-'))).start()\n"
        "print(server.pid, server.folder, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        pid, folder = starter.stdout.readline().split()
        assert psutil.pid_exists(int(pid))
        starter.kill()
    deadline = time.monotonic() + 10
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(pid))
    assert not Path(folder).exists()


def test_a_start_that_is_interrupted_ends_what_it_started_and_nothing_else(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"  # as a guard is on a busy machine
    slow.write_text(
        "import runpy, sys, time\n"
        "time.sleep(1)\n"
        f"runpy.run_path({str(service.GUARD)!r}, run_name='__main__')\n"
    )
    script = (
        "import signal\n"
        "from pathlib import Path\n"
        "from worker.services import service\n"
        "from worker.services.redis import Redis\n"
        f"service.GUARD = Path({str(slow)!r})\n"
        f"server = Redis(Path({str(tmp_path / 'redis')!r}))\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
        "try:\n"
        "    server.launch()\n"
        "except KeyboardInterrupt:\n"
        "    server.remove()\n"
        "    print('removed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "removed\n"), done.stderr
    assert not (tmp_path / "redis").exists()
    commands = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not any(str(tmp_path / "redis") in " ".join(command) for command in commands)


def timbre(
    state_dir: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TIMBRE, *arguments],
        env={**os.environ, "TIMBRE_SERVICES__STATE_DIR": str(state_dir), **environment},
        check=False,
        capture_output=True,
        text=True,
    )


def up(state_dir: Path, **environment: str) -> dict[str, str]:
    """What `timbre services up` tells the shell to export."""
    done = timbre(state_dir, "services", "up", **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return dict(line.removeprefix("export ").split("=", 1) for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_up_that_is_ended_while_it_starts_leaves_nothing_that_down_does_not_know(
    number: signal.Signals, tmp_path: Path
) -> None:
    folders = tmp_path / "folders"
    folders.mkdir()
    own = {"TIMBRE_SERVICES__STATE_DIR": str(tmp_path / "state"), "TMPDIR": str(folders)}
    named = {"TIMBRE_KAFKA__BOOTSTRAP_SERVERS", "TIMBRE_REDIS__URL"}
    environment = {name: value for name, value in os.environ.items() if name not in named} | own
    arguments = [str(TIMBRE), "services", "up"]
    earlier = signal.signal(number, signal.SIG_DFL)  # else it would inherit what nohup ignores
    with subprocess.Popen(arguments, env=environment) as command:
        signal.signal(number, earlier)
        while not any(folders.glob("timbre-kafka-*/kafka.log")):
            assert command.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)  # it waits for Kafka, which takes longer
        started = psutil.Process(command.pid).children()
        command.send_signal(number)
        assert command.wait(30) == 128 + number
    assert list(folders.iterdir()) == []
    assert not any(process.is_running() for process in started)


async def test_services_up_stay_until_down_and_start_anew_in_the_same_shell(
    tmp_path: Path,
) -> None:
    shell = up(tmp_path)
    try:
        assert up(tmp_path) == shell
        state = json.loads((tmp_path / "services.json").read_text())
        with redis.Redis.from_url(shell["TIMBRE_REDIS__URL"], retry=None) as client:
            assert client.ping()
            with ThreadPoolExecutor(2) as shells:
                ended = shells.map(lambda _: timbre(tmp_path, "services", "down"), range(2))
            assert [done.stderr for done in ended if done.returncode] == []
            with pytest.raises(redis.ConnectionError):
                client.ping()
        assert not any(Path(folder).exists() for folder in state["folders"]), "no data is left"
        assert not (tmp_path / "services.json").exists()

        anew = up(tmp_path, **shell)
        assert anew.keys() == shell.keys()
        assert not anew.items() & shell.items()
        assert up(tmp_path, **shell) == anew
        with redis.Redis.from_url(anew["TIMBRE_REDIS__URL"], retry=None) as client:
            assert client.ping()
        kafka = KafkaSettings(bootstrap_servers=anew["TIMBRE_KAFKA__BOOTSTRAP_SERVERS"])
        await send(kafka, b"la")
    finally:
        timbre(tmp_path, "services", "down")


def test_up_starts_nothing_where_all_is_named_and_down_has_nothing_to_end(
    tmp_path: Path, kafka: str, redis_url: str
) -> None:
    named = {"TIMBRE_KAFKA__BOOTSTRAP_SERVERS": kafka, "TIMBRE_REDIS__URL": redis_url}
    assert up(tmp_path, **named) == named
    assert list(tmp_path.iterdir()) == []
    assert "Nothing was up" in timbre(tmp_path, "services", "down").stderr


def test_a_state_of_nothing_running_is_not_taken_for_services_that_are_up(
    tmp_path: Path, kafka: str, redis_url: str
) -> None:
    dead = {"kafka": "127.0.0.1:9", "redis": "redis://127.0.0.1:9/0"}
    state = {"addresses": dead, "folders": [], "processes": []}
    (tmp_path / "services.json").write_text(json.dumps(state))
    named = {"TIMBRE_KAFKA__BOOTSTRAP_SERVERS": kafka, "TIMBRE_REDIS__URL": redis_url}
    assert up(tmp_path, **named) == named
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "damaged"),
    [("up", ""), ("down", '{"addresses": {"kaf'), ("up", "[]"), ("down", "{}")],
)
def test_a_damaged_state_is_a_sentence_that_says_what_to_do(
    tmp_path: Path, command: str, damaged: str
) -> None:
    (tmp_path / "services.json").write_text(damaged)
    done = timbre(tmp_path, "services", command)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"timbre: {tmp_path}/services.json is damaged")
    assert "remove the file" in done.stderr


def test_the_terminals_interrupt_does_not_reach_a_service(tmp_path: Path) -> None:
    server = Redis(tmp_path / "redis").start()
    try:
        assert os.getsid(server.pid) != os.getsid(0)
    finally:
        server.remove()

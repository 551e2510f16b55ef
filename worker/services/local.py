"""Kafka and Redis for as long as a context lasts.

Both listen on free loopback ports, keep their data in a temporary folder, and end with their
starter.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from worker.services.jars import Progress, kafka_jars
from worker.services.kafka import Kafka
from worker.services.redis import Redis
from worker.services.service import Service, new_folder
from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the services listen; None for one that is not known."""

    kafka: str | None
    redis: str | None

    def environment(self) -> dict[str, str]:
        """The variables by which any Timbre process finds these services."""
        named = {"TIMBRE_KAFKA__BOOTSTRAP_SERVERS": self.kafka, "TIMBRE_REDIS__URL": self.redis}
        return {name: value for name, value in named.items() if value is not None}


@contextmanager
def local_services(settings: Settings) -> Iterator[Addresses]:
    """Kafka and Redis for as long as the context lasts, then nothing of them.

    A service whose address the settings were given is used where it is and not started.

    Raises
    ------
    ServicesUnavailable
        A service could not be fetched or started.
    """
    with ExitStack() as stack:
        _, addresses = start(settings, given(settings), stack, guarded=True)
        yield addresses


def start(
    settings: Settings,
    named: Addresses,
    stack: ExitStack,
    progress: Progress = lambda done, total: None,
    *,
    guarded: bool,
) -> tuple[Collection[Service], Addresses]:
    """Start what is not named, both at once; `stack` removes it again.

    Returns what was started, and where both listen.
    """
    started: dict[str, Service] = {}

    def launch(service: Service) -> None:
        stack.callback(service.remove)  # its folder is there
        service.launch()
        started[service.name] = service

    if named.redis is None:
        launch(Redis(new_folder("redis"), guarded=guarded))
    if named.kafka is None:
        jars = kafka_jars(settings.services.cache_dir / "kafka", progress)
        launch(Kafka(new_folder("kafka"), jars, guarded=guarded))
    for service in started.values():
        service.wait_ready()
    at = {name: service.address for name, service in started.items()}
    return started.values(), replace(named, **at)


def given(settings: Settings) -> Addresses:
    """The services whose addresses the settings were told, which therefore are not started."""
    kafka, redis = settings.kafka, settings.redis
    return Addresses(
        kafka=kafka.bootstrap_servers if "bootstrap_servers" in kafka.model_fields_set else None,
        redis=redis.url.get_secret_value() if "url" in redis.model_fields_set else None,
    )

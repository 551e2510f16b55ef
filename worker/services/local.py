"""Kafka and Redis for as long as a context lasts.

Both listen on free loopback ports, keep their data in a temporary folder, and end with their
starter.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from worker.services.jars import Progress, kafka_jars
from worker.services.kafka import Kafka
from worker.services.redis import Redis
from worker.services.service import Service, new_folder
from worker.settings import Settings


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
        started = start(settings, stack, progress, wanted, guarded=True)
        yield addresses_of(settings, started, wanted)


def start(
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


def addresses_of(
    settings: Settings, started: Mapping[str, Service], wanted: Mapping[str, bool]
) -> Addresses:
    """Where the wanted services listen, be they started or given."""
    named = given(settings)
    return Addresses(
        kafka=started["kafka"].address
        if "kafka" in started
        else (named.kafka if wanted["kafka"] else None),
        redis=started["redis"].address
        if "redis" in started
        else (named.redis if wanted["redis"] else None),
    )


def given(settings: Settings) -> Addresses:
    """The services whose addresses the settings were told, which therefore are not started."""
    kafka, redis = settings.kafka, settings.redis
    return Addresses(
        kafka=kafka.bootstrap_servers if "bootstrap_servers" in kafka.model_fields_set else None,
        redis=redis.url.get_secret_value() if "url" in redis.model_fields_set else None,
    )

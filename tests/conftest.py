"""What tests share: a real Kafka, a real Redis, music, and the data beside the project.

Services are started once a session, when the first test asks for one, and end with it. Where
`TIMBRE_KAFKA__BOOTSTRAP_SERVERS` or `TIMBRE_REDIS__URL` name running ones, those are used.
"""

import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from tests.worker_process import OWN
from worker.demo.music import Sample, sample_tracks
from worker.services.jars import kafka_jars
from worker.services.local import local_services
from worker.services.topics import create_topics
from worker.settings import KafkaSettings, RedisSettings, Settings, load

SHARED = Path(__file__).parents[2] / "shared"

UNIT = Path(__file__).parent / "unit"

MakeTopic = Callable[..., Awaitable[str]]
MakeTopics = Callable[..., Awaitable[KafkaSettings]]


def pytest_configure() -> None:
    """Processes inherit what is ignored here, as SIGINT is in the background of a script."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run real servers against the clock may miss it on a busy machine: they get a
    second go and the summary names them; what is broken fails twice."""
    for item in items:
        if not item.path.is_relative_to(UNIT):
            item.add_marker(pytest.mark.flaky(reruns=1, reruns_delay=2))


@pytest.fixture(scope="session")
def given_settings() -> Settings:
    """The settings as the environment has them."""
    return load()


@pytest.fixture(scope="session")
def jars(given_settings: Settings) -> list[Path]:
    """What Kafka is run from."""
    return kafka_jars(given_settings.services.cache_dir / "kafka")


@pytest.fixture(scope="session")
def kafka(given_settings: Settings) -> Iterator[str]:
    """The bootstrap servers of a real Kafka."""
    elsewhere = RedisSettings(url=SecretStr("redis://elsewhere"))
    with local_services(given_settings.model_copy(update={"redis": elsewhere})) as addresses:
        assert addresses.kafka is not None
        yield addresses.kafka


@pytest.fixture(scope="session")
def redis_url(given_settings: Settings) -> Iterator[str]:
    """The URL of a real Redis; tests keep apart by `redis_prefix`."""
    elsewhere = KafkaSettings(bootstrap_servers="elsewhere")
    with local_services(given_settings.model_copy(update={"kafka": elsewhere})) as addresses:
        assert addresses.redis is not None
        yield addresses.redis


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of that Redis, to see what Timbre keeps there."""
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def redis_prefix() -> str:
    """A start for keys that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}:"


@pytest.fixture(scope="session")
def kafka_settings(given_settings: Settings, kafka: str) -> KafkaSettings:
    """How to reach Kafka, with the default topics, which don't exist."""
    return given_settings.kafka.model_copy(update={"bootstrap_servers": kafka})


@pytest.fixture(scope="session")
def topic(kafka_settings: KafkaSettings) -> MakeTopic:
    """`await topic("name", partitions=1)`: makes a topic of that name and an ending of its own."""

    async def make(name: str = "topic", *, partitions: int = 1) -> str:
        unique = f"{name}-{uuid.uuid4().hex[:12]}"
        await create_topics(kafka_settings, [unique], partitions)
        return unique

    return make


@pytest.fixture(scope="session")
def topics(kafka_settings: KafkaSettings) -> MakeTopics:
    """`await topics(partitions=1)`: settings with a group and all of a worker's topics, all new."""

    return partial(new_topics, kafka_settings)


async def new_topics(kafka: KafkaSettings, *, partitions: int = 1) -> KafkaSettings:
    """Settings of that Kafka with a group and all of a worker's topics, all new."""
    ending = uuid.uuid4().hex[:12]
    own = kafka.model_copy(update={name: f"{getattr(kafka, name)}-{ending}" for name in OWN})
    await create_topics(own, own.topics, partitions)
    return own


@pytest.fixture(scope="session")
def music_files(given_settings: Settings) -> list[Sample]:
    """The demo's sample tracks, a style each, in four codecs."""
    return sample_tracks(given_settings.services.cache_dir / "music")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data folder beside the project, `../shared`."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not there: this test measures on its recordings")
    return SHARED

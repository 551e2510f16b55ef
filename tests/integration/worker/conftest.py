"""A Kafka that not everybody may enter, for tests of what it refuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tls import GuardedKafka, issue_security


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory, jars: list[Path]) -> Iterator[GuardedKafka]:
    """It speaks TLS only, to alice."""
    folder = tmp_path_factory.mktemp("secured")
    security = issue_security(folder, "alice", "correct-horse")
    broker = GuardedKafka(folder / "kafka", jars, security).start()
    yield broker
    broker.remove()

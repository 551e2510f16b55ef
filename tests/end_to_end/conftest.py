"""A stand of its own for tests that stop, freeze and kill services."""

from collections.abc import AsyncIterator

import pytest

from tests.faults.stand import Stand


@pytest.fixture(scope="session")
async def stand() -> AsyncIterator[Stand]:
    """A Kafka and a Redis that no other test relies on, and a server of audio."""
    async with Stand() as stand:
        yield stand

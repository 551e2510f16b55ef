"""What aiokafka does wrong, put right in place, as none of its options reaches it.

Private parts of it are replaced, so its version is pinned exactly.
"""

import asyncio
import time
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from aiokafka import client as client_module
from aiokafka.client import AIOKafkaClient
from aiokafka.codec import gzip_encode
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import KafkaConnectionError, KafkaError, UnknownTopicOrPartitionError, for_code
from aiokafka.protocol.commit import OffsetFetchRequest

from worker.kafka import record_batches

CONNECT_TIMEOUT_S = 10.0
# Aiokafka compresses on the event loop, at level 9: seconds for a megabyte in few letters, which
# anybody may send to be a dead letter. At this one it takes 20 ms, to much the same size.
GZIP_LEVEL = 4


def mend() -> None:
    """Mend every aiokafka client that this process makes from now on."""
    record_batches.read_whatever_was_sent()
    gzip_encode.__defaults__ = (GZIP_LEVEL,)
    Fetcher.close = _close
    client_module.create_conn = _connect
    AIOKafkaClient.bootstrap = _bootstrap_or_tell
    AIOKafkaClient._metadata_update = _paced
    GroupCoordinator._do_commit_offsets = _commit_to_what_is_there
    GroupCoordinator._send_req = _send_and_be_refused


_update = AIOKafkaClient._metadata_update


async def _paced(client: Any, *args: Any) -> Any:
    """Ask for metadata at a bounded rate.

    Where a partition has no leader, as after a broker was stopped, aiokafka's fetcher and sender
    ask again as soon as they are answered or refused: some thousand times a second. It has a pause
    for retries (`retry_backoff_ms`), but doesn't take it here.
    """
    await asyncio.sleep(getattr(client, "next_update_s", 0.0) - time.monotonic())
    client.next_update_s = time.monotonic() + client._retry_backoff
    return await _update(client, *args)


_create = client_module.create_conn


async def _connect(*args: Any, **options: Any) -> Any:
    """Connect within a time of its own.

    Aiokafka gives a broker that is silent as long as a request may take, and makes one connection
    at a time: those to other brokers wait meanwhile, and so does what tells who leads instead.
    """
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await _create(*args, **options)
    except (OSError, KafkaError) as error:
        _obstacle.set(error)
        raise


_bootstrap = AIOKafkaClient.bootstrap
_obstacle = ContextVar[BaseException | None]("the last connection's", default=None)


async def _bootstrap_or_tell(client: Any) -> None:
    """Bootstrap; where no server can be reached, the error's cause is what the last one failed of.

    A wrong password, a certificate and a server that is down are otherwise the same error.
    """
    _obstacle.set(None)
    try:
        await _bootstrap(client)
    except KafkaConnectionError as error:
        raise error from _obstacle.get()


async def _close(fetcher: Any) -> None:
    """End all fetches, whatever they end with.

    aiokafka awaits them one by one, and the first that was waiting to try again, as all are while
    no broker answers, ends the closing with its `CancelledError`: what was to be closed after it,
    and faust's thread around it, hang until the stop's deadline.
    """
    fetcher._closed = True
    tasks = [fetcher._fetch_task, *fetcher._pending_tasks]
    for task in tasks:
        task.cancel()
    for waiter in list(fetcher._fetch_waiters):
        fetcher._notify(waiter)
    await asyncio.gather(*tasks, return_exceptions=True)


_commit = GroupCoordinator._do_commit_offsets


async def _commit_to_what_is_there(coordinator: Any, assignment: Any, offsets: Any) -> None:
    """Commit, short of partitions that were deleted.

    Aiokafka tries those for ever, and neither another commit nor a rebalance comes to its end
    meanwhile.
    """
    try:
        await _commit(coordinator, assignment, offsets)
    except UnknownTopicOrPartitionError:
        for tp, offset in offsets.items():
            with suppress(UnknownTopicOrPartitionError):
                await _commit(coordinator, assignment, {tp: offset})


_send = GroupCoordinator._send_req


async def _send_and_be_refused(coordinator: Any, request: Any) -> Any:
    """Send, and raise it where committed offsets are refused.

    Aiokafka reads errors of single partitions alone. To a broker that no longer coordinates the
    group, or has just begun to, it would believe that nothing was ever committed, and all is read
    again.
    """
    response = await _send(coordinator, request)
    if isinstance(request, OffsetFetchRequest) and response.error_code:
        error = for_code(response.error_code)()
        if error.retriable:
            coordinator.coordinator_dead()
        raise error
    return response

"""`timbre services up|down`."""

import asyncio
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from worker.commands import console
from worker.services import detached
from worker.services.jars import Progress as Fetched
from worker.services.topics import create_topics
from worker.settings import Settings

PARTITIONS = 4
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(settings: Settings) -> None:
    """Start what is not there yet, with Timbre's topics, and print what to export."""
    remarks = console.err()
    for number in INTERRUPTS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, _leave)
    with fetching() as fetched:
        addresses, new = detached.up(settings, fetched)
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": addresses.kafka})
    asyncio.run(create_topics(kafka, kafka.topics, PARTITIONS))
    state = "are up" if new else "were up already"
    remarks.print(
        f"Kafka and Redis {state}; `timbre services down` ends what was started. For the shell:",
        style="dim",
    )
    for name, value in addresses.environment().items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


def _leave(number: int, _: object) -> NoReturn:
    """Leave once: another must not cut short the removal of what was started."""
    for interrupt in INTERRUPTS:
        signal.signal(interrupt, signal.SIG_IGN)
    sys.exit(128 + number)


def down(settings: Settings) -> None:
    """End them."""
    ended = detached.down(settings)
    console.err().print("All that was up has ended." if ended else "Nothing was up.", style="dim")


@contextmanager
def fetching() -> Iterator[Fetched]:
    """Shows how far Kafka's download, the first time, has come; nothing where all is there."""
    remarks = console.err()
    with console.progress(remarks, "{task.description}") as progress:

        def fetched(done: int, total: int) -> None:
            if done == 0:
                remarks.print(f"Fetching Apache Kafka: {total} jars, this first time only")
                progress.add_task("Fetching", total=total)
            for task in progress.tasks:
                progress.update(task.id, completed=done)

        yield fetched

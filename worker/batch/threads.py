"""Threads for calls that may hang.

A thread can't be ended from outside. One that does not come back is left behind and counted, and
new ones take its place; all are daemons, so that none holds up the exit of the process.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from worker.errors import DeviceHung

T = TypeVar("T")


class Crew:
    """A few threads that share a queue of calls and are replaced when a call hangs."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._threads = threads
        self._left_behind: list[threading.Thread] = []
        self._recruit()

    @property
    def stuck(self) -> int:
        """Threads left behind that have not come back since."""
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        return len(self._left_behind)

    async def run(self, calls: Sequence[Callable[[], T]], timeout_s: float) -> list[T]:
        """Results of all calls, in their order, or the first error once all have ended.

        Raises DeviceHung when some have not ended after `timeout_s`; new threads then take over.
        """
        futures = [asyncio.wrap_future(self._submit(call)) for call in calls]
        done, late = await asyncio.wait(futures, timeout=timeout_s)
        if late:
            for future in late:
                future.cancel()
            for future in done:
                future.exception()  # seen; what hung is the error
            self._replace()
            raise DeviceHung(
                f"The device did not finish within {timeout_s:g} s; if it is only slow, "
                "raise TIMBRE_BATCH__TIMEOUT_S."
            )
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Let the threads end once they are through with what was submitted."""
        for _ in self._crew:
            self._calls.put(None)

    def _recruit(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._crew = [
            threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
            for _ in range(self._threads)
        ]
        for thread in self._crew:
            thread.start()

    def _replace(self) -> None:
        """Leave the threads behind: those that are not stuck end by themselves."""
        self.close()
        self._left_behind += self._crew
        self._recruit()

    def _submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def settle() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(settle)
        return future


def _work(calls: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # or its arguments would live on until the next one

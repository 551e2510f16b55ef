"""The ledger of one partition: events finish in any order, and are acknowledged in offset order.

Faust commits the offset behind an acknowledged event even where an earlier one is unfinished, so an
event may be acknowledged only once all before it are. How far the partition may run ahead of its
oldest unfinished event is bounded, since all of that is done again after a crash.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Entry:
    acknowledge: Callable[[], object]
    finished: bool = False


class Ledger:
    """Unacknowledged events of one partition, oldest first.

    Parameters
    ----------
    max_ahead
        Events that may be open or finished at once, counted from the oldest unfinished one.
    """

    def __init__(self, max_ahead: int) -> None:
        self._max_ahead = max_ahead
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self.next_offset: int | None = None

    async def room(self) -> None:
        """Wait until another event may be opened."""
        await self._room.wait()

    def open(self, offset: int, acknowledge: Callable[[], object]) -> None:
        """Enter an event; offsets must rise.

        Raises
        ------
        ValueError
            The offset does not lie behind the last one opened.
        """
        if self._entries and offset <= next(reversed(self._entries)):
            raise ValueError(f"offset {offset} was opened out of order")
        if not self._entries:
            self.next_offset = offset
        self._entries[offset] = _Entry(acknowledge)
        self._update_room()

    def finish(self, offset: int) -> None:
        """Mark an event as done and acknowledge what is done from the oldest on.

        After `close` nothing is acknowledged: the partition belongs to somebody else.
        """
        if self._closed:
            return
        self._entries[offset].finished = True
        while self._entries:
            oldest, entry = next(iter(self._entries.items()))
            if not entry.finished:
                break
            del self._entries[oldest]
            entry.acknowledge()
            self.next_offset = oldest + 1
        self._update_room()

    def close(self) -> None:
        """Acknowledge nothing more: what is open is delivered again."""
        self._closed = True

    def _update_room(self) -> None:
        if len(self._entries) < self._max_ahead:
            self._room.set()
        else:
            self._room.clear()

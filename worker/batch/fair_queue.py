"""The queue before the batcher: which windows go into the next batch.

Uploads go before backfill, of which a share passes all the same; within a class the tracks take
turns, window by window, so that a long track never holds up a short one. The queue is bounded, as
is the part of it that one track may fill; what finds no room waits at the door, where the track
with the fewest windows inside comes first.

Nothing here waits or computes: the batcher calls it from the event loop only.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from schemas.events import Priority
from worker.errors import TimbreError, TrackCancelled
from worker.windows import Windows


class Ticket:
    """The right of one track to compute: until `deadline`, in the event loop's time, or `cancel`.

    `track_key` tells tracks apart; the windows of one track share their turns.
    """

    def __init__(self, track_key: str, deadline: float) -> None:
        self.track_key = track_key
        self.deadline = deadline
        self.cancelled = False
        self.requests: set[Request] = set()

    def cancel(self) -> None:
        """Take the track back: what waits is dropped and raises TrackCancelled to its caller."""
        self.cancelled = True
        for request in tuple(self.requests):
            request.fail(TrackCancelled(f"Tagging of {self.track_key} was cancelled."))


@dataclass(eq=False)
class Request:
    """Windows of one track on their way: outside the queue, then inside, then taken for a batch.

    `windows` is (n, window_samples), read in place.
    """

    windows: Windows
    ticket: Ticket
    priority: Priority
    answer: asyncio.Future[Any]
    since: float
    entered: int = 0
    taken: int = 0

    @property
    def inside(self) -> int:
        return self.entered - self.taken

    @property
    def outside(self) -> int:
        return len(self.windows) - self.entered

    def over(self, now: float) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.answer.done() or now >= self.ticket.deadline

    def fail(self, error: TimbreError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring windows of one request, taken for one batch."""

    request: Request
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def windows(self) -> Windows:
        return self.request.windows[self.start : self.stop]


class _Line:
    """The tracks of one class in the order of their turns, and what waits at its door."""

    def __init__(self) -> None:
        self.tracks: OrderedDict[str, deque[Request]] = OrderedDict()
        self.door: list[Request] = []
        self.depth = 0

    def inside(self, track_key: str) -> int:
        return sum(request.inside for request in self.tracks.get(track_key, ()))

    def requests(self) -> Iterator[Request]:
        for requests in self.tracks.values():
            yield from requests

    def let_in(self, room: int, track_room: int) -> int:
        """Let windows in from the door; the room that is left."""
        while room and (request := self._next_at_door(track_room)):
            count = min(room, track_room - self.inside(request.ticket.track_key), request.outside)
            waiting = self.tracks.setdefault(request.ticket.track_key, deque())
            if request.inside == 0:
                waiting.append(request)
            request.entered += count
            self.depth += count
            room -= count
            if request.outside == 0:
                self.door.remove(request)
        return room

    def _next_at_door(self, track_room: int) -> Request | None:
        """Of those whose track has room, the one whose track has least inside, then the first."""
        return min(
            (r for r in self.door if self.inside(r.ticket.track_key) < track_room),
            key=lambda r: self.inside(r.ticket.track_key),
            default=None,
        )

    def take(self, count: int) -> dict[Request, int]:
        """Take up to `count` windows, one of each track in turn: how many of which request."""
        taken: dict[Request, int] = {}
        for _ in range(min(count, self.depth)):
            track_key, waiting = next(iter(self.tracks.items()))
            request = waiting[0]
            request.taken += 1
            self.depth -= 1
            taken[request] = taken.get(request, 0) + 1
            if request.inside == 0:
                waiting.popleft()
            if waiting:
                self.tracks.move_to_end(track_key)
            else:
                del self.tracks[track_key]
        return taken

    def discard(self, request: Request) -> None:
        """Drop what of a request was not taken yet."""
        if request in self.door:
            self.door.remove(request)
        if request.inside:
            self.depth -= request.inside
            waiting = self.tracks[request.ticket.track_key]
            waiting.remove(request)
            if not waiting:
                del self.tracks[request.ticket.track_key]
        request.entered = request.taken = len(request.windows)


class FairQueue:
    """Bounded queue of windows of many tracks in two classes.

    Parameters
    ----------
    max_windows : int
        Windows inside at most.
    track_max_windows : int
        Windows of one track inside at most.
    backfill_share : float
        Share of what is taken that goes to backfill while uploads wait too.
    """

    def __init__(self, max_windows: int, track_max_windows: int, backfill_share: float) -> None:
        self._max_windows = max_windows
        self._track_max_windows = track_max_windows
        self._backfill_share = backfill_share
        self._backfill_credit = 0.0
        self._lines: dict[Priority, _Line] = {"upload": _Line(), "backfill": _Line()}

    @property
    def depth(self) -> int:
        """Windows inside."""
        return sum(line.depth for line in self._lines.values())

    @property
    def oldest_since(self) -> float | None:
        """Since when the oldest window inside has waited; None where nothing waits."""
        waiting = (r.since for line in self._lines.values() for r in line.requests())
        return min(waiting, default=None)

    def put(self, request: Request) -> None:
        """Queue a request: at once as far as there is room, the rest when there is."""
        if request.outside:
            self._lines[request.priority].door.append(request)
            self._let_in()

    def take(self, count: int, now: float) -> list[Piece]:
        """Take up to `count` windows for a batch; requests that are over are dropped instead."""
        for line in self._lines.values():
            for request in [r for r in line.requests() if r.over(now)]:
                line.discard(request)
        self._let_in()
        uploads, backfill = self._lines["upload"], self._lines["backfill"]
        for_backfill = min(backfill.depth, max(self._kept(count), count - uploads.depth))
        taken = uploads.take(count - for_backfill) | backfill.take(for_backfill)
        self._let_in()
        return [Piece(request, request.taken - n, request.taken) for request, n in taken.items()]

    def discard(self, request: Request) -> None:
        """Drop what of a request was not taken yet, and let others in for it."""
        self._lines[request.priority].discard(request)
        self._let_in()

    def _let_in(self) -> None:
        room = self._max_windows - self.depth
        for priority in ("upload", "backfill"):
            room = self._lines[priority].let_in(room, self._track_max_windows)

    def _kept(self, count: int) -> int:
        """Windows of the next `count` that are backfill's; fractions are saved up for later."""
        if not (self._lines["upload"].depth and self._lines["backfill"].depth):
            return 0
        self._backfill_credit += self._backfill_share * count
        kept = min(int(self._backfill_credit), count)
        self._backfill_credit -= kept
        return kept

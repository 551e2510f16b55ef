"""The fair queue: which windows are next, and what is let in."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from schemas.events import Priority
from worker.batch.fair_queue import FairQueue, Piece, Request, Ticket
from worker.errors import TrackCancelled

NOW = 1000.0


def a_queue(
    *, max_windows: int = 1000, track_max: int = 1000, backfill_share: float = 0.0
) -> FairQueue:
    return FairQueue(max_windows, track_max, backfill_share)


def a_request(track: str, windows: int, priority: Priority = "upload") -> Request:
    return Request(
        windows=np.zeros((windows, 4), np.float32),
        ticket=Ticket(track, NOW + 1),
        priority=priority,
        answer=asyncio.get_running_loop().create_future(),
        since=NOW,
    )


def counts(pieces: list[Piece]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for piece in pieces:
        total[piece.request.ticket.track_key] += len(piece)
    return dict(total)


async def test_tracks_take_turns_window_by_window() -> None:
    queue = a_queue()
    for track, windows in (("long", 500), ("short", 1), ("middle", 3)):
        queue.put(a_request(track, windows))
    assert counts(queue.take(8, NOW)) == {"long": 4, "short": 1, "middle": 3}


async def test_a_hundred_short_tracks_beside_a_long_one_leave_in_two_batches() -> None:
    queue = a_queue()
    queue.put(a_request("long", 900))
    for i in range(100):
        queue.put(a_request(f"short-{i}", 1))
    first, second = counts(queue.take(64, NOW)), counts(queue.take(64, NOW))
    assert sum(1 for track in (first | second) if track.startswith("short")) == 100
    assert first["long"] == 1


async def test_the_turn_goes_on_where_the_last_batch_ended() -> None:
    queue = a_queue()
    for track in "abc":
        queue.put(a_request(track, 2))
    batches = [counts(queue.take(2, NOW)) for _ in range(3)]
    assert batches == [{"a": 1, "b": 1}, {"c": 1, "a": 1}, {"b": 1, "c": 1}]


async def test_pieces_hold_neighbouring_windows_in_order() -> None:
    queue = a_queue()
    request = a_request("a", 5)
    queue.put(request)
    queue.put(a_request("b", 1))
    pieces = queue.take(4, NOW) + queue.take(4, NOW)
    assert [(p.start, p.stop) for p in pieces if p.request is request] == [(0, 3), (3, 5)]


async def test_uploads_go_before_backfill() -> None:
    queue = a_queue()
    queue.put(a_request("old", 10, "backfill"))
    queue.put(a_request("new", 6))
    assert counts(queue.take(4, NOW)) == {"new": 4}
    assert counts(queue.take(4, NOW)) == {"new": 2, "old": 2}


@pytest.mark.parametrize("batch", [1, 4, 10])
async def test_backfill_gets_its_share_whatever_the_batch_size(batch: int) -> None:
    queue = a_queue(backfill_share=0.25)
    queue.put(a_request("old", 100, "backfill"))
    queue.put(a_request("new", 300))
    taken: Counter[str] = Counter()
    for _ in range(200 // batch):
        taken.update(counts(queue.take(batch, NOW)))
    assert taken == {"old": 50, "new": 150}


async def test_backfill_saves_up_nothing_while_it_is_alone() -> None:
    queue = a_queue(backfill_share=0.25)
    queue.put(a_request("old", 100, "backfill"))
    queue.take(50, NOW)
    queue.put(a_request("new", 100))
    assert counts(queue.take(4, NOW)) == {"new": 3, "old": 1}


async def test_the_queue_is_bounded_and_lets_in_as_windows_leave() -> None:
    queue = a_queue(max_windows=10)
    first, second = a_request("a", 8), a_request("b", 8)
    queue.put(first)
    queue.put(second)
    assert (queue.depth, second.inside, second.outside) == (10, 2, 6)
    queue.take(4, NOW)
    assert (queue.depth, second.outside) == (10, 2)


async def test_one_track_fills_only_its_share_so_that_others_get_in() -> None:
    queue = a_queue(max_windows=10, track_max=4)
    for _ in range(3):
        queue.put(a_request("long", 50))
    assert queue.depth == 4
    queue.put(a_request("short", 1))
    assert counts(queue.take(10, NOW)) == {"long": 4, "short": 1}


async def test_the_track_with_least_inside_is_let_in_first() -> None:
    queue = a_queue(max_windows=8, track_max=8)
    queue.put(a_request("long", 8))
    more = a_request("long", 8)
    short = a_request("short", 2)
    queue.put(more)
    queue.put(short)
    assert (more.inside, short.inside) == (0, 0)
    queue.take(2, NOW)
    assert (more.inside, short.inside) == (0, 2)


async def test_uploads_are_let_in_before_backfill() -> None:
    queue = a_queue(max_windows=4)
    queue.put(a_request("old", 4, "backfill"))
    queue.put(a_request("older", 4, "backfill"))
    queue.put(a_request("new", 4))
    assert counts(queue.take(4, NOW)) == {"old": 4}
    assert counts(queue.take(4, NOW)) == {"new": 4}


async def test_all_windows_of_everyone_leave_exactly_once() -> None:
    rng = np.random.default_rng(3)
    queue = a_queue(max_windows=50, track_max=12, backfill_share=0.1)
    requests = [
        a_request(f"t{i % 9}", int(rng.integers(1, 40)), "backfill" if i % 3 else "upload")
        for i in range(60)
    ]
    for request in requests:
        queue.put(request)
    seen: dict[Request, list[int]] = {request: [] for request in requests}
    while pieces := queue.take(int(rng.integers(1, 20)), NOW):
        assert queue.depth <= 50
        for piece in pieces:
            seen[piece.request] += range(piece.start, piece.stop)
    assert all(rows == list(range(len(request.windows))) for request, rows in seen.items())
    assert queue.depth == 0
    assert queue.oldest_since is None


async def test_what_is_over_is_dropped_instead_of_taken() -> None:
    queue = a_queue(max_windows=6)
    expired, cancelled, answered, good = (a_request(t, 2) for t in ("exp", "can", "ans", "good"))
    expired.ticket.deadline = NOW
    for request in (expired, cancelled, answered, good):
        cancelled.ticket.requests.add(cancelled)
        queue.put(request)
    cancelled.ticket.cancel()
    answered.answer.set_result(None)
    assert counts(queue.take(10, NOW)) == {"good": 2}
    assert queue.depth == 0
    assert all((r.inside, r.outside) == (0, 0) for r in (expired, cancelled, answered))
    assert isinstance(cancelled.answer.exception(), TrackCancelled)


async def test_what_is_discarded_makes_room_and_is_not_taken_any_more() -> None:
    queue = a_queue(max_windows=4)
    gone, stays = a_request("gone", 8), a_request("stays", 3)
    queue.put(gone)
    queue.put(stays)
    assert counts(queue.take(2, NOW)) == {"gone": 2}
    for _ in range(2):  # the second time there is nothing left to drop
        queue.discard(gone)
        assert (gone.inside, gone.outside, queue.depth) == (0, 0, 3)
    assert counts(queue.take(10, NOW)) == {"stays": 3}

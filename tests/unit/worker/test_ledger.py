import asyncio
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.kafka.ledger import Ledger


@given(st.permutations(range(12)))
def test_acknowledges_in_offset_order_whatever_finishes_first(order: list[int]) -> None:
    ledger, acknowledged = Ledger(max_ahead=100), list[int]()
    for offset in range(12):
        ledger.open(offset, partial(acknowledged.append, offset))

    for done, offset in enumerate(order, start=1):
        ledger.finish(offset)
        finished = set(order[:done])
        first_unfinished = next(o for o in range(13) if o not in finished)
        assert acknowledged == list(range(first_unfinished))

    assert ledger.next_offset == 12


def test_an_unfinished_event_holds_back_all_behind_it() -> None:
    ledger, acknowledged = Ledger(max_ahead=100), list[int]()
    for offset in (7, 9, 10):
        ledger.open(offset, partial(acknowledged.append, offset))

    ledger.finish(9)
    ledger.finish(10)

    assert acknowledged == []
    assert ledger.next_offset == 7


async def test_room_is_bounded_by_the_oldest_unfinished_event() -> None:
    ledger = Ledger(max_ahead=2)
    await asyncio.wait_for(ledger.room(), timeout=1)
    ledger.open(0, lambda: None)
    ledger.open(1, lambda: None)

    waiting = asyncio.create_task(ledger.room())
    await asyncio.sleep(0)
    ledger.finish(1)
    await asyncio.sleep(0)
    assert not waiting.done()

    ledger.finish(0)
    await asyncio.wait_for(waiting, timeout=1)


def test_a_closed_ledger_acknowledges_nothing() -> None:
    ledger, acknowledged = Ledger(max_ahead=2), list[int]()
    ledger.open(0, partial(acknowledged.append, 0))

    ledger.close()

    ledger.finish(0)
    assert acknowledged == []


def test_refuses_offsets_out_of_order() -> None:
    ledger = Ledger(max_ahead=2)
    ledger.open(5, lambda: None)
    with pytest.raises(ValueError, match="out of order"):
        ledger.open(5, lambda: None)

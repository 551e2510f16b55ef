from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.fetch.downloads import Downloads, SystemResolver, retry_after_s
from worker.settings import FetchSettings


@pytest.mark.parametrize(("value", "seconds"), [("0", 0), (" 120 ", 120), ("999999999", 999999999)])
def test_a_wait_in_seconds_is_taken_as_it_is(value: str, seconds: int) -> None:
    assert retry_after_s(value) == seconds


def test_a_date_is_a_wait_until_then_and_of_nothing_once_it_has_passed() -> None:
    moment = datetime.now(UTC) + timedelta(seconds=90)
    for written in (
        format_datetime(moment, usegmt=True),
        format_datetime(moment.replace(tzinfo=None)),
    ):
        assert retry_after_s(written) == pytest.approx(90, abs=2)
    assert retry_after_s("Sat, 31 Jan 2015 12:00:00 GMT") == 0


@given(
    st.text(max_size=30)
    | st.tuples(st.integers(), st.integers(), st.integers()).map(
        lambda numbers: "Fri, {} Jan {} 00:00:00 +{}".format(*numbers)
    )
)
@example(f"Fri, 01 Jan {'9' * 20} 00:00:00 GMT")
@example("²")
@example("Fri, 31 Dec 9999 23:59:59 -2359")
def test_anything_else_is_a_wait_or_none(value: str) -> None:
    waits = retry_after_s(value)
    assert waits is None or waits >= 0


async def test_no_thread_that_looks_up_names_stays_behind() -> None:
    resolver = SystemResolver()
    async with Downloads(FetchSettings(), resolver):
        assert await resolver.resolve("localhost")
    with pytest.raises(RuntimeError, match="shutdown"):
        await resolver.resolve("localhost")

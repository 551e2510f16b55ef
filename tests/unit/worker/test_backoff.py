from collections.abc import Callable

import pytest

from worker.backoff import Backoff


@pytest.mark.parametrize(("drawn", "share"), [(min, 0.5), (max, 1.5)])
def test_waits_double_up_to_the_longest_and_begin_anew_after_success(
    monkeypatch: pytest.MonkeyPatch, drawn: Callable[..., float], share: float
) -> None:
    monkeypatch.setattr("random.uniform", drawn)
    backoff = Backoff(1.0, 7.0)
    assert [backoff.next_s() for _ in range(5)] == [share * due_s for due_s in (1, 2, 4, 7, 7)]
    backoff.reset()
    assert backoff.next_s() == share


def test_two_that_failed_together_do_not_try_again_together() -> None:
    assert len({Backoff(1.0, 8.0).next_s() for _ in range(20)}) > 1

from worker.backoff import Backoff


def test_waits_double_up_to_the_longest_and_begin_anew_after_success() -> None:
    backoff = Backoff(1.0, 8.0)
    for due_s in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert 0.5 * due_s <= backoff.next_s() <= 1.5 * due_s
    backoff.reset()
    assert backoff.next_s() <= 1.5


def test_two_that_failed_together_do_not_try_again_together() -> None:
    assert len({Backoff(1.0, 8.0).next_s() for _ in range(20)}) > 1

import time

import pytest

from worker.kafka.wakefulness import Wakefulness


def test_standing_still_for_too_long_spoils_what_began_before_and_nothing_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    wakefulness = Wakefulness(lapse_s=5.0)

    now_s = 105.0
    assert not wakefulness.lapsed(since_s=100.0), "as long as it may take"

    now_s = 110.1
    assert wakefulness.lapsed(since_s=105.0)

    now_s = 111.0
    assert wakefulness.lapsed(since_s=105.0), "however often it is asked"
    assert not wakefulness.lapsed(since_s=110.5)

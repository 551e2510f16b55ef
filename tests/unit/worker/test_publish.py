from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.events import AudioRef, ModelRef, NewTrack
from worker.publish import event_id

MODEL = ModelRef(name="default", version="0a1b")
AUDIO = {"uri": "https://a.example/b", "sha256": "ab" * 32, "etag": "x", "size_bytes": 5}
FIELDS = {
    "track_id": "t",
    "audio": AUDIO,
    "uploaded_at": datetime(2026, 1, 31, tzinfo=UTC),
    "metadata": {"artist": "Ada", "year": 1999},
    "source_event_id": "/uploads 1",
}


def track(**changes: Any) -> NewTrack:
    return NewTrack.model_validate({**FIELDS, **changes})


def test_an_event_has_the_id_that_it_always_had() -> None:
    least = NewTrack(track_id="t", audio=AudioRef(uri="https://a.example/b"))
    assert event_id(least, MODEL) == "4ea0c1b9-7892-5a35-9a4b-26f836b74e03"
    assert event_id(track(), MODEL) == "60bf14f7-6425-5d1f-aa7c-9c41ca3c553a"


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": {"year": 1999, "artist": "Ada"}},
        {"uploaded_at": "2026-01-31T02:00:00+02:00"},
        {"priority": "backfill"},
        {"audio": {**AUDIO, "size_bytes": None}},
    ],
)
def test_what_says_the_same_has_the_same_id(changes: dict[str, Any]) -> None:
    assert event_id(track(**changes), MODEL) == event_id(track(), MODEL)


@pytest.mark.parametrize(
    "changes",
    [
        {"track_id": "u"},
        {"audio": {**AUDIO, "uri": "https://a.example/c"}},
        {"audio": {**AUDIO, "sha256": None}},
        {"audio": {**AUDIO, "etag": None}},
        {"uploaded_at": None},
        {"metadata": {"artist": "Bo", "year": 1999}},
        {"source_event_id": "/uploads 2"},
    ],
)
def test_what_says_something_else_has_another_id(changes: dict[str, Any]) -> None:
    assert event_id(track(**changes), MODEL) != event_id(track(), MODEL)


@pytest.mark.parametrize("changes", [{"name": "fast"}, {"version": "2c3d"}])
def test_another_model_gives_another_id(changes: dict[str, str]) -> None:
    assert event_id(track(), MODEL.model_copy(update=changes)) != event_id(track(), MODEL)

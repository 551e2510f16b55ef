import asyncio
from pathlib import Path

import pytest

from model.bundle import Bundle
from tests.audio import encode, noise
from worker.errors import DeadlineExceeded
from worker.settings import DecodeSettings, FetchSettings, Settings, WorkerSettings
from worker.tagger import Tagger, Timings


@pytest.fixture
def song(tmp_path: Path) -> Path:
    return encode(tmp_path / "song.flac", noise(60.0, 16_000), 16_000, muxer="flac", codec="flac")


def tagger_of(song: Path, deadline_s: float) -> Tagger:
    settings = Settings(
        fetch=FetchSettings(file_roots=(song.parent,), spool_dir=song.parent / "spool"),
        decode=DecodeSettings(processes=1, slots=2, slot_windows=4),
        worker=WorkerSettings(track_deadline_s=deadline_s),
    )
    return Tagger(settings, Bundle.load("fast"))


async def test_waiting_while_others_hold_the_decoders_is_not_held_against_a_track(
    song: Path,
) -> None:
    async with tagger_of(song, 3.0) as tagger:
        timings = Timings()
        async with tagger.decoders.decode(song, timeout_s=60) as holding:
            await anext(holding)
            waiting = asyncio.create_task(tagger.tag(song.as_uri(), timings=timings))
            await asyncio.sleep(3.5)
        assert (await waiting).audio.duration_s == 60.0
        assert timings.seconds["wait"] > 3.0


async def test_a_track_that_takes_too_long_by_itself_meets_its_deadline(song: Path) -> None:
    async with tagger_of(song, 0.001) as tagger:
        with pytest.raises(DeadlineExceeded):
            await tagger.tag(song.as_uri())

import asyncio
from pathlib import Path

import pytest

from model.bundle import Bundle
from tests.audio import encode, noise
from tests.waiting import until
from worker.errors import DeadlineExceeded
from worker.settings import DecodeSettings, FetchSettings, Settings, VoteSettings, WorkerSettings
from worker.tagger import Tagger, Timings


@pytest.fixture
def song(tmp_path: Path) -> Path:
    return encode(tmp_path / "song.flac", noise(60.0, 16_000), 16_000, muxer="flac", codec="flac")


def tagger_of(song: Path, deadline_s: float = 60.0, votes: VoteSettings | None = None) -> Tagger:
    settings = Settings(
        fetch=FetchSettings(file_roots=(song.parent,), spool_dir=song.parent / "spool"),
        decode=DecodeSettings(processes=1, slots=2, slot_windows=4),
        worker=WorkerSettings(track_deadline_s=deadline_s),
        vote=votes or VoteSettings(),
    )
    return Tagger(settings, Bundle.load("fast"))


async def test_waiting_while_others_hold_the_decoders_is_not_held_against_a_track(
    song: Path,
) -> None:
    async with tagger_of(song, 3.0) as tagger:
        timings = Timings()
        async with tagger.decoders.decode(song) as holding:
            await anext(holding)
            waiting = asyncio.create_task(tagger.tag(song.as_uri(), timings=timings))
            await until(lambda: tagger.decoders._line.waiting)
            await asyncio.sleep(3.1)
        assert (await waiting).audio.duration_s == 60.0
        assert timings.seconds["wait"] > 3.0


async def test_a_track_that_takes_too_long_by_itself_meets_its_deadline(song: Path) -> None:
    async with tagger_of(song, 0.001) as tagger:
        with pytest.raises(DeadlineExceeded):
            await tagger.tag(song.as_uri())


async def test_a_result_has_a_score_for_every_label_of_every_head(song: Path) -> None:
    async with tagger_of(song) as tagger:
        tags = (await tagger.tag(song.as_uri())).tags
    heads = Bundle.load("fast").heads
    assert [tag.head for tag in tags] == [head.name for head in heads for _ in head.labels]
    for head in heads:
        assert {tag.label for tag in tags if tag.head == head.name} == set(head.labels)
        scores = [tag.score for tag in tags if tag.head == head.name]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("votes", "left"),
    [(VoteSettings(max_tags=3), 3), (VoteSettings(min_score=1.0), 1)],
)
async def test_results_carry_no_more_tags_than_are_wanted_but_the_best_of_each_head(
    song: Path, votes: VoteSettings, left: int
) -> None:
    async with tagger_of(song) as tagger:
        all_tags = (await tagger.tag(song.as_uri())).tags
    async with tagger_of(song, votes=votes) as tagger:
        tags = (await tagger.tag(song.as_uri())).tags
    wanted = [
        label
        for head in ("genre", "tags")
        for label in [tag.label for tag in all_tags if tag.head == head][:left]
    ]
    assert [tag.label for tag in tags] == wanted


async def test_windows_vote_as_the_settings_say(song: Path) -> None:
    by_default = VoteSettings(uncertain_below=0.0)
    otherwise = VoteSettings(method="majority", uncertain_below=1.0)
    async with tagger_of(song, votes=by_default) as tagger:
        mean = await tagger.tag(song.as_uri())
    async with tagger_of(song, votes=otherwise) as tagger:
        majority = await tagger.tag(song.as_uri())
    assert (mean.vote, mean.uncertain) == ("mean", False)
    assert (majority.vote, majority.uncertain) == ("majority", True)
    assert [tag.score for tag in majority.tags] != [tag.score for tag in mean.tags]

import asyncio
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import TopicAuthorizationFailedError
from redis.asyncio import Redis
from rich.console import Console

from schemas.events import (
    DeadLetter,
    ModelRef,
    NewTrack,
    Processing,
    Tag,
    TrackTags,
    WindowCounts,
)
from tests.audio import audio_facts
from tests.command import timbre
from tests.conftest import MakeTopics
from tests.worker_process import environment, receive, send
from worker.cache import Keys
from worker.commands import dead_letters
from worker.commands import watch as watch_module
from worker.commands.show import show_track
from worker.commands.sources import tracks
from worker.commands.submit import submit, submit_tracks
from worker.commands.watch import print_line, watch_results, watching
from worker.errors import ServicesUnavailable, TrackUnknown
from worker.kafka import connection
from worker.settings import KafkaSettings, RedisSettings, Settings, load


def result(track_id: str) -> TrackTags:
    return TrackTags(
        event_id="e",
        track_id=track_id,
        audio=audio_facts(uri=f"https://cdn.example/{track_id}.mp3", duration_s=61.0),
        tags=[Tag(head="genre", label="jazz", category="genre", score=0.8125, share=0.9)],
        uncertain=False,
        windows=WindowCounts(total=20, silent=1),
        vote="mean",
        model=ModelRef(name="m", version="v"),
        metadata={"label": "Blue"},
        processing=Processing.model_validate(
            {
                "processed_at": "2026-01-31T12:00:00Z",
                "timings_s": {"fetch": 0.5},
                "cached": False,
                "attempt": 1,
            }
        ),
    )


async def publish(settings: Settings, track_id: str) -> None:
    """A result, as a worker does."""
    await send(settings.kafka, result(track_id).to_bytes(), topic=settings.kafka.topic_tags)


async def events(settings: KafkaSettings, topic: str, count: int) -> list[NewTrack]:
    """The first events of a topic."""
    return [NewTrack.from_bytes(one.value) for one in await receive(settings, topic, count)]


@pytest.fixture
async def settings(topics: MakeTopics) -> Settings:
    return load(kafka=await topics(partitions=3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(30):
        (tmp_path / f"{number:02}.mp3").write_bytes(b"")
    return tmp_path


async def test_submitted_files_are_events_on_the_topic(
    settings: Settings, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(submit_tracks, settings, [str(folder)], backfill=False) == 0
    *ids, count = capsys.readouterr().out.splitlines()
    assert count == f"Submitted 30 tracks to {settings.kafka.topic_new}"
    found = await events(settings.kafka, settings.kafka.topic_new, 30)
    assert {track.track_id for track in found} == {t.track_id for t in tracks([str(folder)])}
    assert {line.split()[0] for line in ids} == {track.track_id for track in found}


async def test_ids_of_many_tracks_are_not_shown_in_a_terminal(
    settings: Settings,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert await asyncio.to_thread(submit_tracks, settings, [str(folder)], backfill=False) == 0
    shown = capsys.readouterr()
    [count] = shown.out.splitlines()
    assert "Submitted 30 tracks" in count
    assert "30/30" in shown.err, "the bar counts them to the last"


async def test_backfill_goes_to_its_own_topic(
    settings: Settings, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(folder / "00.mp3")
    assert await asyncio.to_thread(submit_tracks, settings, [source], backfill=True) == 0
    [track] = await events(settings.kafka, settings.kafka.topic_backfill, 1)
    assert track.priority == "backfill"
    assert capsys.readouterr().out.startswith(track.track_id)


async def test_ids_and_addresses_are_shown_as_they_are(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "tracks.csv"
    table.write_text("uri,track_id\nhttps://cdn.example/[dim].mp3,[/dim]one\n")
    assert await asyncio.to_thread(submit_tracks, settings, [str(table)], backfill=False) == 0
    shown, count = capsys.readouterr().out.splitlines()
    assert shown == "[/dim]one  https://cdn.example/[dim].mp3"
    assert count == f"Submitted 1 track to {settings.kafka.topic_new}"


async def test_what_kafka_does_not_take_is_counted_and_named(
    settings: Settings, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = load(
        kafka=settings.kafka.model_copy(
            update={"topic_new": "a bad name", "request_timeout_s": 1.0}
        )
    )
    assert await asyncio.to_thread(submit_tracks, missing, [str(folder)], backfill=False) == 1
    assert "Not submitted" in capsys.readouterr().err


async def test_progress_is_told_of_every_track(settings: Settings, folder: Path) -> None:
    told: list[str] = []
    submission = await submit(
        settings.kafka, tracks([str(folder)]), lambda track: told.append(track.track_id)
    )
    assert len(told) == 30 == sum(submission.delivered.values())


async def test_a_watch_sees_what_is_published_after_its_start(settings: Settings) -> None:
    await publish(settings, "early")
    async with watching(settings.kafka) as results, asyncio.timeout(30):
        await send(settings.kafka, b"not a result", topic=settings.kafka.topic_tags)
        await publish(settings, "late")
        assert await anext(results) == result("late")


async def test_a_watch_from_the_beginning_prints_results_as_json(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for track_id in ("one", "two"):
        await publish(settings, track_id)
    await asyncio.to_thread(watch_results, settings, from_beginning=True, count=2, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["track_id"] for line in lines} == {"one", "two"}


async def test_what_several_partitions_hold_comes_oldest_first(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    now_ms = int(time.time() * 1000)
    async with connection.producer(settings.kafka) as producer:
        for age_s in (7, 6, 5, 4, 3, 2, 1):
            for topic in (settings.kafka.topic_tags, settings.kafka.topic_dead_letter):
                await producer.send_and_wait(
                    topic,
                    result(f"{age_s}").to_bytes(),
                    headers=[("timbre-track-id", f"{age_s}".encode())],
                    partition=(0, 2, 1, 1, 0, 2, 0)[age_s - 1],
                    timestamp_ms=now_ms - age_s * 1000,
                )

    def ids() -> list[str]:
        return [json.loads(line)["track_id"] for line in capsys.readouterr().out.splitlines()]

    for count in (7, 2):
        await asyncio.to_thread(
            watch_results, settings, from_beginning=True, count=count, as_json=True
        )
        assert ids() == list("7654321")[:count]
        await asyncio.to_thread(
            dead_letters.list_all, settings, code=None, limit=count, as_json=True
        )
        assert ids() == list("7654321")[:count]
    async with watching(settings.kafka, from_beginning=True) as results, asyncio.timeout(30):
        await publish(settings, "late")
        assert [(await anext(results)).track_id for _ in range(8)][-1] == "late"


async def test_a_watch_prints_tags_and_failures_in_lines(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    await publish(settings, "one")
    await send(settings.kafka, b"{}", topic=settings.kafka.topic_dead_letter)
    await asyncio.to_thread(watch_results, settings, from_beginning=True, failures=True, count=2)
    said = capsys.readouterr().out
    assert "jazz 0.81" in said
    assert "Not written by Timbre" in said


async def test_what_others_wrote_steers_no_terminal(
    settings: Settings,
    redis: Redis,
    redis_url: str,
    redis_prefix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steering = "[red]\x1b[2J\x9b31m\u202e"
    told = result("t-\u202e").model_copy(
        update={
            "tags": [Tag(head="genre", label=steering, category="", score=0.5, share=1)],
            "metadata": {"title": steering},
        }
    )
    settings = load(
        kafka=settings.kafka,
        redis=RedisSettings.model_validate({"url": redis_url, "prefix": redis_prefix}),
    )
    await redis.hset(Keys(redis_prefix).track(told.track_id), "result", told.to_bytes())
    await send(settings.kafka, told.to_bytes(), topic=settings.kafka.topic_tags)
    async with connection.producer(settings.kafka) as producer:
        await producer.send_and_wait(
            settings.kafka.topic_dead_letter,
            steering.encode(),
            headers=[
                (f"timbre-{name}", f"{steering}\n".encode()) for name in ("reason", "track-id")
            ],
        )

    def show_all(*, as_json: bool) -> None:
        watch_results(settings, from_beginning=True, failures=True, count=2, as_json=as_json)
        show_track(settings, told.track_id, as_json=as_json)
        dead_letters.list_all(settings, code=None, limit=None, as_json=as_json)

    for as_json in (False, True):
        await asyncio.to_thread(show_all, as_json=as_json)
        lines = capsys.readouterr().out.split("\n")
        assert all(line.isprintable() for line in lines)
        assert sum("[red]\\u001b[2J\\u009b31m\\u202e" in line for line in lines) >= 4
        assert not as_json or TrackTags.from_bytes(lines[2].encode()) == told


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a" * 27 + "… "), (False, "a" * 40 + " ")])
def test_a_long_id_is_cut_in_a_terminal_only(terminal: bool, shown: str) -> None:
    out = Console(force_terminal=terminal, color_system=None, width=160)
    with out.capture() as captured:
        print_line(out, result("a" * 40))
    assert captured.get().startswith(shown)


def test_a_line_shows_no_tag_that_is_as_good_as_ruled_out_but_the_best() -> None:
    scores = {"genre": (0.97, 0.01), "mood": (0.04, 0.03), "era": (0.3, 0.2, 0.06, 0.05, 0.05)}
    tags = [
        Tag(head=head, label=f"{head}-{place}", category=head, score=score, share=0.0)
        for head, of_head in scores.items()
        for place, score in enumerate(of_head)
    ]
    out = Console(force_terminal=True, color_system=None, width=160)
    with out.capture() as captured:
        print_line(out, result("t-1").model_copy(update={"tags": tags}))
    assert re.findall(r"\w+-\d", captured.get().removeprefix("t-1")) == [
        *("genre-0", "mood-0", "era-0", "era-1", "era-2", "era-3")
    ]


async def test_a_watch_whose_right_to_read_is_taken_away_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_: AIOKafkaConsumer) -> None:
        raise TopicAuthorizationFailedError(settings.kafka.topic_tags)

    monkeypatch.setattr(AIOKafkaConsumer, "getone", refuse)
    with pytest.raises(ServicesUnavailable, match="a right is missing"):
        async with watching(settings.kafka) as results:
            await anext(results)


async def test_a_watch_of_a_topic_that_is_not_there_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "REQUEST_TIMEOUT_MS", 1000)
    nowhere = settings.kafka.model_copy(update={"topic_tags": "no-such-topic"})
    with pytest.raises(ServicesUnavailable, match="no-such-topic"):
        async with watching(nowhere):
            pass


async def test_a_track_is_shown_from_redis(
    redis: Redis, redis_url: str, redis_prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(redis=RedisSettings.model_validate({"url": redis_url, "prefix": redis_prefix}))
    await redis.hset(Keys(redis_prefix).track("t-1"), "result", result("t-1").to_bytes())
    await asyncio.to_thread(show_track, settings, "t-1", as_json=False)
    shown = capsys.readouterr().out
    assert "1:01" in shown
    assert "0.812" in shown
    assert "Blue" in shown
    await asyncio.to_thread(show_track, settings, "t-1", as_json=True)
    assert TrackTags.from_bytes(capsys.readouterr().out.encode()) == result("t-1")
    for unknown in ("t-2", os.fsdecode(b"t-\xff")):
        with pytest.raises(TrackUnknown, match="holds no result of t-"):
            await asyncio.to_thread(show_track, settings, unknown, as_json=False)
    await redis.hset(Keys(redis_prefix).track("t-3"), "result", b"{}")
    with pytest.raises(TrackUnknown, match="tagged again"):
        await asyncio.to_thread(show_track, settings, "t-3", as_json=False)


async def test_show_without_redis_says_what_to_check() -> None:
    nowhere = load(redis=RedisSettings.model_validate({"url": "redis://127.0.0.1:9/0"}))
    with pytest.raises(ServicesUnavailable, match="TIMBRE_REDIS__URL"):
        await asyncio.to_thread(show_track, nowhere, "t-1", as_json=False)


async def test_dead_letters_are_listed_shown_and_sent_again(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    headers = {
        "reason-code": "audio_not_found",
        "reason": "There is no audio there. " * 10,
        "origin-topic": settings.kafka.topic_new,
        "track-id": "t-1",
    }
    event = next(tracks(["https://cdn.example/a.mp3"])).to_bytes()
    async with connection.producer(settings.kafka) as producer:
        sent = await producer.send_and_wait(
            settings.kafka.topic_dead_letter,
            event,
            headers=[
                *((f"timbre-{name}", value.encode()) for name, value in headers.items()),
                ("trace", b"first"),
                ("trace", b"\x1b[2Jsecond"),
            ],
        )
    place = f"{sent.partition}:{sent.offset}"

    async def run(*arguments: object, **options: object) -> str:
        await asyncio.to_thread(*arguments, **options)  # type: ignore[arg-type]
        return capsys.readouterr().out

    listed = await run(dead_letters.list_all, settings, code=None, limit=None, as_json=False)
    assert listed.split()[:3] == [place, "audio_not_found", "t-1"]
    assert len(listed.splitlines()) == 1, "a line a letter, however long, into a pipe"
    as_json = await run(dead_letters.list_all, settings, code=None, limit=None, as_json=True)
    assert json.loads(as_json)["place"] == place
    assert DeadLetter.model_validate_json(as_json).reason.message == headers["reason"]
    other = await run(
        dead_letters.list_all, settings, code="fetch_failed", limit=None, as_json=True
    )
    assert other == ""
    shown = await run(dead_letters.show_one, settings, place, as_json=False)
    assert "https://cdn.example/a.mp3" in shown
    assert "header trace first\n" in shown
    assert "header trace \\u001b[2Jsecond\n" in shown
    again = await run(dead_letters.retry_some, settings, [place], code=None, everything=False)
    assert again == "Sent 1 event again\n"
    assert (await events(settings.kafka, settings.kafka.topic_new, 1))[0].to_bytes() == event


async def test_commands_do_as_their_options_say(
    settings: Settings,
    folder: Path,
    redis: Redis,
    redis_url: str,
    redis_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kafka = settings.kafka
    for name, value in environment(kafka, redis_url, redis_prefix).items():
        monkeypatch.setenv(name, value)

    async def said_by(*arguments: object) -> list[str]:
        assert await asyncio.to_thread(timbre, monkeypatch, *arguments) == 0
        return capsys.readouterr().out.splitlines()

    async def ids(*arguments: str) -> list[str]:
        return [json.loads(line)["track_id"] for line in await said_by(*arguments)]

    *_, count = await said_by("submit", folder / "00.mp3", folder / "01.mp3", "--backfill")
    assert count == f"Submitted 2 tracks to {kafka.topic_backfill}"

    async with connection.producer(kafka) as producer:
        for number, code in enumerate(("fetch_failed", "audio_empty", "fetch_failed")):
            told = {"reason-code": code, "origin-topic": kafka.topic_new, "track-id": f"{number}"}
            headers = [(f"timbre-{name}", value.encode()) for name, value in told.items()]
            event = told["track-id"].encode()
            await producer.send_and_wait(
                kafka.topic_dead_letter, event, headers=headers, partition=0
            )
    await publish(settings, "one")
    assert await ids("watch", "--from-beginning", "--count", "1", "--json") == ["one"]
    watched = await ids("watch", "--from-beginning", "--failures", "-n", "4", "--json")
    assert watched == ["0", "1", "2", "one"]
    assert "jazz 0.81" in (await said_by("watch", "--from-beginning", "-n", "1"))[0]

    await redis.hset(Keys(redis_prefix).track("one"), "result", result("one").to_bytes())
    assert await ids("show", "one", "--json") == ["one"]
    assert (await said_by("show", "one"))[0].startswith("one ")

    assert await ids("dead-letters", "list", "--json") == ["0", "1", "2"]
    assert await ids("dead-letters", "list", "--code", "fetch_failed", "--json") == ["0", "2"]
    assert await ids("dead-letters", "list", "--limit", "2", "--json") == ["0", "1"]
    assert "audio_empty" in (await said_by("dead-letters", "list"))[1]
    assert await ids("dead-letters", "show", "0:1", "--json") == ["1"]
    assert "audio_empty" in "".join(await said_by("dead-letters", "show", "0:1"))
    for choice, again in ((["0:1"], 1), (["--code", "fetch_failed"], 2), (["--all"], 3)):
        said = await said_by("dead-letters", "retry", *choice)
        assert said == [f"Sent {again} event{'' if again == 1 else 's'} again"]
    sent = [message.value for message in await receive(kafka, kafka.topic_new, 6)]
    assert Counter(sent) == {b"0": 2, b"1": 2, b"2": 2}

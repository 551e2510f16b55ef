"""The whole way, on a real Kafka, a real Redis, real HTTP and S3 servers and a real worker."""

import asyncio
import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import aiohttp
import boto3
import numpy as np
import psutil
import pytest
from aiohttp import web
from aiokafka import AIOKafkaProducer
from moto.server import ThreadedMotoServer
from redis.asyncio import Redis

from model.bundle import Bundle
from schemas.events import TrackFeatures, TrackTags
from tests.audio import ENCODINGS, encode, tone
from tests.broker import committed, limit_messages
from tests.conftest import MakeTopics
from tests.waiting import until
from tests.web import answering, running
from tests.worker_process import (
    TIMBRE,
    WorkerProcess,
    environment,
    metric,
    receive,
    receive_json,
    running_worker,
    send,
    start_worker,
)
from worker.app import Worker
from worker.dead_letters import list_dead_letters, retry
from worker.errors import AudioNotFound, DeadlineExceeded
from worker.kafka.connection import producer
from worker.services.topics import create_topics
from worker.settings import KafkaSettings, Settings, load

DEFAULT = {"TIMBRE_WORKER__BUNDLE": "default"}
SUFFIXES = ("mp3", "flac", "ogg", "m4a", "opus")
CODECS = {"mp3", "flac", "vorbis", "aac", "opus"}


@pytest.fixture(scope="module")
def tracks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seven seconds of chords in five codecs, each of other notes, by suffix."""
    folder = tmp_path_factory.mktemp("tracks")
    made = {}
    for number, suffix in enumerate(SUFFIXES):
        muxer, codec, rate_hz = ENCODINGS[suffix]
        notes = [
            tone(7, rate_hz, 110 * 2 ** ((note + number) / 12), channels=2) for note in (0, 4, 7)
        ]
        chord = np.stack(notes).mean(axis=0)
        made[suffix] = encode(folder / f"track.{suffix}", chord, rate_hz, muxer=muxer, codec=codec)
    return made


@pytest.fixture
def s3(tracks: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Settings to read the bucket `music` of moto's S3 server, which holds the tracks."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"http://127.0.0.1:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="k",
        aws_secret_access_key="s",
    )
    client.create_bucket(Bucket="music")
    for file in tracks.values():
        for key in (file.name, f"new songs/a+{file.name}"):
            client.upload_file(str(file), "music", key)
    yield credentials(endpoint)
    server.stop()


def as_object(track: Path) -> web.Response:
    """A track as S3 gives it."""
    headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": '"e"'}
    return web.Response(body=track.read_bytes(), headers=headers)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[str]:
    """A web server with the folder's files."""
    app = web.Application()
    app.router.add_static("/", folder)
    async with running(app) as address:
        yield address


async def test_tracks_of_five_codecs_over_http_s3_and_as_files_are_tagged_stored_and_counted(
    topics: MakeTopics,
    redis: Redis,
    redis_url: str,
    redis_prefix: str,
    tracks: dict[str, Path],
    s3: dict[str, str],
    tmp_path: Path,
) -> None:
    """And announced in every form of event."""
    own = await topics(partitions=2)
    cloud = {"specversion": "1.0", "id": "1", "source": "/uploads", "type": "track.new"}
    headers = [(f"ce_{name}", value.encode()) for name, value in cloud.items()]
    async with (
        serving(tracks["mp3"].parent) as http,
        producer(own) as platform,
        file_worker(own, redis_url, redis_prefix, tracks, tmp_path, **s3, **DEFAULT) as worker,
    ):
        await send(
            own,
            event("over-http-mp3", f"{http}/track.mp3", metadata={"artist": "Ä", "n": [1]}),
            json.dumps(cloud | {"data": event("over-http-flac", f"{http}/track.flac")}).encode(),
            event("from-s3", "s3://music/track.m4a"),
            bucket_notification("music", "new+songs/a%2Btrack.ogg"),
        )
        file = json.dumps(event("a-file", tracks["opus"].as_uri())).encode()
        await platform.send_and_wait(own.topic_new, file, headers=headers)
        results = await receive_json(own, own.topic_tags, 5)
        features = await receive_json(own, own.topic_features, 5)

        for result in results.values():
            TrackTags.model_validate(result)
            assert result["tags"][0]["head"] == "genre"
            assert result["windows"] == {"total": 3, "silent": 0}
        assert {result["audio"]["codec"] for result in results.values()} == CODECS
        assert results["over-http-mp3"]["metadata"] == {"artist": "Ä", "n": [1]}
        for feature in features.values():
            embedding = np.array(TrackFeatures.model_validate(feature).embedding)
            assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-4)

        for track_id, result in results.items():
            stored = await stored_of(redis, f"{redis_prefix}track:{track_id}", result["event_id"])
            assert json.loads(stored[b"result"]) == result
            genre = stored[b"genre"].decode()
            assert await redis.zscore(f"{redis_prefix}genre:{genre}", track_id) is not None

        # Told once Redis has answered, and that may be after it was seen there.
        await until(lambda: worker.metric("timbre_tracks_total", outcome="tagged") == 5)
        assert worker.metric("timbre_stage_seconds_count", stage="decode") == 5
        assert worker.metric("timbre_windows_total", kind="voted") == 15
        shown = worker.get("/metrics")
        assert not any(track_id in shown for track_id in results)


async def test_the_same_event_and_the_same_audio_again_are_answered_from_the_cache(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tracks: dict[str, Path], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    once = tracks["flac"].with_name("once.flac")
    once.write_bytes(tracks["flac"].read_bytes())
    first = event("first", once.as_uri())
    async with file_worker(own, redis_url, redis_prefix, tracks, tmp_path) as worker:
        await send(own, first)
        await receive(own, own.topic_tags, 1)
        once.unlink()
        known = {"uri": f"{once.as_uri()}.gone", "sha256": sha256_of(tracks["flac"])}
        await send(own, first, event("second", tracks["flac"].as_uri()))
        await send(own, {"track_id": "third", "audio": known})
        results = [json.loads(message.value) for message in await receive(own, own.topic_tags, 4)]
        assert worker.metric("timbre_windows_total", kind="voted") == 3
        assert worker.metric("timbre_stage_seconds_count", stage="decode") == 1

    one, again = [result for result in results if result["track_id"] == "first"]
    [second] = [result for result in results if result["track_id"] == "second"]
    [third] = [result for result in results if result["track_id"] == "third"]
    assert all(result["processing"]["cached"] for result in (again, second, third))
    assert without_processing(again) == without_processing(one)
    assert second["tags"] == third["tags"] == one["tags"]
    assert second["event_id"] != one["event_id"]
    assert third["audio"]["uri"] == known["uri"]


async def test_uploads_go_before_backfill_whether_its_topic_or_its_event_says_so(
    topics: MakeTopics,
    redis_url: str,
    redis_prefix: str,
    tracks: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = await topics(partitions=1)
    roots = json.dumps([str(tracks["mp3"].parent)])
    more = {"TIMBRE_DECODE__PROCESSES": "1", "TIMBRE_FETCH__FILE_ROOTS": roots}
    predicted = list[str]()
    given = environment(own, redis_url, redis_prefix, **more)
    async with worker_here(given, monkeypatch) as worker:
        predict = worker.tagger.batcher.predict

        async def told(windows: Any, *, priority: Any = "none", ticket: Any) -> Any:
            predicted.append(priority)
            return await predict(windows, priority=priority, ticket=ticket)

        monkeypatch.setattr(worker.tagger.batcher, "predict", told)
        waiting = worker.tagger.decoders._line._waiting
        async with worker.tagger.decoders.decode(tracks["mp3"]) as holding:
            await anext(holding)
            await send(own, event("by-topic", tracks["ogg"].as_uri()), topic=own.topic_backfill)
            await send(own, event("by-itself", tracks["flac"].as_uri(), priority="backfill"))
            await until(lambda: len(waiting["backfill"]) == 2)
            await send(own, event("upload", tracks["opus"].as_uri()))
            await until(lambda: waiting["upload"])
        await receive(own, own.topic_tags, 3)  # in any order: they may have shared a batch
    assert predicted == ["upload", "backfill", "backfill"]


async def test_a_track_uploaded_again_ends_with_the_tags_of_its_new_audio(
    topics: MakeTopics,
    redis: Redis,
    redis_url: str,
    redis_prefix: str,
    tracks: dict[str, Path],
    tmp_path: Path,
) -> None:
    own = await topics(partitions=1)

    async def slowly(_: web.Request) -> web.FileResponse:
        await asyncio.sleep(3)
        return web.FileResponse(tracks["mp3"])

    async with (
        answering(slowly) as http,
        file_worker(own, redis_url, redis_prefix, tracks, tmp_path),
    ):
        await send(
            own,
            event("again", f"{http}/slow.mp3", uploaded_at="2026-01-01T00:00:00Z"),
            event("again", tracks["flac"].as_uri(), uploaded_at="2026-01-02T00:00:00Z"),
        )
        results = [json.loads(one.value) for one in await receive(own, own.topic_tags, 2)]
        await stored_of(redis, f"{redis_prefix}track:again", results[1]["event_id"])
    assert [result["audio"]["codec"] for result in results] == ["mp3", "flac"]


async def test_what_cannot_pass_is_a_dead_letter_and_its_neighbours_are_tagged(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tracks: dict[str, Path], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    noise = tracks["mp3"].with_name("noise.mp3")
    noise.write_bytes(bytes(range(256)) * 64)
    other = {"uri": tracks["ogg"].as_uri(), "sha256": "0" * 64}
    bad = {
        b"not json": "event_malformed",
        json.dumps(event("gone", noise.with_name("gone.mp3").as_uri())).encode(): "audio_not_found",
        json.dumps(event("outside", "file:///etc/passwd")).encode(): "address_refused",
        json.dumps(event("metadata", "http://169.254.169.254/latest")).encode(): "address_refused",
        json.dumps(event("noise", noise.as_uri())).encode(): "audio_unreadable",
        json.dumps({"track_id": "other", "audio": other}).encode(): "checksum_mismatch",
    }
    async with file_worker(own, redis_url, redis_prefix, tracks, tmp_path) as worker:
        await send(own, *bad, event("good", tracks["ogg"].as_uri()))
        letters = await receive(own, own.topic_dead_letter, len(bad))
        results = await receive_json(own, own.topic_tags, 1)
        # Told once Kafka has answered, and that may be after it was read there.
        await until(lambda: worker.metric("timbre_tracks_total", outcome="dead_letter") == len(bad))

    assert results.keys() == {"good"}
    found = {
        letter.value: dict(letter.headers)["timbre-reason-code"].decode() for letter in letters
    }
    assert found == bad
    told = [line for line in worker.log.read_text().splitlines() if "Dead letter of" in line]
    assert sorted(line.rpartition("(")[2].rstrip(")") for line in told) == sorted(bad.values())


async def test_what_cannot_be_read_of_a_notification_is_one_dead_letter_and_the_rest_is_tagged(
    topics: MakeTopics, redis_url: str, redis_prefix: str, s3: dict[str, str], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    settings = environment(own, redis_url, redis_prefix, **s3)
    keys = ("track.ogg", "%FF.mp3", "", "x" * 1025, "track.opus")
    message = bucket_notification("music", *keys)
    async with running_worker(settings, tmp_path / "worker.log"):
        await send(own, message)
        await receive(own, own.topic_dead_letter, 1)
        await send(own, bucket_notification("music", "%FF.mp3", "gone.mp3", "track.flac"))
        await receive(own, own.topic_dead_letter, 2)
        results = await receive_json(own, own.topic_tags, 3)
    assert results.keys() == {"music/track.ogg", "music/track.opus", "music/track.flac"}
    letter, of_a_track = [found async for _, found in list_dead_letters(Settings(kafka=own))]
    assert letter.original.value_b64 == b64encode(message).decode()
    assert (letter.reason.code, letter.track_id) == ("event_malformed", None)
    assert letter.reason.message.startswith("Record 2 of 5 in the bucket notification")
    assert letter.reason.message.endswith("is not UTF-8. Nor can 2 more.")
    assert (of_a_track.reason.code, of_a_track.track_id) == ("audio_not_found", "music/gone.mp3")
    assert of_a_track.reason.message.endswith(" 1 more of its message failed (event_malformed).")


async def test_all_tracks_of_a_message_have_one_deadline_and_a_retry_does_those_left_out(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tracks: dict[str, Path], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    requests = Counter[str]()
    message = bucket_notification("music", "slow.mp3", "slow.ogg", "late.flac", "late.m4a")

    async def store(request: web.Request) -> web.Response:
        name = request.path.rpartition("/")[2]
        requests[name] += 1
        if name.startswith("slow"):
            await asyncio.sleep(3)
        return as_object(tracks[name.rpartition(".")[2]])

    async with answering(store) as endpoint:
        settings = environment(
            own,
            redis_url,
            redis_prefix,
            TIMBRE_WORKER__TRACK_DEADLINE_S="5",
            **credentials(endpoint),
        )
        async with running_worker(settings, tmp_path / "worker.log"):
            await send(own, message)
            [letter] = await receive(own, own.topic_dead_letter, 1)
            in_time = await receive_json(own, own.topic_tags, 2)
            assert requests == {"slow.mp3": 1, "slow.ogg": 1}
            await retry(Settings(kafka=own))
            results = await receive_json(own, own.topic_tags, 6)
    assert in_time.keys() == {"music/slow.mp3", "music/slow.ogg"}, "the second has begun in time"
    assert results.keys() == {*in_time, "music/late.flac", "music/late.m4a"}
    assert set(requests.values()) == {1}, "what was done before is answered from the cache"
    said = {name: value.decode() for name, value in letter.headers}
    assert said["timbre-track-id"] == "music/late.flac"
    assert (said["timbre-reason-code"], said["timbre-retryable"]) == ("deadline_exceeded", "true")
    assert "fewer Records" in said["timbre-reason"]
    assert said["timbre-reason"].endswith("1 more of its message failed (deadline_exceeded).")


async def test_what_kafka_takes_to_accept_a_result_is_no_time_of_the_tracks_behind_it(
    topics: MakeTopics, redis_url: str, redis_prefix: str, s3: dict[str, str], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    own = own.model_copy(update={"topic_tags": f"{own.topic_tags}-later"})
    settings = environment(
        own,
        redis_url,
        redis_prefix,
        TIMBRE_KAFKA__REQUEST_TIMEOUT_S="1",
        TIMBRE_WORKER__TRACK_DEADLINE_S="5",
        **s3,
    )
    async with running_worker(settings, tmp_path / "worker.log") as worker:
        await send(own, bucket_notification("music", "track.ogg", "track.opus"))
        await until(lambda: worker.metric("timbre_retries_total", code="publish_failed"))
        await asyncio.sleep(5)
        await create_topics(own, [own.topic_tags], 1)
        results = await receive_json(own, own.topic_tags, 2)
        assert worker.metric("timbre_tracks_total", outcome="dead_letter") == 0
    assert results.keys() == {"music/track.ogg", "music/track.opus"}


async def test_while_kafka_refuses_the_embedding_nothing_is_acknowledged_and_tags_are_sent_once(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tracks: dict[str, Path], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    own = own.model_copy(update={"topic_features": f"{own.topic_features}-later"})
    quick = {"TIMBRE_KAFKA__REQUEST_TIMEOUT_S": "2"}
    async with file_worker(own, redis_url, redis_prefix, tracks, tmp_path, **quick) as worker:
        await send(own, event("a-file", tracks["opus"].as_uri()))
        await until(lambda: worker.metric("timbre_retries_total", code="publish_failed") >= 2)
        assert await committed(own, 1) == 0
        await create_topics(own, [own.topic_features], 1)
        await receive(own, own.topic_features, 1)
        await send(own, event("another", tracks["opus"].as_uri()))
        first, second = await receive(own, own.topic_tags, 2)
    assert (first.key, second.key) == (b"a-file", b"another")


async def test_an_embedding_that_is_too_large_is_a_dead_letter_beside_its_tags_and_others_pass(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tracks: dict[str, Path], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    await limit_messages(own, own.topic_features, 200)
    async with file_worker(own, redis_url, redis_prefix, tracks, tmp_path) as worker:
        await send(own, event("refused", tracks["opus"].as_uri()))
        [letter] = await receive(own, own.topic_dead_letter, 1)
        await limit_messages(own, own.topic_features, 1_000_000)
        await send(own, event("taken", tracks["flac"].as_uri()))
        tags = await receive_json(own, own.topic_tags, 2)
        features = await receive_json(own, own.topic_features, 1)
        assert worker.metric("timbre_tracks_total", outcome="dead_letter") == 1
    assert dict(letter.headers)["timbre-reason-code"] == b"result_too_large"
    assert letter.key == b"refused"
    assert tags.keys() == {"refused", "taken"}
    assert features.keys() == {"taken"}


@pytest.mark.parametrize("hours_off", [2, -2])
async def test_a_clock_that_jumps_moves_no_deadline_and_results_wait_until_kafka_takes_its_time(
    topics: MakeTopics,
    redis_url: str,
    redis_prefix: str,
    tracks: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    hours_off: int,
) -> None:
    own = await topics(partitions=1)
    asked_s = defaultdict[str, list[float]](list)
    jumped, now, send_and_wait = asyncio.Event(), time.time, AIOKafkaProducer.send_and_wait

    async def stamped(*message: Any, **options: Any) -> Any:
        """By Python's clock: what aiokafka is compiled of asks the machine's itself."""
        return await send_and_wait(*message, timestamp_ms=round(1000 * time.time()), **options)

    async def store(request: web.Request) -> web.Response:
        name = request.path.rpartition("/")[2]
        asked_s[name].append(time.monotonic())
        if name == "stalls.mp3":
            await asyncio.sleep(60)
        if name == "busy.mp3" and len(asked_s[name]) == 1:
            return web.Response(status=503, headers={"Retry-After": "3"})
        if name == "first.mp3":
            await jumped.wait()
        return as_object(tracks[name.rpartition(".")[2]])

    async with answering(store) as endpoint:
        given = environment(
            own,
            redis_url,
            redis_prefix,
            TIMBRE_FETCH__STALL_TIMEOUT_S="2",
            **credentials(endpoint),
        )
        monkeypatch.setattr(AIOKafkaProducer, "send_and_wait", stamped)
        async with worker_here(given, monkeypatch) as worker:
            await send(
                own,
                event("busy", f"{endpoint}/busy.mp3"),
                event("stalls", f"{endpoint}/stalls.mp3"),
                bucket_notification("music", "first.mp3", "next.ogg"),
            )
            await until(lambda: len(asked_s) == 3)
            monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours_off)
            jumped.set()
            if hours_off > 0:
                await until(lambda: "refuses the time of a message" in caplog.text)
                await until(lambda: len(asked_s["stalls.mp3"]) == 2)
                monkeypatch.setattr(time, "time", now)
            results = await receive_json(own, own.topic_tags, 3, timeout_s=20)
            [letter] = await receive(own, own.topic_dead_letter, 1, timeout_s=20)
            told = worker.metrics.render().decode()
    assert results.keys() == {"busy", "music/first.mp3", "music/next.ogg"}
    assert dict(letter.headers)["timbre-reason-code"] == b"fetch_timeout"
    for name, least_s in {"busy.mp3": 3, "stalls.mp3": 2}.items():
        first_s, second_s = asked_s[name]
        assert least_s <= second_s - first_s < least_s + 5
    assert (metric(told, "timbre_retries_total", code="publish_failed") > 0) is (hours_off > 0)
    assert metric(told, "timbre_retries_total", code="worker_frozen") == 0


async def test_waiting_while_others_hold_the_decoders_is_no_time_of_the_tracks_behind_it(
    topics: MakeTopics,
    redis_url: str,
    redis_prefix: str,
    tracks: dict[str, Path],
    s3: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = await topics(partitions=1)
    given = environment(
        own,
        redis_url,
        redis_prefix,
        TIMBRE_DECODE__PROCESSES="1",
        TIMBRE_WORKER__TRACK_DEADLINE_S="3",
        **s3,
    )
    async with worker_here(given, monkeypatch) as worker:
        async with worker.tagger.decoders.decode(tracks["mp3"]) as holding:
            await anext(holding)
            await send(own, bucket_notification("music", "track.ogg", "track.opus"))
            await until(lambda: worker.consumer.in_flight)
            await asyncio.sleep(4)
        results = await receive_json(own, own.topic_tags, 2)
    assert results.keys() == {"music/track.ogg", "music/track.opus"}


async def test_a_track_whose_deadline_ends_a_rest_gives_its_message_no_place_beside_all_others(
    topics: MakeTopics, redis_url: str, redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await topics(partitions=1)
    given = environment(
        own, redis_url, redis_prefix, TIMBRE_WORKER__MAX_IN_FLIGHT="1", TIMBRE_WORKER__ATTEMPTS="1"
    )
    working, most = 0, 0

    async def tag(uri: str, *, sleep: Callable[[float], Awaitable[None]], **_: object) -> None:
        nonlocal working, most
        if uri == "s3://music/rests.mp3":
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await sleep(60)
            raise DeadlineExceeded("It rested for too long.")
        working += 1
        most = max(most, working)
        await asyncio.sleep(2)
        working -= 1
        raise AudioNotFound("Nothing there.")

    async with worker_here(given, monkeypatch) as worker:
        monkeypatch.setattr(worker.tagger, "tag", tag)
        await send(
            own,
            bucket_notification("music", "rests.mp3", "next.mp3"),
            event("other", "https://cdn.example/other.mp3"),
        )
        await receive(own, own.topic_dead_letter, 2)
    assert most == 1


async def test_a_server_that_stalls_holds_a_place_only_twice_and_one_that_fails_is_asked_on(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    requests = Counter[str]()

    async def answer(request: web.Request) -> web.Response:
        requests[request.path] += 1
        if request.path == "/stalls":
            await asyncio.sleep(60)
        return web.Response(status=503)

    attempts = {
        "TIMBRE_FETCH__ATTEMPTS": "3",
        "TIMBRE_FETCH__BACKOFF_INITIAL_S": "0.01",
        "TIMBRE_FETCH__STALL_TIMEOUT_S": "2",  # who fails answers sooner, on any machine
        "TIMBRE_WORKER__ATTEMPTS": "3",
        "TIMBRE_WORKER__BACKOFF_INITIAL_S": "0.01",
    }
    settings = environment(own, redis_url, redis_prefix, **attempts)
    async with (
        answering(answer) as http,
        running_worker(settings, tmp_path / "worker.log") as worker,
    ):
        await send(own, event("stalls", f"{http}/stalls"), event("fails", f"{http}/fails"))
        letters = await receive(own, own.topic_dead_letter, 2)
        assert worker.metric("timbre_retries_total", code="fetch_timeout") == 1

    assert requests == {"/stalls": 2, "/fails": 3}
    said = {letter.key: {k: v.decode() for k, v in letter.headers} for letter in letters}
    stalls, fails = said[b"stalls"], said[b"fails"]
    assert (stalls["timbre-reason-code"], stalls["timbre-attempts"]) == ("fetch_timeout", "2")
    assert stalls["timbre-retryable"] == "true", "an operator may have it tried again"
    assert (fails["timbre-reason-code"], fails["timbre-attempts"]) == ("fetch_unavailable", "3")


async def test_a_track_whose_deadline_passed_while_its_worker_was_frozen_is_begun_anew(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tracks: dict[str, Path], tmp_path: Path
) -> None:
    """Where the freeze is so short that nobody takes over."""
    own = await topics(partitions=1)
    requests = 0

    async def silent_at_first(_: web.Request) -> web.FileResponse:
        nonlocal requests
        requests += 1
        if requests == 1:
            await asyncio.sleep(60)
        return web.FileResponse(tracks["mp3"])

    impatient = {"TIMBRE_FETCH__STALL_TIMEOUT_S": "4", "TIMBRE_FETCH__TIMEOUT_S": "4"}
    settings = environment(own, redis_url, redis_prefix, **impatient)
    async with (
        answering(silent_at_first) as http,
        running_worker(settings, tmp_path / "worker.log") as worker,
    ):
        await send(own, event("frozen", f"{http}/track.mp3"))
        await until(lambda: requests)
        worker.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(4.5)
        worker.process.send_signal(signal.SIGCONT)
        results = await receive_json(own, own.topic_tags, 1, timeout_s=20)
        assert worker.metric("timbre_retries_total", code="worker_frozen") == 1
        assert worker.metric("timbre_tracks_total", outcome="dead_letter") == 0
    assert results.keys() == {"frozen"}


async def test_timbre_tag_and_the_worker_give_the_same_result(
    topics: MakeTopics, redis_url: str, redis_prefix: str, shared_data: Path, tmp_path: Path
) -> None:
    own = await topics(partitions=2)
    files = sorted(
        file
        for file in (shared_data / "audio" / "tracks").iterdir()
        if file.suffix in {".mp3", ".ogg"}
    )
    alone = dict(zip(files, await tag_alone(*files), strict=True))
    settings = environment(
        own,
        redis_url,
        redis_prefix,
        TIMBRE_FETCH__FILE_ROOTS=json.dumps([str(shared_data / "audio")]),
        **DEFAULT,
    )
    async with running_worker(settings, tmp_path / "worker.log"):
        await send(own, *(event(file.name, file.as_uri()) for file in files))
        results = await receive_json(own, own.topic_tags, len(files), timeout_s=240)

    for file in files:
        expected, found = scores(alone[file]), scores(results[file.name])
        assert found == pytest.approx(expected, abs=1e-4), file.name


def loads_pytorch(worker: psutil.Process, _: Path) -> bool:
    return any("libtorch" in mapped.path for mapped in worker.memory_maps())


def has_opened_its_spool(_: psutil.Process, spool: Path) -> bool:
    return any(path.is_dir() for path in spool.glob("*"))


def starts_a_decoder(worker: psutil.Process, spool: Path) -> bool:
    return has_opened_its_spool(worker, spool) and bool(worker.children())


@pytest.mark.parametrize("reached", [loads_pytorch, has_opened_its_spool, starts_a_decoder])
async def test_a_worker_stopped_while_it_starts_ends_in_order_and_leaves_nothing(
    reached: Callable[[psutil.Process, Path], bool],
    topics: MakeTopics,
    redis_url: str,
    redis_prefix: str,
    tmp_path: Path,
) -> None:
    own, spool, log = await topics(partitions=1), tmp_path / "spool", tmp_path / "worker.log"
    own_spool = {"TIMBRE_FETCH__SPOOL_DIR": str(spool)}
    settings = environment(own, redis_url, redis_prefix, **own_spool, **DEFAULT)  # which takes long
    with start_worker(settings, log) as process, killed_at_the_end(process):
        worker = psutil.Process(process.pid)
        while not reached(worker, spool):
            assert process.poll() is None, log.read_text()
            await asyncio.sleep(0.001)
        decoders = worker.children()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0, log.read_text()
    assert "metrics and health on port" not in log.read_text(), "it was starting still"
    assert "Traceback" not in log.read_text()
    assert list(spool.glob("*")) == []
    assert not any(decoder.is_running() for decoder in decoders)


async def test_a_worker_stopped_while_it_waits_for_a_silent_kafka_ends_at_once(
    redis_url: str, redis_prefix: str, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    with socket.create_server(("127.0.0.1", 0)) as kafka:
        kafka.settimeout(60)
        own = KafkaSettings(bootstrap_servers=f"127.0.0.1:{kafka.getsockname()[1]}")
        settings = environment(own, redis_url, redis_prefix)
        with start_worker(settings, log) as process, killed_at_the_end(process):
            connection, _ = await asyncio.to_thread(kafka.accept)
            with connection:
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 10) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_told_to_stop_again_and_again_ends_in_order(
    number: signal.Signals,
    topics: MakeTopics,
    redis_url: str,
    redis_prefix: str,
    tmp_path: Path,
) -> None:
    settings = environment(await topics(partitions=1), redis_url, redis_prefix)
    async with running_worker(settings, tmp_path / "worker.log") as worker:
        async with asyncio.timeout(60):
            while worker.process.poll() is None:
                worker.process.send_signal(number)
                await asyncio.sleep(0.005)
        assert worker.process.returncode == 0
    assert "Traceback" not in worker.log.read_text()


async def test_a_worker_that_finishes_what_is_in_flight_before_it_stops_is_live_and_not_ready(
    topics: MakeTopics, redis_url: str, redis_prefix: str, tracks: dict[str, Path], tmp_path: Path
) -> None:
    own = await topics(partitions=1)
    asked, released = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.FileResponse:
        asked.set()
        await released.wait()
        return web.FileResponse(tracks["mp3"])

    async with (
        answering(held) as http,
        file_worker(own, redis_url, redis_prefix, tracks, tmp_path) as worker,
        aiohttp.ClientSession(f"http://127.0.0.1:{worker.port}") as port,
    ):

        async def statuses() -> tuple[int, int]:
            async with port.get("/health/live") as live, port.get("/health/ready") as ready:
                return live.status, ready.status

        await send(own, event("held", f"{http}/held.mp3"))
        await asked.wait()
        assert await statuses() == (200, 200)
        worker.process.send_signal(signal.SIGTERM)
        await until(lambda: "Stopping" in worker.log.read_text())
        assert await statuses() == (200, 503)
        released.set()
        assert await asyncio.to_thread(worker.process.wait, 20) == 0
    assert (await receive_json(own, own.topic_tags, 1)).keys() == {"held"}


COUNTS_WHAT_A_COLLECTION_LOOKS_THROUGH = """
import gc, sys
from worker.app import Worker, run_worker
from worker.settings import load

async def count(worker):
    print("objects:", len(gc.get_objects()))

Worker.run = count
sys.exit(run_worker(load()))
"""


async def test_the_collector_passes_over_what_was_loaded_at_the_start(
    topics: MakeTopics, redis_url: str, redis_prefix: str
) -> None:
    """Or each of its full collections holds up the event loop for 0.2 s."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COUNTS_WHAT_A_COLLECTION_LOOKS_THROUGH),
        env=environment(await topics(partitions=1), redis_url, redis_prefix),
        stdout=subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    assert process.returncode == 0
    assert int(output.split(b"objects:")[1]) < 10_000


@contextmanager
def killed_at_the_end(process: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


async def tag_alone(*files: Path) -> list[dict[str, Any]]:
    tagging = await asyncio.create_subprocess_exec(
        TIMBRE, "tag", "--json", *files, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await tagging.communicate()
    assert tagging.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


def event(track_id: str, uri: str, **more: Any) -> dict[str, Any]:
    return {"track_id": track_id, "audio": {"uri": uri}, **more}


def credentials(endpoint: str) -> dict[str, str]:
    """What a worker needs to read from the bucket."""
    return {
        "TIMBRE_FETCH__S3_ENDPOINT": endpoint,
        "TIMBRE_FETCH__S3_REGION": "us-east-1",
        "TIMBRE_FETCH__S3_ACCESS_KEY_ID": "k",
        "TIMBRE_FETCH__S3_SECRET_ACCESS_KEY": "s",
    }


def bucket_notification(bucket: str, *keys: str) -> bytes:
    """As MinIO publishes it, of so many objects."""
    records = [
        {
            "eventVersion": "2.0",
            "eventSource": "minio:s3",
            "eventName": "s3:ObjectCreated:Put",
            "eventTime": "2026-01-31T12:00:00.000Z",
            "s3": {"bucket": {"name": bucket}, "object": {"key": key, "size": 1, "eTag": "e"}},
        }
        for key in keys
    ]
    return json.dumps(
        {"EventName": "s3:ObjectCreated:Put", "Key": keys[0], "Records": records}
    ).encode()


@asynccontextmanager
async def file_worker(
    own: KafkaSettings,
    redis_url: str,
    prefix: str,
    tracks: dict[str, Path],
    folder: Path,
    **more: str,
) -> AsyncIterator[WorkerProcess]:
    settings = environment(
        own,
        redis_url,
        prefix,
        TIMBRE_FETCH__FILE_ROOTS=json.dumps([str(tracks["mp3"].parent)]),
        **more,
    )
    async with running_worker(settings, folder / "worker.log") as worker:
        yield worker


@asynccontextmanager
async def worker_here(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Worker]:
    """A worker within the test's own process, where its parts can be seen and replaced."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    async with Worker(load(), Bundle.load("fast")) as worker:
        working = asyncio.create_task(worker.run())
        yield worker
        worker.consumer.stop()
        await working


async def stored_of(redis: Redis, key: str, event_id: str) -> dict[bytes, bytes]:
    """The track's hash once it holds this event's result: that is stored after it is published."""
    async with asyncio.timeout(10):
        while (stored := await redis.hgetall(key)).get(b"event_id") != event_id.encode():
            await asyncio.sleep(0.05)
    return cast(dict[bytes, bytes], stored)


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def without_processing(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "processing"}


def scores(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(tag["head"], tag["label"]): tag["score"] for tag in result["tags"]}

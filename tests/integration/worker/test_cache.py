import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import torch
import trustme
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError

from model.bundle import Bundle
from model.heads import Head
from model.network import Tagger
from schemas.events import (
    AudioRef,
    JsonObject,
    ModelRef,
    NewTrack,
    Processing,
    Tag,
    TrackTags,
    WindowCounts,
)
from tests.audio import audio_facts
from tests.memory import peak_bytes
from tests.tls import GuardedRedis, issue_security, tls_proxy
from tests.waiting import until
from worker import cache as cache_module
from worker import publish
from worker.analysis import Analysis
from worker.cache import Cache, connect
from worker.commands import show
from worker.errors import ServicesUnavailable, SettingsInvalid
from worker.metrics import Metrics
from worker.services.redis import Redis as LocalRedis
from worker.services.service import HOST
from worker.settings import MIB, RedisSettings

MODEL = ModelRef(name="model", version="1")
SHA256 = "ab" * 32
GENRES = ("jazz", "rock")
BUNDLE = Bundle(
    name=MODEL.name,
    version=MODEL.version,
    heads=(Head(name="genre", kind="single", labels=GENRES, categories=("genre",) * 2),),
    sample_rate_hz=16_000,
    window_s=3.0,
    embedding_dim=2,
    uncertain_threshold=0.5,
    kind="",
    config={},
    network=cast(Tagger, torch.nn.Identity()),
)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[LocalRedis]:
    """A Redis that the test may stop."""
    redis = LocalRedis(tmp_path / "redis")
    redis.start()
    yield redis
    redis.remove()


class OldRedis(GuardedRedis):
    """A Redis that does not know `HELLO`, as before its version 6."""

    def _configuration(self) -> Iterator[tuple[str, object]]:
        yield from super()._configuration()
        yield "rename-command", 'HELLO ""'


@asynccontextmanager
async def cache_at(
    url: str,
    prefix: str,
    key: str = "key",
    metrics: Metrics | None = None,
    timeout_s: float = 1.0,
    bundle: Bundle = BUNDLE,
    **more: int,
) -> AsyncIterator[Cache]:
    settings = RedisSettings(url=SecretStr(url), prefix=prefix, timeout_s=timeout_s, **more)
    async with Cache(settings, key, bundle, metrics or Metrics()) as cache:
        yield cache


def analysis(genre: str = "jazz", score: float = 0.9, sha256: str = SHA256) -> Analysis:
    return Analysis(
        audio=audio_facts(sha256=sha256),
        tags=[Tag(head="genre", label=genre, category="genre", score=score, share=1.0)],
        uncertain=False,
        windows=WindowCounts(total=1, silent=0),
        vote="mean",
        model=MODEL,
        taggram=None,
        embedding=[0.6, 0.8],
    )  # fmt: skip


@asynccontextmanager
async def speaking(reply: bytes, *, port: int = 0, every_s: float = 0.1) -> AsyncIterator[str]:
    """The URL of a Redis that says the same over and over, whatever it is asked."""
    over = asyncio.Event()

    async def serve(_: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # the client has gone
            while not over.is_set():
                out.write(reply)
                await out.drain()
                await asyncio.sleep(every_s)
        out.close()

    async with await asyncio.start_server(serve, HOST, port) as server:
        yield f"redis://{HOST}:{server.sockets[0].getsockname()[1]}/0"
        over.set()
        await asyncio.sleep(every_s)


def tag(label: str, *, head: str = "genre", score: float = 0.9) -> JsonObject:
    return {"head": head, "label": label, "category": "genre", "score": score, "share": 1.0}


async def store(cache: Cache, track_id: str, found: Analysis, **more: JsonObject) -> str:
    track = NewTrack(track_id=track_id, audio=AudioRef(uri="file:///a.mp3"), **more)
    processing = Processing(processed_at=datetime.now(UTC), timings_s={}, cached=False, attempt=1)
    tags, _ = publish.results(track, found, MODEL, processing)
    await cache.store(tags, found)
    return tags.event_id


def backlog(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("timbre_redis_backlog") or 0.0


def lookup_errors(metrics: Metrics) -> float:
    labels = {"result": "error"}
    return metrics.registry.get_sample_value("timbre_cache_lookups_total", labels) or 0.0


async def stored(redis: Redis, *keys: str | bytes) -> bool:
    return int(await redis.exists(*keys)) == len(keys)


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@redis/0",
        "redis://:secret@redis:port/0",
        "redis://:secret@redis/0?foo=bar",
        "redis://:secret@redis/0?protocol=7",
        "redis://:secret@redis/0?retry=3",
        "redis://:secret@redis/0?decode_responses=true",
        "redis://:secret@redis/0?encoding=klingon",
        "rediss://:secret@redis/0?ssl_cert_reqs=perhaps",
        "unix:///redis.sock?foo=bar",
    ],
)
def test_an_address_that_cannot_work_is_told_at_the_start(url: str) -> None:
    with pytest.raises(SettingsInvalid, match="TIMBRE_REDIS__URL") as raised:
        connect(RedisSettings(url=SecretStr(url)))
    assert "secret" not in raised.value.message


@pytest.mark.parametrize("url", ["redis://redis/0", "unix:///redis.sock"])
def test_certificates_without_tls_are_told_at_the_start(url: str, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    connect(RedisSettings(url=SecretStr("rediss://redis/0"), ssl_ca_file=authority))
    with pytest.raises(SettingsInvalid, match=r"TIMBRE_REDIS__SSL_\* only with rediss://"):
        connect(RedisSettings(url=SecretStr(url), ssl_ca_file=authority))


async def test_redis_is_spoken_to_over_tls_where_its_authority_vouches_for_its_name_alone(
    tmp_path: Path,
) -> None:
    security, password = issue_security(tmp_path, "default", "hunter2"), SecretStr("hunter2")
    other = issue_security(tmp_path / "other", "default", "hunter2")
    guarded = GuardedRedis(tmp_path / "redis", "hunter2")
    guarded.start()
    try:
        async with tls_proxy(guarded.port, security) as port:

            async def answers(host: str = HOST, **more: Any) -> bool:
                url = SecretStr(f"rediss://{host}:{port}/0")
                async with connect(RedisSettings(url=url, **more)) as client:
                    return bool(await client.ping())

            assert await answers(password=password, ssl_ca_file=security.ca_file)
            with pytest.raises(AuthenticationError):
                await answers(ssl_ca_file=security.ca_file)
            for authority in (None, other.ca_file):
                with pytest.raises(RedisConnectionError, match="certificate"):
                    await answers(password=password, ssl_ca_file=authority)
            with pytest.raises(RedisConnectionError, match=r"[Hh]ostname"):
                await answers("localhost", password=password, ssl_ca_file=security.ca_file)
    finally:
        guarded.remove()


async def test_a_redis_that_asks_for_a_client_certificate_is_shown_the_one_that_is_set(
    tmp_path: Path, redis_url: str
) -> None:
    security = issue_security(tmp_path, "default", "")
    other = issue_security(tmp_path / "other", "default", "")
    server_port = urlsplit(redis_url).port
    assert server_port is not None
    async with tls_proxy(server_port, security, asks_clients=True) as port:

        async def answers(**files: Path) -> bool:
            settings = RedisSettings(
                url=SecretStr(f"rediss://{HOST}:{port}/0"), ssl_ca_file=security.ca_file, **files
            )
            async with connect(settings) as client:
                return bool(await client.ping())

        own = security.certificate_file
        assert await answers(ssl_cert_file=own)
        assert await answers(ssl_cert_file=own, ssl_key_file=own)
        for stranger in ({}, {"ssl_cert_file": other.certificate_file}):
            with pytest.raises(RedisConnectionError):
                await answers(**stranger)


async def test_a_stored_analysis_is_found_by_audio_and_by_event(
    redis_url: str, redis_prefix: str
) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        assert await cache.by_audio(SHA256) is None
        event_id = await store(cache, "t", analysis())
        assert await cache.by_audio(SHA256) == analysis()
        assert await cache.by_event(event_id) == analysis()
        unpublished = analysis(sha256="cd" * 32)
        await cache.remember("event", unpublished)
        assert await cache.by_event("event") == unpublished


@pytest.mark.parametrize("uncertain", [False, True])
async def test_a_tracks_hash_holds_its_best_genre_its_result_and_its_embedding(
    redis: Redis, redis_url: str, redis_prefix: str, uncertain: bool
) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        found = analysis("jazz", 0.9).model_copy(update={"uncertain": uncertain})
        event_id = await store(cache, "t", found)
    held = cast(dict[bytes, bytes], await redis.hgetall(f"{redis_prefix}track:t"))
    assert TrackTags.from_bytes(held.pop(b"result")).event_id == event_id
    embedding = np.frombuffer(held.pop(b"embedding"), "<f4")
    np.testing.assert_allclose(embedding, found.embedding, rtol=1e-6)
    assert held == {
        b"event_id": event_id.encode(),
        b"genre": b"jazz",
        b"score": b"0.9",
        b"uncertain": b"1" if uncertain else b"0",
    }


@pytest.mark.parametrize(
    ("refusing", "mended", "told"),
    [
        (
            "ACL SETUSER default -eval",
            "ACL SETUSER default +eval",
            "no permissions to run the 'eval' command",
        ),
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "OutOfMemoryError"),
        ("REPLICAOF 127.0.0.1 9", "REPLICAOF NO ONE", "ReadOnlyError"),
    ],
)
async def test_what_redis_refuses_is_told_once_and_stored_once_it_may_be(
    own_redis: LocalRedis,
    redis_prefix: str,
    caplog: pytest.LogCaptureFixture,
    refusing: str,
    mended: str,
    told: str,
) -> None:
    async with (
        cache_at(own_redis.address, redis_prefix) as cache,
        Redis.from_url(own_redis.address) as redis,
    ):
        await redis.execute_command(*refusing.split())  # type: ignore[no-untyped-call]
        for track_id in ("one", "two"):
            await store(cache, track_id, analysis())
        await asyncio.sleep(2 * cache_module.DOWN_FOR_S)
        assert caplog.text.count(told) == 1
        await redis.execute_command(*mended.split())  # type: ignore[no-untyped-call]
        keys = [f"{redis_prefix}track:{track_id}" for track_id in ("one", "two")]
        await until(lambda: stored(redis, *keys), timeout_s=20)


async def test_a_redis_that_may_not_be_read_is_told_once_and_stored_in(
    own_redis: LocalRedis, redis_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        cache_at(own_redis.address, redis_prefix) as cache,
        Redis.from_url(own_redis.address) as redis,
    ):
        await redis.acl_setuser("default", enabled=True, commands=["-getrange"])
        for track_id in ("one", "two"):
            assert await cache.by_audio(SHA256) is None
            await store(cache, track_id, analysis())
            assert await stored(redis, f"{redis_prefix}track:{track_id}")
        assert caplog.text.count("no permissions to run the 'getrange' command") == 1
        await redis.acl_setuser("default", enabled=True, commands=["+getrange"])
        assert await cache.by_audio(SHA256) == analysis()


async def test_a_redis_that_repeats_the_password_has_it_told_to_nobody(
    tmp_path: Path, redis_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis = OldRedis(tmp_path / "redis", "hunter2")
    redis.start()
    try:
        url = redis.address.replace("//", "//:hunter2@")
        async with cache_at(url, redis_prefix) as cache:
            await cache.by_audio(SHA256)
        with pytest.raises(ServicesUnavailable, match="unknown command `HELLO`") as raised:
            await show.stored(RedisSettings(url=SecretStr(url)), "t")
    finally:
        redis.remove()
    assert "unknown command `HELLO`" in caplog.text
    assert "hunter2" not in caplog.text + raised.value.message


async def test_as_many_events_may_be_in_flight_as_are_asked_for(
    redis_url: str, redis_prefix: str
) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        await store(cache, "t", analysis())
        found = await asyncio.gather(*(cache.by_audio(SHA256) for _ in range(101)))
    assert found == [analysis()] * 101, "the client's pool has 100 connections"


async def test_another_model_or_setting_does_not_find_it(redis_url: str, redis_prefix: str) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        await store(cache, "t", analysis())
    async with cache_at(redis_url, redis_prefix, key="another") as cache:
        assert await cache.by_audio(SHA256) is None


async def test_a_track_whose_genre_changes_leaves_the_old_one(
    redis: Redis, redis_url: str, redis_prefix: str
) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        await store(cache, "t", analysis("jazz"))
        await store(cache, "t", analysis("rock", 0.5))
    assert await redis.zscore(f"{redis_prefix}genre:jazz", "t") is None
    assert await redis.zscore(f"{redis_prefix}genre:rock", "t") == 0.5


async def test_a_track_leaves_the_genre_of_an_earlier_model_that_had_other_labels(
    redis_url: str, redis_prefix: str, redis: Redis
) -> None:
    async with cache_at(redis_url, redis_prefix, genre_ttl_s=3600) as cache:
        await store(cache, "t", analysis("jazz"))
    head = BUNDLE.heads[0].model_copy(update={"labels": ("swing", "bebop")})
    other = replace(BUNDLE, heads=(head,))
    async with cache_at(redis_url, redis_prefix, bundle=other, genre_ttl_s=3600) as cache:
        await store(cache, "t", analysis("swing"))
    assert await redis.keys(f"{redis_prefix}genre*:jazz") == []
    assert await redis.zrange(f"{redis_prefix}genre:swing", 0, -1) == [b"t"]


async def test_a_track_leaves_its_old_genre_also_when_its_hash_is_gone(
    redis: Redis, redis_url: str, redis_prefix: str
) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        await store(cache, "t", analysis("jazz"))
        await redis.delete(f"{redis_prefix}track:t")
        await store(cache, "t", analysis("rock", 0.5))
    assert await redis.zrange(f"{redis_prefix}genre:jazz", 0, -1) == []
    assert await redis.zrange(f"{redis_prefix}genre:rock", 0, -1) == [b"t"]


async def test_a_damaged_analysis_is_made_anew(
    redis: Redis, redis_url: str, redis_prefix: str
) -> None:
    await redis.set(f"{redis_prefix}cache:{SHA256}:key", b"{}")
    async with cache_at(redis_url, redis_prefix) as cache:
        assert await cache.by_audio(SHA256) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding", []),
        ("embedding", [float("nan"), 0.8]),
        ("embedding", [float("inf")]),
        ("embedding", [1.0]),
        ("embedding", [0.6, 8.0]),
        ("tags", []),
        ("tags", [tag("jazz", score=2.0)]),
        ("tags", [tag("polka")]),
        ("tags", [tag("jazz", head="mood")]),
        ("tags", [tag("jazz"), tag("jazz")]),
        ("windows", {"total": 1, "silent": 1}),
        ("vote", "none"),
        ("model", {"name": "model", "version": "2"}),
        ("audio", analysis(sha256="cd" * 32).model_dump()["audio"]),
        ("audio", analysis().model_dump()["audio"] | {"codec": "x" * MIB}),  # no topic takes it
        ("audio", analysis().model_dump()["audio"] | {"channels": 10**400}),
        ("taggram", {"genre": [[0.5]]}),
        ("taggram", {"genre": [[0.5, 0.5], [0.5, 0.5]]}),
        ("taggram", {"mood": [[0.5, 0.5]]}),
        ("taggram", {str(head): [] for head in range(100_000)}),
    ],
)
async def test_an_analysis_that_the_model_cannot_have_made_is_made_anew(
    redis: Redis,
    redis_url: str,
    redis_prefix: str,
    caplog: pytest.LogCaptureFixture,
    field: str,
    value: object,
) -> None:
    changed = json.dumps(analysis().model_dump(mode="json") | {field: value})
    await redis.set(f"{redis_prefix}cache:{SHA256}:key", changed)
    metrics = Metrics()
    async with cache_at(redis_url, redis_prefix, metrics=metrics) as cache:
        assert await cache.by_audio(SHA256) is None
    assert lookup_errors(metrics) == 1
    assert "an analysis that can't be right" in caplog.text


@pytest.mark.parametrize("field", ["tags", "embedding", "taggram"])
@pytest.mark.parametrize("size_bytes", [4 * MIB, 32 * MIB])
async def test_an_enormous_analysis_takes_neither_long_nor_much_memory(
    redis: Redis, redis_url: str, redis_prefix: str, field: str, size_bytes: int
) -> None:
    wrong = "[" + "{}," * (size_bytes // 3) + "{}]"
    whole = json.dumps(analysis().model_dump(mode="json") | {field: "here"})
    value = whole.replace('"here"', f'{{"genre": {wrong}}}' if field == "taggram" else wrong)
    await redis.set(f"{redis_prefix}cache:{SHA256}:key", value)
    async with cache_at(redis_url, redis_prefix) as cache:
        peak, began_s = peak_bytes(), time.process_time()
        assert await cache.by_audio(SHA256) is None
        assert time.process_time() - began_s < 1.5, "12 s for 4 MiB with an error for each"
        assert peak_bytes() - peak < 1024 * MIB, "5 GB"
    await redis.delete(f"{redis_prefix}cache:{SHA256}:key")


async def test_what_others_put_into_a_tracks_hash_and_genres_is_never_read(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    redis = Redis.from_url(own_redis.address)
    enormous = b"x" * 32 * MIB
    await redis.hset(f"{redis_prefix}track:t", "genre", enormous)
    await redis.zadd(f"{redis_prefix}genre-since:jazz", {enormous: 1.0})
    sent_before = (await redis.info("stats"))["total_net_output_bytes"]
    async with cache_at(own_redis.address, redis_prefix) as cache:
        await store(cache, "t", analysis("jazz"))
    assert await redis.hget(f"{redis_prefix}track:t", "genre") == b"jazz"
    assert await redis.zrange(f"{redis_prefix}genre-since:jazz", 0, -1) == [b"t"]
    assert (await redis.info("stats"))["total_net_output_bytes"] - sent_before < MIB
    await redis.aclose()


async def test_bytes_that_are_no_text_are_as_good_as_none(
    redis: Redis, redis_url: str, redis_prefix: str
) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        event_id = await store(cache, "t", analysis())
        await redis.set(f"{redis_prefix}event:{event_id}", b"\xff")
        await redis.hset(f"{redis_prefix}track:t", "genre", b"\xff")
        assert await cache.by_event(event_id) is None
        assert await store(cache, "t", analysis()) == event_id
        assert await cache.by_event(event_id) == analysis()


@pytest.mark.parametrize("theirs", ["theirs", "theirs, with args", "a caused error: b"])
async def test_what_others_keep_under_our_keys_holds_up_no_other_track(
    redis: Redis,
    redis_url: str,
    redis_prefix: str,
    caplog: pytest.LogCaptureFixture,
    theirs: str,
) -> None:
    await redis.set(f"{redis_prefix}track:{theirs}", "x")
    await redis.rpush(f"{redis_prefix}cache:{SHA256}:key", "x")
    metrics = Metrics()
    async with cache_at(redis_url, redis_prefix, metrics=metrics) as cache:
        assert await cache.by_audio(SHA256) is None
        await store(cache, theirs, analysis())
        other = "cd" * 32
        await store(cache, "ours", analysis(sha256=other))
        assert await cache.by_audio(other) == analysis(sha256=other)
        assert await redis.hget(f"{redis_prefix}track:ours", "genre") == b"jazz"
    assert metrics.registry.get_sample_value("timbre_redis_dropped_total") == 1
    assert lookup_errors(metrics) == 2, "the analysis and the track"
    assert caplog.text.count("not Timbre's under a key of Timbre's") == 2


async def test_a_track_with_the_name_of_an_error_is_stored_once_redis_has_room(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    async with (
        cache_at(own_redis.address, redis_prefix) as cache,
        Redis.from_url(own_redis.address) as redis,
    ):
        await redis.config_set("maxmemory", 1)
        await store(cache, "WRONGTYPE", analysis())
        await redis.config_set("maxmemory", 0)
        await until(lambda: stored(redis, f"{redis_prefix}track:WRONGTYPE"), timeout_s=20)


async def test_what_redis_missed_and_others_keep_the_keys_of_is_let_go_at_once(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    metrics = Metrics()
    async with (
        cache_at(own_redis.address, redis_prefix, metrics=metrics) as cache,
        Redis.from_url(own_redis.address) as redis,
    ):
        names = [f"theirs{number}" for number in range(30)]
        for name in names:
            await redis.set(f"{redis_prefix}track:{name}", "x")
        await redis.config_set("maxmemory", 1)
        for name in names:
            await store(cache, name, analysis())
        await redis.config_set("maxmemory", 0)
        dropped = metrics.registry.get_sample_value
        await until(lambda: dropped("timbre_redis_dropped_total") == len(names), timeout_s=15)


async def test_what_redis_missed_is_stored_once_it_is_back(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    async with cache_at(own_redis.address, redis_prefix) as cache:
        own_redis.stop()
        for number in range(3):
            await store(cache, f"t{number}", analysis(sha256=f"{number:064x}"))
        assert await cache.by_audio(SHA256) is None

        own_redis.start()
        keys = [f"{redis_prefix}track:t{number}" for number in range(3)]
        async with Redis.from_url(own_redis.address) as redis:
            await until(lambda: stored(redis, *keys))


@pytest.mark.parametrize("reply", [b":1\r\n", b"*1\r\n" * 100_000])
async def test_what_a_garbling_redis_missed_is_stored_once_it_is_itself_again(
    own_redis: LocalRedis, redis_prefix: str, reply: bytes
) -> None:
    metrics = Metrics()
    own_redis.stop()
    async with cache_at(own_redis.address, redis_prefix, metrics=metrics) as cache:
        async with speaking(reply, port=own_redis.port):
            assert await cache.by_event("event") is None
            await cache.remember("event", analysis())
            await store(cache, "t", analysis())
            met = lookup_errors(metrics)
            await until(lambda: lookup_errors(metrics) > met, timeout_s=10)
        own_redis.start()
        async with Redis.from_url(own_redis.address) as redis:
            await until(lambda: stored(redis, f"{redis_prefix}track:t"), timeout_s=20)


@pytest.mark.parametrize("reply", [b"", b"+OK\r\n"])
async def test_a_redis_that_is_silent_or_drips_is_waited_for_twice_its_timeout_at_most(
    redis_prefix: str, reply: bytes
) -> None:
    async with (
        speaking(reply, every_s=0.25) as url,
        cache_at(url, redis_prefix, timeout_s=0.5) as cache,
    ):
        async with asyncio.timeout(2 * 0.5 + 0.8):
            await store(cache, "t", analysis())


async def test_what_redis_missed_takes_the_place_of_nothing_newer(
    own_redis: LocalRedis, redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CATCH_UP_BACKOFF_S", (60.0, 60.0))
    monkeypatch.setattr(cache_module, "DOWN_FOR_S", 0.0)
    async with cache_at(own_redis.address, redis_prefix) as cache:
        own_redis.stop()
        await store(cache, "t", analysis("jazz"))
        await asyncio.sleep(0.2)  # it is tried again, in vain
        own_redis.start()
        await store(cache, "t", analysis("rock"))
    async with Redis.from_url(own_redis.address) as redis:
        assert await redis.hget(f"{redis_prefix}track:t", "genre") == b"rock"


async def test_lookups_do_not_keep_what_redis_missed_from_being_stored(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    async def look_up() -> None:
        while True:
            await cache.by_audio(SHA256)
            await asyncio.sleep(0.005)

    async with cache_at(own_redis.address, redis_prefix) as cache:
        own_redis.stop()
        await store(cache, "t", analysis())
        looking_up = asyncio.create_task(look_up())
        own_redis.start()
        async with Redis.from_url(own_redis.address) as redis:
            await until(lambda: stored(redis, f"{redis_prefix}track:t"), timeout_s=20)
        looking_up.cancel()


async def test_a_track_that_is_cancelled_while_it_asks_redis_ends(
    redis_url: str, redis_prefix: str
) -> None:
    async def go_on(cache: Cache) -> None:
        for _ in range(1000):
            await store(cache, "t", analysis())

    async with cache_at(redis_url, redis_prefix) as cache:
        for _ in range(20):
            tasks = [asyncio.create_task(go_on(cache)) for _ in range(20)]
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            _, left = await asyncio.wait(tasks, timeout=2)
            assert not left


async def test_what_redis_missed_is_stored_however_many_new_results_come(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    metrics, numbers = Metrics(), count()

    async def go_on(cache: Cache) -> None:
        while True:
            await store(cache, f"new {next(numbers)}", analysis())
            await asyncio.sleep(0.01)

    async with cache_at(
        own_redis.address, redis_prefix, metrics=metrics, catch_up_max=1000
    ) as cache:
        own_redis.stop()
        for number in range(500):
            await store(cache, f"t{number}", analysis())
        own_redis.start()
        await until(lambda: backlog(metrics) < 500)
        async with asyncio.TaskGroup() as group:
            going_on = [group.create_task(go_on(cache)) for _ in range(20)]
            await until(lambda: backlog(metrics) == 0, timeout_s=30)
            for task in going_on:
                task.cancel()
    assert metrics.registry.get_sample_value("timbre_redis_dropped_total") == 0


async def test_a_new_result_waits_for_what_redis_missed_of_its_track(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    metrics = Metrics()
    async with cache_at(own_redis.address, redis_prefix, metrics=metrics) as cache:
        own_redis.stop()
        for number in range(300):
            await store(cache, f"t{number}", analysis("rock"))
        own_redis.start()
        await until(lambda: backlog(metrics) < 300)
        await store(cache, "t299", analysis("jazz"), metadata={"version": 2})
        assert backlog(metrics) > 0
        await until(lambda: backlog(metrics) == 0)
        async with Redis.from_url(own_redis.address) as redis:
            assert await redis.hget(f"{redis_prefix}track:t299", "genre") == b"jazz"


async def test_of_what_redis_missed_the_newest_results_are_kept(
    own_redis: LocalRedis, redis_prefix: str
) -> None:
    metrics = Metrics()
    async with cache_at(own_redis.address, redis_prefix, metrics=metrics, catch_up_max=2) as cache:
        own_redis.stop()
        for number in range(5):
            await store(cache, f"t{number}", analysis(sha256=f"{number:064x}"))

        own_redis.start()
        newest = {f"{redis_prefix}track:t{number}".encode() for number in (3, 4)}
        async with Redis.from_url(own_redis.address) as redis:
            await until(lambda: stored(redis, *newest))
            assert set(await redis.keys(f"{redis_prefix}track:*")) == newest
    assert metrics.registry.get_sample_value("timbre_redis_dropped_total") == 3


async def test_what_redis_missed_takes_bounded_memory(
    redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata: JsonObject = {"a": [[] for _ in range(40_000)]}
    own = analysis()
    monkeypatch.setattr(cache_module, "CATCH_UP_BYTES", 10 * 130_000)
    async with cache_at("redis://127.0.0.1:9/0", redis_prefix) as cache:
        before = psutil.Process().memory_info().rss
        for number in range(30):
            last = await store(cache, f"t{number}", own, metadata=metadata)
        assert psutil.Process().memory_info().rss - before < 40 * MIB, "3 MB each as objects"
        assert await cache.by_event(last) == own


async def test_a_stop_stores_what_redis_missed_although_it_is_left_alone_for_now(
    own_redis: LocalRedis, redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "DOWN_FOR_S", 60.0)
    async with cache_at(own_redis.address, redis_prefix) as cache:
        own_redis.stop()
        for track_id in ("one", "two"):
            await store(cache, track_id, analysis())
        own_redis.start()
    async with Redis.from_url(own_redis.address) as redis:
        assert await stored(redis, f"{redis_prefix}track:one", f"{redis_prefix}track:two")


async def test_what_redis_missed_again_and_again_is_kept_once(
    redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CATCH_UP_BYTES", 10_000)
    async with cache_at("redis://127.0.0.1:9/0", redis_prefix) as cache:
        first = await store(cache, "first", analysis())
        for _ in range(50):
            await store(cache, "again", analysis())
        assert await cache.by_event(first) == analysis()


async def test_a_stop_tells_how_much_of_what_redis_missed_is_lost(
    redis_prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([True, False])

    async def store_one(*_: object) -> bool:
        return next(answers)

    async with cache_at("redis://127.0.0.1:9/0", redis_prefix) as cache:
        for number in range(3):
            await store(cache, f"t{number}", analysis(sha256=f"{number:064x}"))
        monkeypatch.setattr(cache, "_try_to_store", store_one)
    assert "2 results were not stored" in caplog.text


async def test_a_track_leaves_its_genre_when_its_life_there_is_over(
    redis: Redis, redis_url: str, redis_prefix: str
) -> None:
    genre, since = f"{redis_prefix}genre:jazz", f"{redis_prefix}genre-since:jazz"
    async with cache_at(redis_url, redis_prefix, genre_ttl_s=3600) as cache:
        await store(cache, "old", analysis("jazz"))
        await store(cache, "again", analysis("jazz"))
        await store(cache, "young", analysis("jazz"))
        await redis.zincrby(since, -3601, "old")
        await redis.zincrby(since, -3601, "again")
        await store(cache, "again", analysis("jazz"))
        assert set(await redis.zrange(genre, 0, -1)) == {b"again", b"young"}
        assert set(await redis.zrange(since, 0, -1)) == {b"again", b"young"}
        assert 0 < await redis.ttl(genre) <= 3600


async def test_a_workers_clock_that_jumps_takes_no_track_out_of_its_genre(
    redis: Redis, redis_url: str, redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    async with cache_at(redis_url, redis_prefix, genre_ttl_s=3600) as cache:
        for hours_off in (0, 2, -2, 0):
            monkeypatch.setattr(time, "time", lambda off_s=3600 * hours_off: now() + off_s)
            await store(cache, f"{hours_off} hours off", analysis())
    for hours_off in (0, 2, -2):
        member = f"{hours_off} hours off"
        since_s = await redis.zscore(f"{redis_prefix}genre-since:jazz", member)
        assert since_s is not None
        assert abs(since_s - now()) < 60


@pytest.mark.parametrize("given_s", [3600, 0])
async def test_a_tracks_hash_and_a_cached_analysis_live_as_long_as_is_given(
    redis: Redis, redis_url: str, redis_prefix: str, given_s: int
) -> None:
    async with cache_at(
        redis_url, redis_prefix, track_ttl_s=given_s, cache_ttl_s=2 * given_s
    ) as cache:
        event_id = await store(cache, "t", analysis())
        track_s = await redis.ttl(f"{redis_prefix}track:t")
        cached_s = [
            await redis.ttl(f"{redis_prefix}{key}")
            for key in (f"cache:{SHA256}:key", f"event:{event_id}")
        ]
    if given_s:
        assert given_s - 60 < track_s <= given_s
        assert all(2 * given_s - 60 < left_s <= 2 * given_s for left_s in cached_s)
    else:
        assert [track_s, *cached_s] == [-1] * 3, "for ever"


async def test_what_is_to_live_for_ever_outlives_what_was_set_before(
    redis: Redis, redis_url: str, redis_prefix: str
) -> None:
    async with cache_at(redis_url, redis_prefix) as cache:
        await store(cache, "t", analysis("jazz"))
        await store(cache, "another", analysis("jazz"))
    async with cache_at(
        redis_url, redis_prefix, track_ttl_s=0, cache_ttl_s=0, genre_ttl_s=0
    ) as cache:
        await store(cache, "t", analysis("jazz"))
    for key in ("track:t", "genre:jazz", f"cache:{SHA256}:key"):
        assert await redis.ttl(f"{redis_prefix}{key}") == -1, key

"""Redis: results by track, analyses by audio, tracks by genre. The only place with Redis's keys.

| key | kind | what |
|---|---|---|
| `{prefix}track:{track_id}` | hash | event_id, genre, score, uncertain, result (the tags event), \
embedding (float32, little-endian) |
| `{prefix}cache:{sha256}:{analysis_key}` | string | the analysis of that audio by that model |
| `{prefix}event:{event_id}` | string | SHA-256 of the audio that the event turned out to name |
| `{prefix}genre:{label}` | sorted set | track ids whose best genre it is, by score |
| `{prefix}genre-since:{label}` | sorted set | the same track ids by the time they came there, in \
Unix seconds; kept where `genre_ttl_s` is set, to take out those that outlived it |

Redis is never waited for: while it is down, tags still flow, and what it missed is kept (up to
`catch_up_max` results, and `CATCH_UP_BYTES`) and stored once it is back.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from model.bundle import Bundle
from schemas.events import TrackTags
from worker.analysis import Analysis
from worker.backoff import Backoff
from worker.errors import SettingsInvalid
from worker.metrics import Metrics
from worker.settings import MIB, RedisSettings
from worker.tls import client_context

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 2**31  # the events in flight are their bound; the client's own would be 100
ATTEMPTS = 2  # at a command: a connection may have been closed since it was last used
DOWN_FOR_S = 1.0
CATCH_UP_BACKOFF_S = (0.5, 5.0)
CATCH_UP_BYTES = 256 * MIB  # the metadata of events may be a hundred times that of others
GENRE_HEAD = "genre"
MAX_BYTES = 16 * MIB  # of an analysis; with the taggram of six hours it has 3 MiB
SHA256_CHARS = 64
REASON_CHARS = 200
OUTLIVED_AT_ONCE = 100  # tracks taken out of a genre as one comes in
# By Redis itself: whatever stands there is not read. An earlier model may have had other labels.
LEAVE_FORMER_GENRE = """
local genre = redis.call('HGET', KEYS[1], 'genre')
if genre then
    redis.call('ZREM', ARGV[2] .. genre, ARGV[1])
    redis.call('ZREM', ARGV[3] .. genre, ARGV[1])
end
"""
# By Redis itself: a member may be anybody's and of any length, and workers' clocks differ and jump.
LIVE_FROM_NOW = """
local seconds, microseconds = unpack(redis.call('TIME'))
local now = seconds + microseconds / 1e6
local oldest = now - ARGV[2]
for _, track in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], 0, oldest, 'LIMIT', 0, ARGV[3])) do
    redis.call('ZREM', KEYS[1], track)
    redis.call('ZREM', KEYS[2], track)
end
redis.call('ZADD', KEYS[1], now, ARGV[1])
"""


def connect(settings: RedisSettings) -> Redis:
    """A client of its own connection pool; it connects at the first command.

    Raises
    ------
    SettingsInvalid
        The URL is not one of Redis's, or its options or the settings beside it don't go with it, or
        a file for TLS can't be read.
    """
    options: dict[str, Any] = {}
    if settings.password is not None:
        options["password"] = settings.password.get_secret_value()
    files = {
        "ssl_ca_certs": settings.ssl_ca_file,
        "ssl_certfile": settings.ssl_cert_file,
        "ssl_keyfile": settings.ssl_key_file,
    }
    named = {option: str(file) for option, file in files.items() if file is not None}
    if named:
        client_context("Redis", settings)  # tells now what the first connection would
        options |= named
    try:
        redis = Redis.from_url(
            settings.url.get_secret_value(),
            **options,
            socket_timeout=settings.timeout_s,
            socket_connect_timeout=settings.timeout_s,
            retry=Retry(NoBackoff(), ATTEMPTS - 1),
            max_connections=MAX_CONNECTIONS,
        )
    except ValueError:
        raise SettingsInvalid(
            "TIMBRE_REDIS__URL is not an address of Redis; give redis://host:6379/0, rediss://... "
            "for TLS or unix://path."
        ) from None
    try:
        _check_options(redis)
    except (TypeError, ValueError, AttributeError, LookupError, RedisError):
        raise SettingsInvalid(
            "TIMBRE_REDIS__URL can't be used as it is set up; leave out the options after its '?', "
            "and give TIMBRE_REDIS__SSL_* only with rediss://."
        ) from None
    return redis


def _check_options(redis: Redis) -> None:
    """Raise now what the first command would: nothing but a connection looks at them."""
    pool = redis.connection_pool
    connection = pool.connection_class(**pool.connection_kwargs)
    if connection.encoder.decode_responses:
        raise ValueError("what is kept in Redis is bytes")
    connection.encoder.encode("")  # type: ignore[no-untyped-call]


def reason(error: Exception) -> str:
    """What went wrong, without the command: any words may stand in it, and the password."""
    said = str(error).rpartition(" caused error: ")[2].partition(", with args")[0]
    said = said.strip("()'\",")  # a tuple of one, where it failed among others
    return f"{type(error).__name__}: {said[:REASON_CHARS]}".rstrip(": ")


def _live_for(commands: Pipeline, key: str, life_s: int) -> None:
    """Give a key its life anew; it may have been given one by other settings (0: for ever)."""
    if life_s:
        commands.expire(key, life_s)
    else:
        commands.persist(key)


class Keys:
    """Names of keys."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def track(self, track_id: str) -> str:
        return f"{self._prefix}track:{track_id}"

    def analysis(self, sha256: str, analysis_key: str) -> str:
        return f"{self._prefix}cache:{sha256}:{analysis_key}"

    def event(self, event_id: str) -> str:
        return f"{self._prefix}event:{event_id}"

    def genre(self, label: str) -> str:
        return f"{self._prefix}genre:{label}"

    def genre_since(self, label: str) -> str:
        return f"{self._prefix}genre-since:{label}"


class _Missed(NamedTuple):
    """A result as bytes: its metadata takes twenty times as much as objects."""

    track_id: str
    event: bytes
    analysis: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.event) + len(self.analysis)


class Cache:
    """What was found before, and what is to be kept.

    Parameters
    ----------
    analysis_key
        Says which model and which settings made an analysis; others' are not found.
    bundle
        The model; an analysis that it can't have made is passed over.
    """

    def __init__(
        self, settings: RedisSettings, analysis_key: str, bundle: Bundle, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._analysis_key = analysis_key
        self._bundle = bundle
        named = [head for head in bundle.heads if head.name == GENRE_HEAD]
        self._genre_head = (*named, *bundle.heads)[0]
        self._metrics = metrics
        self._keys = Keys(settings.prefix)
        self._redis = connect(settings)
        self._down = False
        self._down_until_s = 0.0
        self._unreadable = False
        self._missed: OrderedDict[str, _Missed] = OrderedDict()
        self._missed_bytes = 0
        self._missed_of: Counter[str] = Counter()  # by track
        self._missing = asyncio.Event()
        self._catching_up: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._catching_up = asyncio.create_task(self._catch_up(), name="redis catch-up")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._catching_up is not None
        self._catching_up.cancel()
        await asyncio.gather(self._catching_up, return_exceptions=True)
        self._down_until_s = 0.0  # it may be back, and there is no later
        while self._missed:
            if not await self._store_oldest():
                log.warning("Redis is down: %d results were not stored there", len(self._missed))
                break
        await self._redis.aclose()

    async def by_event(self, event_id: str) -> Analysis | None:
        """The analysis that answered the same event before."""
        if (missed := self._missed.get(event_id)) is not None:
            return Analysis.from_bytes(missed.analysis)
        sha256 = await self._get(self._keys.event(event_id), SHA256_CHARS)
        return None if sha256 is None else await self.by_audio(sha256.decode(errors="replace"))

    async def by_audio(self, sha256: str) -> Analysis | None:
        """The analysis of the same audio by the same model."""
        stored = await self._get(self._keys.analysis(sha256, self._analysis_key), MAX_BYTES)
        if stored is None:
            return None
        with suppress(ValidationError):
            analysis = Analysis.from_bytes(stored)
            if analysis.audio.sha256 == sha256 and analysis.may_be_of(self._bundle):
                return analysis
        log.warning("Redis holds an analysis that can't be right; it is made anew")
        self._metrics.cache.labels("error").inc()
        return None

    async def remember(self, event_id: str, analysis: Analysis) -> None:
        """Keep an analysis before it is published, so that a redelivery gives the same result."""
        if self._is_avoided():
            return
        try:
            async with self._redis.pipeline(transaction=True) as commands:
                self._add_analysis(commands, event_id, analysis)
                await self._in_time(commands.execute())
        except Exception as error:
            self._failed(error)

    async def store(self, event: TrackTags, analysis: Analysis) -> None:
        """Keep a published result: now, or once Redis is back, after others of its track."""
        waits = (self._down and self._missed) or event.track_id in self._missed_of
        if waits or not await self._try_to_store(event, analysis):
            self._miss(event, analysis)

    async def _get(self, key: str, max_bytes: int) -> bytes | None:
        """The first `max_bytes` of a value, which anybody may have written; None where it is empty
        or missing.
        """
        if self._is_avoided():
            return None
        try:
            value = await self._in_time(self._redis.getrange(key, 0, max_bytes - 1))
        except NoPermissionError as error:  # others may be allowed: it isn't down
            self._metrics.cache.labels("error").inc()
            if not self._unreadable:
                log.warning("Redis can't be read (%s); going on without it", reason(error))
            self._unreadable = True
            return None
        except Exception as error:
            self._failed(error)
            return None
        self._unreadable = False
        return value if isinstance(value, bytes) and value else None

    async def _try_to_store(self, event: TrackTags, analysis: Analysis) -> bool:
        if self._is_avoided(storing=True):
            return False
        try:
            await self._write(event, analysis)
        except Exception as error:
            if self._failed(error):
                return False
            # It fails as often as it is tried; others must not wait for it.
            self._metrics.redis_dropped.inc()
        if self._down:
            log.info("Redis answers again")
            self._down = False
            self._down_until_s = 0.0
        return True

    async def _write(self, event: TrackTags, analysis: Analysis) -> None:
        keys, settings = self._keys, self._settings
        genre = next(tag for tag in event.tags if tag.head == self._genre_head.name)
        track_key = keys.track(event.track_id)
        genre_key, since_key = keys.genre(genre.label), keys.genre_since(genre.label)
        async with self._redis.pipeline(transaction=True) as commands:
            former = (event.track_id, keys.genre(""), keys.genre_since(""))
            commands.eval(LEAVE_FORMER_GENRE, 1, track_key, *former)
            for label in self._genre_head.labels:  # its hash may be gone
                commands.zrem(keys.genre(label), event.track_id)
                commands.zrem(keys.genre_since(label), event.track_id)
            if settings.genre_ttl_s:
                life = (event.track_id, str(settings.genre_ttl_s), str(OUTLIVED_AT_ONCE))
                commands.eval(LIVE_FROM_NOW, 2, since_key, genre_key, *life)
                commands.expire(since_key, settings.genre_ttl_s)
            commands.hset(
                track_key,
                mapping={
                    "event_id": event.event_id,
                    "genre": genre.label,
                    "score": repr(genre.score),
                    "uncertain": int(event.uncertain),
                    "result": event.to_bytes(),
                    "embedding": np.asarray(analysis.embedding, "<f4").tobytes(),
                },
            )
            commands.zadd(genre_key, {event.track_id: genre.score})
            self._add_analysis(commands, event.event_id, analysis)
            _live_for(commands, track_key, settings.track_ttl_s)
            _live_for(commands, genre_key, settings.genre_ttl_s)
            await self._in_time(commands.execute())

    async def _in_time(self, answer: Awaitable[object]) -> object:
        """The client's own timeout counts anew for each reply, and it swallows cancellations where
        Python's `wait_for` does (before 3.12)."""
        async with asyncio.timeout(ATTEMPTS * self._settings.timeout_s):
            found = await answer
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        return found

    def _add_analysis(self, commands: Pipeline, event_id: str, analysis: Analysis) -> None:
        life_s = self._settings.cache_ttl_s or None
        sha256 = analysis.audio.sha256
        key = self._keys.analysis(sha256, self._analysis_key)
        commands.set(key, analysis.to_bytes(), ex=life_s)
        commands.set(self._keys.event(event_id), sha256, ex=life_s)

    def _is_avoided(self, *, storing: bool = False) -> bool:
        """Whether to go on without Redis: while it is down, one caller a second tries it.

        Where results wait to be stored that is who stores them, as lookups come far more often.
        """
        now_s = time.monotonic()
        if now_s < self._down_until_s or (self._down and self._missed and not storing):
            return True
        if self._down:
            self._down_until_s = now_s + DOWN_FOR_S
        return False

    def _failed(self, error: Exception) -> bool:
        """Count a failure: True where Redis is down, False where this key is another program's.

        It may be of any type: a garbled reply fails wherever the client happens to be with it.
        """
        self._metrics.cache.labels("error").inc()
        why = reason(error)
        if isinstance(error, ResponseError) and "WRONGTYPE" in why:
            log.warning("Redis holds something that is not Timbre's under a key of Timbre's")
            return False
        if not self._down:
            log.warning("Redis can't be used (%s); going on without it", why)
        self._down = True
        self._down_until_s = time.monotonic() + DOWN_FOR_S
        return True

    def _miss(self, event: TrackTags, analysis: Analysis) -> None:
        self._forget(event.event_id)
        missed = _Missed(event.track_id, event.to_bytes(), analysis.to_bytes())
        self._missed[event.event_id] = missed
        self._missed_of[missed.track_id] += 1
        self._missed_bytes += missed.size_bytes
        while (
            len(self._missed) > self._settings.catch_up_max or self._missed_bytes > CATCH_UP_BYTES
        ):
            self._forget(next(iter(self._missed)))
            self._metrics.redis_dropped.inc()
        self._metrics.redis_backlog.set(len(self._missed))
        self._missing.set()

    def _forget(self, event_id: str) -> None:
        if (missed := self._missed.pop(event_id, None)) is not None:
            self._missed_bytes -= missed.size_bytes
            self._missed_of[missed.track_id] -= 1
            if not self._missed_of[missed.track_id]:
                del self._missed_of[missed.track_id]

    async def _catch_up(self) -> None:
        """Store what Redis missed, oldest first, once it answers again."""
        backoff = Backoff(*CATCH_UP_BACKOFF_S)
        while True:
            await self._missing.wait()
            while self._missed:
                if await self._store_oldest():
                    backoff.reset()
                else:
                    await asyncio.sleep(backoff.next_s())
            self._missing.clear()

    async def _store_oldest(self) -> bool:
        """Store what Redis missed first; whether that is done with."""
        event_id, missed = next(iter(self._missed.items()))
        event, analysis = TrackTags.from_bytes(missed.event), Analysis.from_bytes(missed.analysis)
        if not await self._try_to_store(event, analysis):
            return False
        self._forget(event_id)
        self._metrics.redis_backlog.set(len(self._missed))
        return True

"""From an address to audio in the spool: the one way in for bytes from outside.

Where audio comes from is told by the scheme: `downloads` (http, https), `object_stores` (s3, gs,
az), `local_files` (file). What they share stands here: the spool, retries with backoff and jitter
for what can pass, the deadline, the checksum.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Self

from aiohttp.abc import AbstractResolver
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random,
)

from worker.errors import (
    ChecksumMismatch,
    FetchFailed,
    FetchTimeout,
    FetchTooSlow,
    FetchUnavailable,
    SpoolFull,
    TimbreError,
    UriUnsupported,
)
from worker.fetch.addresses import shown
from worker.fetch.downloads import Downloads
from worker.fetch.local_files import LocalFiles
from worker.fetch.object_stores import ObjectStores
from worker.fetch.spool import Spool, SpooledAudio, SpoolFile, in_thread
from worker.settings import FetchSettings

Copy = Callable[[str, SpoolFile], Awaitable[None]]
Sleep = Callable[[float], Awaitable[None]]

STALL_ATTEMPTS = 2
"""At a server that stalls: once more, should a connection have been lost. Each attempt holds a
place in flight for all the time that a stall takes to tell, while other tracks wait for it."""
LONG_SILENCE = 1 / 2
"""Of `stall_timeout_s`: a server that is silent for at least this share of it and then fails counts
as stalled, unless its answer says when to ask again."""


class Fetcher:
    """Fetches audio by URI, as many tracks at once as are asked for.

    Parameters
    ----------
    on_retry
        Told the code of the failure before each wait for another attempt.
    on_bytes
        Told the size of every piece of audio that arrives.
    resolver
        Turns names of HTTP servers into addresses; by default the system's way.

    Raises
    ------
    SettingsInvalid
        A store's key is not of the form that its store has.
    """

    def __init__(
        self,
        settings: FetchSettings,
        *,
        on_retry: Callable[[str], None] = lambda code: None,
        on_bytes: Callable[[int], None] = lambda size_bytes: None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._settings = settings
        self._on_retry = on_retry
        self._spool = Spool(
            settings.spool_dir,
            max_bytes=settings.spool_max_bytes,
            max_file_bytes=settings.max_bytes,
            on_bytes=on_bytes,
        )
        self._downloads = Downloads(settings, resolver)
        stores = ObjectStores(settings)
        self._copy: dict[str, Copy] = {
            "http": self._downloads.copy,
            "https": self._downloads.copy,
            "s3": stores.copy,
            "gs": stores.copy,
            "az": stores.copy,
            "file": LocalFiles(settings.file_roots).copy,
        }
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            opening.callback(self._spool.close)  # also where it is left half open
            await in_thread(self._spool.open)
            await opening.enter_async_context(self._downloads)
            self._open = opening.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    @asynccontextmanager
    async def fetch(
        self, uri: str, *, expected_sha256: str | None = None, sleep: Sleep = asyncio.sleep
    ) -> AsyncIterator[SpooledAudio]:
        """Fetch into the spool; the file is there until the context is left, however it is left.

        All of it has `fetch.timeout_s`, waits for room and between attempts included.

        Parameters
        ----------
        expected_sha256
            Hash in hex that the audio must have.
        sleep
            Waits so many seconds, before another attempt.

        Raises
        ------
        FetchFailed
            A subclass of it. Retryable ones were retried as long as attempts and time allowed, a
            `FetchTimeout` at most once, a `FetchTooSlow` never.
        """
        copy = self._copy.get(uri.partition(":")[0].lower())
        if copy is None:
            raise UriUnsupported(
                f"{shown(uri)} is not fetched; use an address of https, http, s3, gs, az or file."
            )
        retrying = AsyncRetrying(
            sleep=sleep,
            retry=_tried_again,
            stop=self._tried_enough,
            wait=self._wait_s,
            before_sleep=self._tell_retry,
            reraise=True,
        )
        deadline_s = asyncio.get_running_loop().time() + self._settings.timeout_s
        try:
            fetched: tuple[SpoolFile, SpooledAudio] = await retrying(
                self._attempt, copy, uri, expected_sha256, deadline_s
            )
        except FetchFailed as error:
            error.attempts = retrying.statistics["attempt_number"]
            raise
        file, audio = fetched
        try:
            yield audio
        finally:
            file.remove()

    async def _attempt(
        self, copy: Copy, uri: str, expected_sha256: str | None, deadline_s: float
    ) -> tuple[SpoolFile, SpooledAudio]:
        loop = asyncio.get_running_loop()
        file, began_s = self._spool.file(), loop.time()
        with ExitStack() as unless_fetched:
            unless_fetched.callback(file.remove)
            try:
                async with asyncio.timeout_at(deadline_s):
                    await copy(uri, file)
                    audio = await file.finish()
            except TimeoutError:
                raise _late(file, uri) from None
            except FetchUnavailable as error:
                silent_s = loop.time() - max(began_s, file.written_s)
                stalled = silent_s >= LONG_SILENCE * self._settings.stall_timeout_s
                if stalled and error.retry_after_s is None:  # else it is at work, and says when
                    raise FetchTimeout(
                        f"After {silent_s:.0f} s of silence: {error.message}"
                    ) from error
                raise
            _check_sha256(audio, expected_sha256, uri)
            unless_fetched.pop_all()
        return file, audio

    def _wait_s(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: never sooner than the server asked for."""
        initial_s, max_s = self._settings.backoff_initial_s, self._settings.backoff_max_s
        backoff = wait_exponential(multiplier=initial_s, max=max_s) + wait_random(0, initial_s)
        asked = error.retry_after_s if isinstance(error := _failure(state), FetchUnavailable) else 0
        return max(backoff(state), asked or 0)

    def _tried_enough(self, state: RetryCallState) -> bool:
        """Whether another attempt, or the wait before it, would be too much: others of the event's
        partition wait behind it."""
        settings = self._settings
        spent = stop_after_attempt(settings.attempts) | stop_before_delay(settings.timeout_s)
        return spent(state) or state.idle_for + state.upcoming_sleep > settings.max_wait_s

    def _tell_retry(self, state: RetryCallState) -> None:
        if isinstance(error := _failure(state), TimbreError):
            self._on_retry(error.code)


def _late(file: SpoolFile, uri: str) -> FetchFailed:
    """The error of a fetch that ran out of time: while it waited for room, or for the server."""
    if file.waits_for_room:
        return SpoolFull(
            f"The spool had no room for {shown(uri)} in time; lower TIMBRE_WORKER__MAX_IN_FLIGHT, "
            "or raise TIMBRE_FETCH__SPOOL_MAX_BYTES."
        )
    return FetchTimeout(
        f"{shown(uri)} did not arrive in time; see how fast its server sends, or raise "
        "TIMBRE_FETCH__TIMEOUT_S."
    )


def _check_sha256(audio: SpooledAudio, expected: str | None, uri: str) -> None:
    if expected is not None and audio.sha256 != expected.lower():
        raise ChecksumMismatch(
            f"The bytes at {shown(uri)} have SHA-256 {audio.sha256}, not the one that the event "
            "names; send the event of what lies there now."
        )


def _tried_again(state: RetryCallState) -> bool:
    error = _failure(state)
    if isinstance(error, FetchTooSlow):
        return False
    if isinstance(error, FetchTimeout):
        return state.attempt_number < STALL_ATTEMPTS
    return isinstance(error, TimbreError) and error.retryable


def _failure(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None

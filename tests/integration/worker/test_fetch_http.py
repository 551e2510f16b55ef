"""The fetcher against a real server that misbehaves in every way HTTP allows."""

import asyncio
import gzip
import hashlib
import socket
import ssl
import struct
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp.abc import AbstractResolver, ResolveResult

from tests.waiting import until
from worker.errors import (
    AddressRefused,
    AudioNotFound,
    AudioTooLarge,
    ChecksumMismatch,
    FetchFailed,
    FetchForbidden,
    FetchTimeout,
    FetchTooSlow,
    FetchUnavailable,
    RedirectLimit,
    SpoolFull,
    TimbreError,
    UriUnsupported,
)
from worker.fetch.fetcher import Fetcher
from worker.fetch.spool import SpoolFile
from worker.settings import FetchSettings

AUDIO = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(AUDIO).hexdigest()
LOOPBACK = ip_network("127.0.0.0/8")
STALL_S = 0.6

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server of raw answers by path; `requests` are the heads it received."""

    port: int = 0
    scheme: str = "http"
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)

    def answer(self, path: str, *answers: Answer) -> str:
        """Give these answers to requests for a path, the last one again and again; its URL."""
        self.answers[path] = list(answers)
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            self.at_s.append(time.monotonic())
            answers = self.answers[head.split()[1]]
            await (answers.pop(0) if len(answers) > 1 else answers[0])(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has heard enough
        finally:
            writer.close()


@asynccontextmanager
async def running(
    context: ssl.SSLContext | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Server]:
    server = Server(scheme="https" if context else "http")
    handlers: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(server.serve(reader, writer))
        handlers.add(task)
        task.add_done_callback(handlers.discard)

    listening = await asyncio.start_server(accept, host, port, ssl=context)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await listening.wait_closed()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running() as made:
        yield made


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., FetchSettings]:
    """Small limits, so that faults are met quickly."""

    def configure(**changes: Any) -> FetchSettings:
        defaults: dict[str, Any] = {
            "spool_dir": tmp_path / "spool",
            "allowed_networks": (LOOPBACK,),
            "stall_timeout_s": STALL_S,
            "connect_timeout_s": 2.0,
            "timeout_s": 10.0,
            "max_bytes": 2 * len(AUDIO),
            "attempts": 3,
            "backoff_initial_s": 0.01,
            "backoff_max_s": 0.05,
        }
        return FetchSettings(**{**defaults, **changes})

    return configure


@pytest.fixture
async def fetcher(configured: Callable[..., FetchSettings]) -> AsyncIterator[Fetcher]:
    async with Fetcher(configured()) as made:
        yield made


def spooled_files(settings: FetchSettings) -> list[Path]:
    return [path for path in settings.spool_dir.rglob("*/*") if path.is_file()]


def waiting_for_room(fetcher: Fetcher) -> int:
    """How many fetches wait until the spool has room for more of theirs."""
    return sum(share.waits for share in fetcher._spool.room._growing)


async def fetched(fetcher: Fetcher, uri: str, **options: Any) -> bytes:
    async with fetcher.fetch(uri, **options) as audio:
        data = audio.path.read_bytes()
        assert audio.sha256 == hashlib.sha256(data).hexdigest()
        assert audio.size_bytes == len(data)
        assert audio.path.stat().st_mode & 0o777 == 0o600
    assert not audio.path.exists()
    return data


async def failure(fetcher: Fetcher, uri: str, **options: Any) -> TimbreError:
    with pytest.raises(TimbreError) as raised:
        await fetched(fetcher, uri, **options)
    assert len(raised.value.message) < 500
    return raised.value


def raw(*pieces: bytes | float, reset: bool = False) -> Answer:
    """Send pieces as they are, numbers being pauses in seconds; end with FIN or with RST."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                writer.write(piece)
                await writer.drain()
        if reset:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    return answer


def head(line: str = "200 OK", /, **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {line}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(body: bytes = AUDIO, /, **headers: object) -> Answer:
    return raw(head(content_length=len(body), **headers) + body)


def endless(again: bytes, start: bytes = b"", /, **headers: object) -> Answer:
    """A body that begins with `start` and goes on with `again`, again and again."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(**headers) + start)
        while True:
            writer.write(again)
            await writer.drain()

    return answer


def status(line: str, /, **headers: object) -> Answer:
    return raw(head(line, content_length=0, **headers))


def redirect(to: str, line: str = "302 Found") -> Answer:
    return status(line, location=to)


class TestWhatArrives:
    async def test_a_file_with_its_length(self, server: Server, fetcher: Fetcher) -> None:
        assert await fetched(fetcher, server.answer("/a", whole())) == AUDIO

    @pytest.mark.parametrize("line", ["200 OK", "203 Transformed"])
    async def test_no_length(self, server: Server, fetcher: Fetcher, line: str) -> None:
        assert await fetched(fetcher, server.answer("/a", raw(head(line), AUDIO))) == AUDIO

    async def test_chunks(self, server: Server, fetcher: Fetcher) -> None:
        chunks = b"".join(b"400\r\n" + AUDIO[:1024] + b"\r\n" for _ in range(3)) + b"0\r\n\r\n"
        url = server.answer("/a", raw(head(transfer_encoding="chunked") + chunks))
        assert await fetched(fetcher, url) == AUDIO[:1024] * 3

    async def test_an_empty_body(self, server: Server, fetcher: Fetcher) -> None:
        assert await fetched(fetcher, server.answer("/a", whole(b""))) == b""

    @pytest.mark.parametrize(
        ("encoding", "body"),
        [
            ("gzip", gzip.compress(AUDIO)),
            ("X-GZip", gzip.compress(AUDIO)),
            ("deflate", zlib.compress(AUDIO)),
            ("identity", AUDIO),
            ("", AUDIO),
            ("gzip", gzip.compress(AUDIO[:1000]) + gzip.compress(AUDIO[1000:])),
            (
                "gzip",
                b"".join(gzip.compress(AUDIO[at : at + 99]) for at in range(0, len(AUDIO), 99)),
            ),
            ("gzip", gzip.compress(b"") * 1000 + gzip.compress(AUDIO) + gzip.compress(b"")),
        ],
    )
    async def test_a_body_compressed_though_nobody_asked(
        self, server: Server, fetcher: Fetcher, encoding: str, body: bytes
    ) -> None:
        url = server.answer("/a", whole(body, content_encoding=encoding))
        assert await fetched(fetcher, url) == AUDIO

    async def test_what_is_compressed_byte_by_byte_is_not_unpacked_so(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        """Each step is a hop into a thread: with one a byte, 350 KB a second filled a core."""
        body = b"".join(gzip.compress(AUDIO[at : at + 1]) for at in range(10_000))
        pieces: list[int] = []
        async with Fetcher(configured(), on_bytes=pieces.append) as fetcher:
            url = server.answer("/a", whole(body, content_encoding="gzip"))
            assert await fetched(fetcher, url) == AUDIO[:10_000]
        assert len(pieces) < 100

    async def test_a_few_interim_answers_are_passed_over(
        self, server: Server, fetcher: Fetcher
    ) -> None:
        early = head("103 Early Hints", link="</a>")
        url = server.answer("/a", raw(16 * early + head(content_length=len(AUDIO)) + AUDIO))
        assert await fetched(fetcher, url) == AUDIO

    async def test_interim_answers_without_end_are_not_waited_out(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        async def early(writer: asyncio.StreamWriter) -> None:
            while True:
                writer.write(head("103 Early Hints"))
                await writer.drain()
                await asyncio.sleep(0.001)

        url = server.answer("/a", early)
        async with Fetcher(configured(attempts=1, stall_timeout_s=5.0)) as fetcher:
            before_s = time.monotonic()
            assert isinstance(await failure(fetcher, url), FetchUnavailable)
        assert time.monotonic() - before_s < 2

    async def test_nothing_but_the_address_is_told(self, server: Server, fetcher: Fetcher) -> None:
        server.answer("/a", status("302 Found", location="/b", set_cookie="id=1; Path=/"))
        server.answer("/b", whole())
        for _ in range(2):  # of a name, since cookies of bare addresses are kept by nobody
            await fetched(fetcher, f"http://localhost:{server.port}/a")
        names = {line.partition(":")[0] for line in server.requests[-1].split("\r\n")[1:] if line}
        assert names == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}
        assert "Accept-Encoding: identity" in server.requests[-1]

    @pytest.mark.parametrize(
        ("written", "requested"),
        [
            (path, path)
            for path in (
                "/a.mp3?sig=x%2Fy%2Bz%3D%3D&X-Amz-Credential=AK%2F2026+b",
                "/%41%7Eb%2D.mp3",
                "/%c3%a4/%C3%a4?%c3%a4",
                "/a/../b/./c//d",
                "/a;b=c:d@e!$&'()*+,?e/f?g",
                "/%00%0d%0A?%00%0d%0A",
            )
        ]
        + [
            ("/ä b?ü c", "/%C3%A4%20b?%C3%BC%20c"),
            ("/100%?%4&%zz=%25", "/100%25?%254&%25zz=%25"),
            ('/"<[{|}]>\\^`?[x]', "/%22%3C%5B%7B%7C%7D%5D%3E%5C%5E%60?%5Bx%5D"),
            ("/a?b#c%2F?d", "/a?b"),
            ("", "/"),
            ("?a=%2F", "/?a=%2F"),
        ],
    )
    async def test_the_address_is_told_as_it_was_written(
        self, server: Server, fetcher: Fetcher, written: str, requested: str
    ) -> None:
        """A signature may be over these very letters."""
        server.answer(requested, whole())
        url = f"{server.scheme}://127.0.0.1:{server.port}{written}"
        assert await fetched(fetcher, url) == AUDIO
        assert await fetched(fetcher, server.answer("/redirect", redirect(url))) == AUDIO

    async def test_bytes_and_retries_are_told(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        sizes: list[int] = []
        codes: list[str] = []
        url = server.answer("/a", status("503 Busy"), whole())
        async with Fetcher(configured(), on_bytes=sizes.append, on_retry=codes.append) as fetcher:
            await fetched(fetcher, url)
        assert sum(sizes) == len(AUDIO)
        assert codes == ["fetch_unavailable"]

    async def test_many_at_once(self, server: Server, fetcher: Fetcher) -> None:
        urls = [server.answer(f"/{number}", whole()) for number in range(40)]
        assert await asyncio.gather(*(fetched(fetcher, url) for url in urls)) == [AUDIO] * 40

    async def test_the_checksum_in_either_case(self, server: Server, fetcher: Fetcher) -> None:
        url = server.answer("/a", whole())
        assert await fetched(fetcher, url, expected_sha256=SHA256.upper()) == AUDIO
        error = await failure(fetcher, url, expected_sha256="0" * 64)
        assert isinstance(error, ChecksumMismatch)
        assert len(server.requests) == 2


class TestWhatPasses:
    """Failures that are tried again, and pass."""

    @pytest.mark.parametrize(
        "first",
        [
            status("429 Slow Down"),
            status("500 Oops"),
            status("599 Down"),
            status("503 Busy", retry_after=0),
            status("408 Timeout"),
            status("425 Too Early"),
            raw(),
            raw(reset=True),
            raw(b"HTT"),
            raw(b"not http at all\r\n\r\n"),
            raw(head(content_length=len(AUDIO)), AUDIO[:1000]),
            raw(head(content_length=len(AUDIO)), AUDIO[:1000], reset=True),
            raw(head(), AUDIO[:1000], STALL_S / 3, reset=True),
            raw(head(transfer_encoding="chunked"), b"400\r\n" + AUDIO[:1024] + b"\r\n"),
            raw(head(transfer_encoding="chunked"), b"zzz\r\n"),
            raw(head(content_length="many"), AUDIO),
            raw(head(content_encoding="gzip"), gzip.compress(AUDIO)[:-9]),
            raw(head(content_encoding="gzip"), gzip.compress(AUDIO) + gzip.compress(AUDIO)[:9]),
            raw(2 * STALL_S),
            raw(b"HTTP/1.1 2", 2 * STALL_S),
            raw(head(content_length=10), 2 * STALL_S),
            raw(head(content_length=len(AUDIO)), AUDIO[:1], 2 * STALL_S),
            raw(head(content_length=len(AUDIO)), AUDIO[:-1], 2 * STALL_S),
        ],
    )
    async def test_second_attempt(self, server: Server, fetcher: Fetcher, first: Answer) -> None:
        assert await fetched(fetcher, server.answer("/a", first, whole())) == AUDIO
        assert len(server.requests) == 2

    @pytest.mark.parametrize(
        "answer",
        [
            status("503 Busy"),
            # no silence of LONG_SILENCE, though it takes longer in all
            raw(head(content_length=50), *5 * (STALL_S / 6, b"x"), reset=True),
        ],
    )
    async def test_attempts_are_limited(
        self, server: Server, fetcher: Fetcher, answer: Answer
    ) -> None:
        error = await failure(fetcher, server.answer("/a", answer))
        assert isinstance(error, FetchUnavailable)
        assert error.attempts == 3
        assert error.retryable
        assert len(server.requests) == 3

    async def test_nobody_listens(self, fetcher: Fetcher) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
            assert isinstance(await failure(fetcher, url), FetchUnavailable)

    async def test_the_waits_grow_up_to_a_limit_and_are_never_quite_the_same(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        waits_s: list[float] = []

        async def note(wait_s: float) -> None:
            waits_s.append(wait_s)

        settings = configured(attempts=6, backoff_initial_s=0.1, backoff_max_s=0.5)
        async with Fetcher(settings) as fetcher:
            await failure(fetcher, server.answer("/a", status("503 Busy")), sleep=note)
        least_s = [0.1, 0.2, 0.4, 0.5, 0.5]
        assert all(0 < b - a <= 0.1 for a, b in zip(least_s, waits_s, strict=True))


class TestStalls:
    """A server that stalls gets a second try and no third: each costs the time it takes to tell."""

    async def test_at_each_byte_end_in_time(self, server: Server, fetcher: Fetcher) -> None:
        full = head(content_length=50) + AUDIO[:50]
        urls = [server.answer(f"/{at}", raw(full[:at], 60.0)) for at in range(len(full))]
        started = time.monotonic()
        errors = await asyncio.gather(*(failure(fetcher, url) for url in urls))
        assert {(type(error), error.retryable) for error in errors} == {(FetchTimeout, True)}
        assert time.monotonic() - started < 2 * STALL_S + 2
        asked = Counter(request.split()[1] for request in server.requests)
        assert asked == {f"/{at}": 2 for at in range(len(full))}

    @pytest.mark.parametrize(
        ("first", "requests"),
        [
            (raw(0.6 * STALL_S), 4),  # closed without a byte: aiohttp itself asks once more
            (raw(0.6 * STALL_S, b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"), 2),
            (raw(head(content_length=50) + AUDIO[:20], 0.6 * STALL_S, reset=True), 2),
        ],
    )
    async def test_so_does_one_that_is_silent_for_long_and_then_fails(
        self, server: Server, fetcher: Fetcher, first: Answer, requests: int
    ) -> None:
        error = await failure(fetcher, server.answer("/a", first))
        assert isinstance(error, FetchTimeout)
        assert "silence" in error.message
        assert len(server.requests) == requests

    async def test_are_over_sooner_where_fewer_attempts_are_allowed(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        async with Fetcher(configured(attempts=1)) as fetcher:
            error = await failure(fetcher, server.answer("/a", raw(60.0)))
        assert isinstance(error, FetchTimeout)
        assert len(server.requests) == 1

    async def test_between_quick_failures_are_no_more(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        busy, stall = status("503 Busy"), raw(60.0)
        async with Fetcher(configured(attempts=5)) as fetcher:
            url = server.answer("/a", busy, busy, stall, whole())
            assert isinstance(await failure(fetcher, url), FetchTimeout)
            assert len(server.requests) == 3
            assert await fetched(fetcher, server.answer("/b", stall, busy, busy, whole())) == AUDIO


class TestRetryAfter:
    @pytest.mark.parametrize("line", ["429 Slow Down", "503 Busy"])
    async def test_seconds_are_honoured(self, server: Server, fetcher: Fetcher, line: str) -> None:
        await fetched(fetcher, server.answer("/a", status(line, retry_after=1), whole()))
        assert server.at_s[1] - server.at_s[0] >= 1

    async def test_a_date_is_honoured(self, server: Server, fetcher: Fetcher) -> None:
        began_s = time.monotonic()
        moment = datetime.now(UTC) + timedelta(seconds=2)  # told in whole seconds: in 1 s at least
        busy = status("503 Busy", retry_after=format_datetime(moment, usegmt=True))
        await fetched(fetcher, server.answer("/a", busy, whole()))
        assert server.at_s[1] - began_s >= 0.9

    @pytest.mark.parametrize(
        "value",
        ["soon", "-5", "1e9", "", "9" * 400, "Fri, 99 Foo", f"Fri, 01 Jan {'9' * 20} 00:00:00 GMT"],
    )
    async def test_nonsense_is_not(self, server: Server, fetcher: Fetcher, value: str) -> None:
        await fetched(fetcher, server.answer("/a", status("503 Busy", retry_after=value), whole()))
        assert server.at_s[1] - server.at_s[0] < 2

    async def test_seconds_of_an_answer_after_a_long_silence_are_honoured(
        self, server: Server, fetcher: Fetcher
    ) -> None:
        late = raw(0.6 * STALL_S, head("503 Busy", content_length=0, retry_after=1))
        await fetched(fetcher, server.answer("/a", late, late, whole()))
        waits = [b - a for a, b in zip(server.at_s, server.at_s[1:], strict=False)]
        assert len(waits) == 2, "not a stall, which is tried once more only"
        assert min(waits) >= 0.6 * STALL_S + 1

    async def test_a_wait_beyond_the_deadline_ends_the_fetch_at_once(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        url = server.answer("/a", status("503 Busy", retry_after=86400))
        started = time.monotonic()
        async with Fetcher(configured(max_wait_s=100_000)) as fetcher:
            error = await failure(fetcher, url)
        assert isinstance(error, FetchUnavailable)
        assert error.retry_after_s == 86400
        assert time.monotonic() - started < 1

    async def test_waits_that_add_up_to_too_much_end_the_fetch(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        url = server.answer("/a", status("503 Busy", retry_after=1))
        async with Fetcher(configured(max_wait_s=1.5)) as fetcher:
            error = await failure(fetcher, url)
        assert isinstance(error, FetchUnavailable)
        assert len(server.requests) == 2


class TestWhatDoesNotPass:
    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (status("404 Not Found"), AudioNotFound),
            (status("410 Gone"), AudioNotFound),
            (status("401 Unauthorized"), FetchForbidden),
            (status("403 Forbidden"), FetchForbidden),
            (status("400 Bad Request"), FetchForbidden),
            (status("451 Unavailable For Legal Reasons"), FetchForbidden),
            (status("204 No Content"), FetchFailed),
            (status("206 Partial Content"), FetchFailed),
            (status("304 Not Modified"), FetchFailed),
            (status("300 Multiple Choices"), FetchFailed),
            (whole(content_encoding="br"), FetchFailed),
            (whole(content_encoding="gzip, gzip"), FetchFailed),
            (whole(content_encoding="gzip"), FetchFailed),
            (whole(gzip.compress(AUDIO) + AUDIO, content_encoding="gzip"), FetchFailed),
            (whole(gzip.compress(AUDIO) + bytes(512), content_encoding="gzip"), FetchFailed),
            (raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: \xff\r\n\r\n"), FetchFailed),
            (raw(head(content_length=10**15), AUDIO), AudioTooLarge),
        ],
    )
    async def test_is_not_tried_again(
        self, server: Server, fetcher: Fetcher, answer: Answer, kind: type[TimbreError]
    ) -> None:
        error = await failure(fetcher, server.answer("/a", answer))
        assert type(error) is kind
        assert not error.retryable
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        "uri",
        [
            "",
            "track.mp3",
            "ftp://h/a",
            "javascript:alert(1)",
            "data:audio/mpeg;base64,AAAA",
            "http://",
            "http:///a",
            "http://[::1/",
            "http://h:99999/",
            "http://h:0/",
            "http://[h:x]/",
            "http://" + "a" * 300 + ".example/",
            "http://exa mple/",
            "http://a..b/",
            "http://\u2100.example/",
            "http://127.0.0.1/a\r\nHost: h",
            "http://127.0.0.1/\0",
            "http://127.0.0.1/a?\tb",
            "http://127.0.0.1/\x7f",
            "http://127.0.0.1/\x85",
        ],
    )
    async def test_what_is_no_address(self, fetcher: Fetcher, uri: str) -> None:
        assert isinstance(await failure(fetcher, uri), UriUnsupported)


class TestLimits:
    async def test_an_endless_body(self, server: Server, fetcher: Fetcher) -> None:
        url = server.answer("/a", endless(AUDIO))
        assert isinstance(await failure(fetcher, url), AudioTooLarge)
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        ("start", "again"),
        [
            (b"", gzip.compress(b"") * 100),  # empty members
            (b"\x1f\x8b\x08\x08" + bytes(6), b"name" * 1000),  # a header with a name
            (b"\x1f\x8b\x08" + bytes(7), b"\0\0\0\xff\xff" * 1000),  # empty blocks
        ],
    )
    async def test_an_endless_body_that_unpacks_to_nothing(
        self, server: Server, fetcher: Fetcher, start: bytes, again: bytes
    ) -> None:
        url = server.answer("/a", endless(again, start, content_encoding="gzip"))
        assert isinstance(await failure(fetcher, url), AudioTooLarge)
        assert len(server.requests) == 1

    async def test_a_gzip_bomb_costs_no_more_than_the_limit(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        bomb = gzip.compress(bytes(300_000_000))
        sizes: list[int] = []
        settings = configured(stall_timeout_s=5.0)
        async with Fetcher(settings, on_bytes=sizes.append) as fetcher:
            url = server.answer("/a", whole(bomb, content_encoding="gzip"))
            tracemalloc.start()
            try:
                assert isinstance(await failure(fetcher, url), AudioTooLarge)
                _, most_bytes = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert most_bytes < 10 * settings.max_bytes
        assert sum(sizes) <= settings.max_bytes
        assert max(sizes) <= 256 * 1024

    async def test_dripping_headers_end_at_the_deadline(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        drip = [piece for _ in range(500) for piece in (b"x: y\r\n", 0.05)]
        url = server.answer("/a", raw(b"HTTP/1.1 200 OK\r\n", *drip))
        async with Fetcher(configured(timeout_s=1.0)) as fetcher:
            assert isinstance(await failure(fetcher, url), FetchTimeout)

    async def test_dripping_headers_have_a_deadline_of_their_own(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        """The time to connect and to answer, redirects included, whatever else is allowed."""
        drip = [piece for _ in range(500) for piece in (b"x: y\r\n", 0.05)]
        server.answer("/b", raw(b"HTTP/1.1 200 OK\r\n", *drip))
        url = server.answer("/a", raw(0.2, head("302 Found", location="/b", content_length=0)))
        started = time.monotonic()
        async with Fetcher(configured(connect_timeout_s=0.5, attempts=1)) as fetcher:
            assert isinstance(await failure(fetcher, url), FetchTimeout)
        assert 0.5 + STALL_S <= time.monotonic() - started < 0.5 + STALL_S + 2

    async def test_endless_headers(self, server: Server, fetcher: Fetcher) -> None:
        url = server.answer("/a", raw(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 100_000))
        assert isinstance(await failure(fetcher, url), FetchUnavailable)

    async def test_nothing_stays_behind(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        settings = configured(timeout_s=1.0)
        half = raw(head(content_length=len(AUDIO)), AUDIO[: len(AUDIO) // 2], 60.0)
        slow, good = server.answer("/slow", half), server.answer("/good", whole())
        async with Fetcher(settings) as fetcher:
            hanging = asyncio.create_task(fetched(fetcher, slow))
            await asyncio.sleep(0.2)
            hanging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hanging
            with pytest.raises(ZeroDivisionError):
                async with fetcher.fetch(good):
                    raise ZeroDivisionError
            await failure(fetcher, slow)
            assert spooled_files(settings) == []
        assert list(settings.spool_dir.iterdir()) == []


def dripping(pieces: int) -> Answer:
    """So many pieces, 1000 bytes a second."""
    body = AUDIO[: pieces * 50]
    drips = (part for at in range(0, len(body), 50) for part in (0.05, body[at : at + 50]))
    return raw(head(content_length=len(body)), *drips)


class TestSlowSenders:
    """The window over which the rate is taken is STALL_S here."""

    @pytest.mark.parametrize("limit", [{}, {"min_bytes_per_s": 2000}])
    async def test_are_left_after_a_window_and_not_tried_again(
        self, server: Server, configured: Callable[..., FetchSettings], limit: dict[str, int]
    ) -> None:
        started = time.monotonic()
        async with Fetcher(configured(**limit)) as fetcher:
            error = await failure(fetcher, server.answer("/a", dripping(500)))
        assert isinstance(error, FetchTooSlow)
        assert "MIN_BYTES_PER_S" in error.message
        assert error.retryable, "an operator may have it tried again"
        assert STALL_S <= time.monotonic() - started < STALL_S + 2
        assert len(server.requests) == 1

    async def test_are_left_when_they_slow_down_later(
        self, server: Server, fetcher: Fetcher
    ) -> None:
        drips = [piece for _ in range(500) for piece in (0.05, b"x")]
        url = server.answer("/a", raw(head(content_length=len(AUDIO)), AUDIO[:-500], *drips))
        started = time.monotonic()
        assert isinstance(await failure(fetcher, url), FetchTooSlow)
        assert time.monotonic() - started < 2 * STALL_S + 2

    @pytest.mark.parametrize("begun", [b"0\r\nx: ", b"1;", b"1\r\na\r\n0"])
    async def test_are_left_where_what_they_send_is_no_audio(
        self, server: Server, fetcher: Fetcher, begun: bytes
    ) -> None:
        """A trailer, a chunk's extension, the digits of its size: aiohttp gives none of them on."""
        drips = [piece for _ in range(500) for piece in (0.05, b"0")]
        chunked = head(transfer_encoding="chunked") + b"1\r\na\r\n" + begun
        started = time.monotonic()
        assert isinstance(
            await failure(fetcher, server.answer("/a", raw(chunked, *drips))), FetchTimeout
        )
        assert time.monotonic() - started < 2 * STALL_S + 2
        assert len(server.requests) == 2

    async def test_may_be_as_slow_as_the_limit(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        url = server.answer("/a", dripping(20))
        async with Fetcher(configured(min_bytes_per_s=200, connect_timeout_s=0.5)) as fetcher:
            assert await fetched(fetcher, url) == AUDIO[:1000]

    async def test_meet_the_deadline_of_the_fetch_where_there_is_no_limit(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        url = server.answer("/a", dripping(500))
        started = time.monotonic()
        async with Fetcher(configured(min_bytes_per_s=0, timeout_s=1.0)) as fetcher:
            assert isinstance(await failure(fetcher, url), FetchTimeout)
        assert 1.0 <= time.monotonic() - started < 3

    async def test_a_slow_start_is_not_a_slow_sender(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        """The head comes late, then the first byte: no stall, though together as long as one."""
        body = raw(0.6, head(content_length=len(AUDIO)), 0.6, AUDIO)
        async with Fetcher(configured(attempts=1, stall_timeout_s=1.0)) as fetcher:
            assert await fetched(fetcher, server.answer("/a", body)) == AUDIO

    async def test_the_time_that_the_spool_takes_is_not_the_sender_s(
        self,
        server: Server,
        configured: Callable[..., FetchSettings],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write = SpoolFile.write

        async def slow(file: SpoolFile, data: bytes | memoryview) -> None:
            await asyncio.sleep(STALL_S)
            await write(file, data)

        monkeypatch.setattr(SpoolFile, "write", slow)
        url = server.answer("/a", raw(head(content_length=300), *3 * (AUDIO[:100], 0.01)))
        async with Fetcher(configured(attempts=1)) as fetcher:
            assert len(await fetched(fetcher, url)) == 300


def unannounced() -> Answer:
    """A body without its length, in pieces."""
    size = len(AUDIO) // 10 + 1
    pieces = (part for at in range(0, len(AUDIO), size) for part in (AUDIO[at : at + size], 0.01))
    return raw(head(), *pieces)


class TestASmallSpool:
    @pytest.mark.parametrize("announced", [whole, unannounced, None])
    async def test_many_at_once_all_arrive(
        self,
        server: Server,
        configured: Callable[..., FetchSettings],
        announced: Callable[[], Answer] | None,
    ) -> None:
        """There is room for three and a half, and forty ask; None: announced or not, by turns."""
        codes: list[str] = []
        kinds = [announced] if announced else [whole, unannounced]
        urls = [server.answer(f"/{n}", kinds[n % len(kinds)]()) for n in range(40)]
        settings = configured(spool_max_bytes=len(AUDIO) * 7 // 2, max_bytes=len(AUDIO) + 1)
        async with Fetcher(settings, on_retry=codes.append) as fetcher:
            assert await asyncio.gather(*(fetched(fetcher, url) for url in urls)) == [AUDIO] * 40
        assert codes == []

    async def test_is_waited_for_until_the_deadline_and_no_longer(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        url = server.answer("/a", whole())
        settings = configured(spool_max_bytes=len(AUDIO) * 3 // 2, timeout_s=3 * STALL_S)
        async with Fetcher(settings) as fetcher:
            async with fetcher.fetch(url):
                started = time.monotonic()
                error = await failure(fetcher, url)
                assert isinstance(error, SpoolFull)
                assert error.retryable
                assert 3 * STALL_S <= time.monotonic() - started < 3 * STALL_S + 2
                waiting = asyncio.create_task(fetched(fetcher, url))
                await asyncio.sleep(2 * STALL_S)
                assert not waiting.done()
            assert await waiting == AUDIO
        assert len(server.requests) == 3, "who waits for room keeps its connection"

    @pytest.mark.parametrize("answer", [whole, unannounced])
    async def test_what_never_fits_is_refused_at_once(
        self, server: Server, configured: Callable[..., FetchSettings], answer: Callable[[], Answer]
    ) -> None:
        url = server.answer("/a", answer())
        async with Fetcher(configured(spool_max_bytes=len(AUDIO) - 1)) as fetcher:
            error = await failure(fetcher, url)
        assert isinstance(error, AudioTooLarge)
        assert "SPOOL_MAX_BYTES" in error.message
        assert len(server.requests) == 1

    async def test_the_cancelled_give_up_their_place(
        self, server: Server, configured: Callable[..., FetchSettings]
    ) -> None:
        large, small = server.answer("/large", whole()), server.answer("/small", whole(b"small"))
        async with Fetcher(configured(spool_max_bytes=len(AUDIO) + 100)) as fetcher:
            async with fetcher.fetch(large):
                first = asyncio.create_task(fetched(fetcher, large))
                await until(lambda: waiting_for_room(fetcher) == 1)
                second = asyncio.create_task(fetched(fetcher, small))
                await until(lambda: waiting_for_room(fetcher) == 2)
                first.cancel()
                assert await second == b"small"
            assert await fetched(fetcher, large) == AUDIO


class TestRedirects:
    @pytest.mark.parametrize(
        "line", ["301 Moved", "302 Found", "303 See", "307 Temporary", "308 Permanent"]
    )
    async def test_are_followed(self, server: Server, fetcher: Fetcher, line: str) -> None:
        server.answer("/b", whole())
        assert await fetched(fetcher, server.answer("/a", redirect("/b", line))) == AUDIO

    @pytest.mark.parametrize(
        ("path", "location", "target"),
        [
            ("/my%20songs/a", "b", "/my%20songs/b"),
            ("/AC%2FDC%3F/a", "./b?%20", "/AC%2FDC%3F/b?%20"),
            ("/%00//x", "%00//x", "/%00//%00//x"),
            ("/%0D%0AHost:%20h/a", "b", "/%0D%0AHost:%20h/b"),
            ("/%7e/a", "../%41%2f/b?%c3%a4#c", "/%41%2f/b?%c3%a4"),
            ("/%7e/a?b", "?%2F", "/%7e/a?%2F"),
            ("/a", "%7e:b", "/%7e:b"),
        ],
    )
    async def test_are_relative_to_a_path_as_it_was_written(
        self, server: Server, fetcher: Fetcher, path: str, location: str, target: str
    ) -> None:
        server.answer(target, whole())
        assert await fetched(fetcher, server.answer(path, redirect(location))) == AUDIO

    async def test_a_loop_ends(self, server: Server, fetcher: Fetcher) -> None:
        error = await failure(fetcher, server.answer("/a", redirect("/a")))
        assert isinstance(error, RedirectLimit)
        assert len(server.requests) == 6

    @pytest.mark.parametrize(
        "answer",
        [
            status("302 Found"),
            redirect(""),
            redirect("http://[bad/"),
            redirect("http://[::1]x@"),
            redirect("/\tb"),
            raw(b"HTTP/1.1 302 Found\r\nLocation: http://h\xff/\r\nContent-Length: 0\r\n\r\n"),
        ],
    )
    async def test_without_a_usable_target(
        self, server: Server, fetcher: Fetcher, answer: Answer
    ) -> None:
        assert isinstance(await failure(fetcher, server.answer("/a", answer)), RedirectLimit)

    @pytest.mark.parametrize(
        "target",
        [
            "http://10.0.0.1/",
            "http://169.254.169.254/latest/meta-data/",
            "http://[::1]/",
            "http://[::ffff:10.0.0.1]/",
            "http://2130706433/",
            "//192.168.0.1/",
            "file:///etc/passwd",
            "s3://bucket/key",
            "ftp://example.com/",
            "http://user:secret@127.0.0.1/",
        ],
    )
    async def test_inward_are_refused(self, server: Server, fetcher: Fetcher, target: str) -> None:
        error = await failure(fetcher, server.answer("/a", redirect(target)))
        assert isinstance(error, AddressRefused)
        assert len(server.requests) == 1

    async def test_from_https_to_http_are_refused(
        self,
        server: Server,
        configured: Callable[..., FetchSettings],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        plain = server.answer("/plain", whole())
        async with running(context) as secure:
            url = secure.answer("/a", redirect(plain))
            good = secure.answer("/good", whole())
            async with Fetcher(configured()) as fetcher:
                error = await failure(fetcher, good)
                assert type(error) is FetchFailed  # nobody vouches for the certificate
                assert "certificate" in error.message
            trust = ssl.create_default_context()
            authority.configure_trust(trust)
            monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trust)
            async with Fetcher(configured()) as fetcher:
                assert await fetched(fetcher, good) == AUDIO
                assert isinstance(await failure(fetcher, url), AddressRefused)
        assert server.requests == []


class Changing(AbstractResolver):
    """A name server that answers each question differently."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


class TestAddresses:
    """Only loopback is at hand, so `allowed_networks` holds one address of it: 127.0.0.1."""

    @pytest.fixture
    async def public_only(self, configured: Callable[..., FetchSettings]) -> AsyncIterator[Fetcher]:
        async with Fetcher(configured(allowed_networks=())) as made:
            yield made

    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1",
            "127.0.0.2",
            "localhost",
            "LOCALHOST",
            "2130706433",
            "017700000001",
            "0x7f000001",
            "0x7f.0.0.1",
            "0177.0.0.1",
            "127.1",
            "0",
            "0.0.0.0",
            "[::]",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[fe80::1]",
            "[fe80::1%25lo]",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "169.254.169.254",
            "168.63.129.16",
            "[fd00:ec2::254]",
            "224.0.0.1",
            "255.255.255.255",
            "user:secret@127.0.0.1",
            "１２７.0.0.1",
            "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
            "127。0。0。1",
        ],
    )
    async def test_inward_ones_are_refused(
        self, server: Server, public_only: Fetcher, host: str
    ) -> None:
        server.answer("/a", whole())
        error = await failure(public_only, f"http://{host}:{server.port}/a")
        assert isinstance(error, AddressRefused)
        assert "secret" not in error.message
        assert server.requests == []

    async def test_refusals_are_not_tried_again(
        self, configured: Callable[..., FetchSettings]
    ) -> None:
        codes: list[str] = []
        async with Fetcher(configured(allowed_networks=()), on_retry=codes.append) as fetcher:
            await failure(fetcher, "http://127.0.0.1/")
        assert codes == []

    @pytest.fixture
    def only_one(self, configured: Callable[..., FetchSettings]) -> FetchSettings:
        return configured(allowed_networks=(ip_network("127.0.0.1/32"),))

    @pytest.fixture
    async def inner(self, server: Server) -> AsyncIterator[Server]:
        """What must not be reached: at the same port of 127.0.0.2, and with audio."""
        async with running(host="127.0.0.2", port=server.port) as made:
            for path in ("/a", "/b"):
                made.answer(path, whole())
            yield made

    async def test_a_name_that_resolves_inward(
        self, inner: Server, only_one: FetchSettings
    ) -> None:
        async with Fetcher(only_one, resolver=Changing(["127.0.0.2"])) as fetcher:
            error = await failure(fetcher, f"http://name.example:{inner.port}/a")
        assert isinstance(error, AddressRefused)
        assert "name.example" in error.message
        assert inner.requests == []

    async def test_of_a_mix_only_the_allowed_are_connected_to(
        self, server: Server, inner: Server, only_one: FetchSettings
    ) -> None:
        server.answer("/a", whole())
        resolver = Changing(["127.0.0.2", "10.0.0.1", "127.0.0.1"])
        async with Fetcher(only_one, resolver=resolver) as fetcher:
            assert await fetched(fetcher, f"http://name.example:{server.port}/a") == AUDIO
        assert inner.requests == []

    async def test_a_name_that_changes_its_mind_gains_nothing(
        self, server: Server, inner: Server, only_one: FetchSettings
    ) -> None:
        for path in ("/a", "/b"):
            server.answer(path, redirect(f"http://b.example:{server.port}/b"))
        resolver = Changing(["127.0.0.1"], ["127.0.0.2"])
        async with Fetcher(only_one, resolver=resolver) as fetcher:
            error = await failure(fetcher, f"http://a.example:{server.port}/a")
        assert isinstance(error, AddressRefused)
        assert len(server.requests) == 1
        assert inner.requests == []

    async def test_many_hosts_leave_no_connections_behind(
        self, configured: Callable[..., FetchSettings]
    ) -> None:
        connections = set[asyncio.StreamWriter]()

        async def keep_alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.add(writer)
            try:
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(head("404 Not Found", content_length=0))
            except (ConnectionError, asyncio.IncompleteReadError):
                connections.discard(writer)
            finally:
                writer.close()

        listening = await asyncio.start_server(keep_alive, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with Fetcher(configured(), resolver=Changing(["127.0.0.1"])) as fetcher:
            for number in range(50):
                await failure(fetcher, f"http://host{number}.example:{port}/")
            await until(lambda: not connections, timeout_s=5)
        listening.close()
        await listening.wait_closed()

    async def test_a_silent_name_server_holds_up_nobody_else(
        self, server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer_now = threading.Event()
        look_up = socket.getaddrinfo

        def silent(host: str, *rest: Any, **options: Any) -> Any:
            if host.endswith(".silent"):
                answer_now.wait(20)
                raise socket.gaierror(socket.EAI_AGAIN, "no answer")
            return look_up(host, *rest, **options)

        monkeypatch.setattr(socket, "getaddrinfo", silent)
        server.answer("/a", whole())
        waiting = [
            asyncio.create_task(failure(fetcher, f"http://{number}.silent/"))
            for number in range(120)
        ]
        await asyncio.sleep(0.1)
        started = time.monotonic()
        assert await fetched(fetcher, f"http://localhost:{server.port}/a") == AUDIO
        assert time.monotonic() - started < 5
        answer_now.set()
        ends = {type(error) for error in await asyncio.gather(*waiting)}
        assert ends <= {FetchUnavailable, FetchTimeout}, "by how long the silence was"

    async def test_proxies_of_the_environment_are_not_used(
        self, server: Server, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
        assert await fetched(fetcher, server.answer("/a", whole())) == AUDIO

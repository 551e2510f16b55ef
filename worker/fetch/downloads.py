"""Audio from `http` and `https` addresses."""

import asyncio
import re
import socket
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version
from typing import Self
from urllib.parse import quote

from aiohttp import (
    ClientConnectorCertificateError,
    ClientError,
    ClientPayloadError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    InvalidURL,
    StreamReader,
    TCPConnector,
)
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError, RawResponseMessage
from yarl import URL

from worker.errors import (
    AddressRefused,
    AudioNotFound,
    FetchFailed,
    FetchForbidden,
    FetchTimeout,
    FetchUnavailable,
    RedirectLimit,
    UriUnsupported,
)
from worker.fetch.addresses import AddressRules, PublicResolver, check_url, shown
from worker.fetch.pace import paced
from worker.fetch.spool import WRITE_BYTES, SpoolFile
from worker.settings import FetchSettings

COMPLETE = {200, 203}
REDIRECTS = {301, 302, 303, 307, 308}
NOT_FOUND = {404, 410}
MAX_INTERIM = 16  # answers (1xx) before the one that counts
MAX_HOST_CHARS = 255  # more than DNS has, and what encoding a name takes grows with its square
MAX_LOOKUPS = 256  # of names at once; most wait, should a name server not answer
PASSING = {408, 425, 429}  # among 4xx, of a store as well
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # yarl would drop some and escape the others
# What may not stand in a path or query by RFC 3986: a percent sign that begins no escape, and all
# characters but these.
UNFIT = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9._~:/?@!$&'()*+,;=%-]+")
UNPACK_BYTES = 16 * 1024  # at once: zlib copies what is left of them at the end of each member
HEADERS = {
    "Accept-Encoding": "identity",  # audio is compressed already
    "User-Agent": f"timbre/{version('timbre')}",
}


class SystemResolver(AbstractResolver):
    """The system's resolver, in threads of its own: a silent name server holds up nobody else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="resolver")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        look_up = partial(
            socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        answers = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, protocol, _, address in answers
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Response(ClientResponse):
    """A response that is looked for behind a few interim ones, and that a reset cuts off.

    aiohttp takes interim ones without end, and a body without a length for whole when it is reset.
    """

    async def start(self, connection: Connection) -> ClientResponse:
        protocol = connection.protocol
        assert protocol is not None, "the connection is open"
        read, lost, left = protocol.read, protocol.connection_lost, MAX_INTERIM
        body: StreamReader | None = None

        async def read_one_of_few() -> tuple[RawResponseMessage, StreamReader]:
            nonlocal left, body
            if left < 0:
                raise HttpProcessingError(message="too many interim answers")
            left -= 1
            message, body = await read()
            return message, body

        def lost_midway(exc: BaseException | None) -> None:
            if exc is not None and body is not None and not body.is_eof():
                body.set_exception(ClientPayloadError("the connection was lost"))
            lost(exc)

        protocol.read = read_one_of_few  # type: ignore[method-assign]
        protocol.connection_lost = lost_midway  # type: ignore[method-assign]
        return await super().start(connection)


class Downloads:
    """A client that tells servers nothing but the address, and follows redirects by its own rules.

    `resolver` turns names into addresses, by default the system's way; what it answers is checked
    like any address.
    """

    def __init__(self, settings: FetchSettings, resolver: AbstractResolver | None = None) -> None:
        self._settings = settings
        self._rules = AddressRules(settings.allowed_networks)
        self._resolver = PublicResolver(resolver or SystemResolver(), self._rules)
        self._session: ClientSession

    async def __aenter__(self) -> Self:
        self._session = ClientSession(
            connector=TCPConnector(
                limit=0,  # the worker bounds how many tracks are in flight
                force_close=True,  # or thousands of hosts leave as many connections behind
                resolver=self._resolver,
                socket_factory=self._rules.socket_for,
            ),
            timeout=ClientTimeout(
                total=None,
                connect=self._settings.connect_timeout_s,
                sock_read=self._settings.stall_timeout_s,
            ),
            headers=HEADERS,
            cookie_jar=DummyCookieJar(),
            response_class=_Response,
            auto_decompress=False,  # bounded below, piece by piece
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._resolver.close()  # aiohttp closes only one that it made

    async def copy(self, uri: str, file: SpoolFile) -> None:
        """Stream what lies at a URL into `file`.

        Raises
        ------
        FetchFailed
            A subclass of it; retryable where the same request may pass later.
        """
        try:
            await self._follow(_parsed(uri), file)
        except (InvalidURL, UnicodeError) as error:  # names that DNS has no form for
            raise UriUnsupported(f"{shown(uri)} is not a URL; write https://host/path.") from error
        except ClientConnectorCertificateError as error:
            raise FetchFailed(
                f"The certificate of {shown(uri)} can't be trusted; renew it, or add its authority "
                "to this machine."
            ) from error
        except TimeoutError as error:
            raise FetchTimeout(
                f"{shown(uri)} took longer than {self._settings.connect_timeout_s:g} s to connect, "
                f"or {self._settings.stall_timeout_s:g} s to answer or to go on; see how its "
                "server fares."
            ) from error
        except (ClientError, OSError) as error:
            raise FetchUnavailable(
                f"The connection to {shown(uri)} failed ({type(error).__name__}); "
                "see that the server is up and sends the whole body."
            ) from error

    async def _follow(self, url: URL, file: SpoolFile) -> None:
        patience_s = self._settings.answer_timeout_s
        async with asyncio.timeout(patience_s) as until_answered:  # however it drips its headers
            for _ in range(self._settings.max_redirects + 1):
                check_url(url)
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status not in REDIRECTS:
                        until_answered.reschedule(None)
                        _check_status(response)
                        body = paced(response.content.iter_any(), str(url), self._settings)
                        async with aclosing(body) as pieces:
                            await _receive(response, pieces, file)
                        return
                    url = _redirected(response)
        raise RedirectLimit(
            f"More than {self._settings.max_redirects} redirects; send the final address, or raise "
            "TIMBRE_FETCH__MAX_REDIRECTS."
        )


def _parsed(uri: str, base: URL | None = None) -> URL:
    """The URL that `uri` names, seen from `base` where it is a reference, without the fragment.

    Path and query stay as they were written, escapes and all, since a signature may be over just
    these letters; only what may not stand in a request is escaped.
    """
    try:
        written = URL(uri, encoded=True)
        if len(written.raw_host or "") > MAX_HOST_CHARS:
            raise UriUnsupported(f"{shown(uri)} has a host whose name is longer than names can be.")
        if CONTROL.search(uri):
            raise UriUnsupported(f"{shown(uri)} holds a control character, which no URL does.")
        encoded = URL(uri)
        if base is not None:
            written, encoded = _joined(base, written), _joined(base, encoded)
        url = URL.build(
            scheme=encoded.scheme,
            authority=encoded.raw_authority,
            path=_escaped(written.raw_path),
            query_string=_escaped(written.raw_query_string),
            encoded=True,
        )
        url.port  # noqa: B018  # yarl reads it only now
    except (ValueError, IndexError) as error:  # yarl trips over hosts such as "[::1]x@"
        raise UriUnsupported(f"{shown(uri)} is not a URL; write https://host/path.") from error
    return url


def _escaped(written: str) -> str:
    return UNFIT.sub(lambda unfit: quote(unfit[0]), written)


def _redirected(response: ClientResponse) -> URL:
    location = response.headers.get("Location")
    if not location:
        raise RedirectLimit(f"{shown(str(response.url))} redirects without saying where to.")
    try:
        target = _parsed(location, response.url)
    except UriUnsupported as error:
        raise RedirectLimit(f"{shown(str(response.url))} redirects to what is no URL.") from error
    if target.scheme not in {"http", "https"}:
        raise AddressRefused(f"A redirect leads to scheme {shown(target.scheme)!r}.")
    if response.url.scheme == "https" and target.scheme != "https":
        raise AddressRefused("A redirect leads from https to http, where anybody may listen.")
    return target


def _joined(base: URL, reference: URL) -> URL:
    """Where a reference leads from `base`."""
    if reference.raw_path:  # less its last part; yarl would decode what it cuts, and not encode it
        base = base.with_path(base.raw_path.rpartition("/")[0] + "/", encoded=True)
    return base.join(reference)


def _check_status(response: ClientResponse) -> None:
    status, where = response.status, shown(str(response.url))
    if status in COMPLETE:
        return
    if status in NOT_FOUND:
        raise AudioNotFound(f"There is nothing at {where} (HTTP {status}).")
    if status in PASSING or 500 <= status < 600:
        raise FetchUnavailable(
            f"{where} is not available at the moment (HTTP {status}).",
            retry_after_s=retry_after_s(response.headers.get("Retry-After", "")),
        )
    if 400 <= status < 500:
        raise FetchForbidden(
            f"{where} is refused to this worker (HTTP {status}); sign the URL, or make it public."
        )
    raise FetchFailed(f"{where} answers HTTP {status} where 200 and the audio were expected.")


async def _receive(response: ClientResponse, pieces: AsyncIterator[bytes], file: SpoolFile) -> None:
    if response.content_length is not None:
        file.check_size(response.content_length)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in {"identity", ""}:
        async for data in pieces:
            await file.write(data)
    elif encoding in {"gzip", "x-gzip", "deflate"}:
        await _receive_compressed(response, pieces, file)
    else:
        raise FetchFailed(
            f"{shown(str(response.url))} is compressed as {shown(encoding)!r}, which nobody asked "
            "for; serve the audio as it is."
        )


async def _receive_compressed(
    response: ClientResponse, pieces: AsyncIterator[bytes], file: SpoolFile
) -> None:
    """Unpack in pieces of bounded size, so that a bomb meets the limit on bytes and not memory."""
    unpacker, packed_bytes = _Unpacker(), 0
    try:
        async for data in pieces:
            packed_bytes += len(data)
            file.check_size(packed_bytes)  # much may be sent that nothing is unpacked from
            unpacker.packed = memoryview(data)
            while unpacker.packed:
                await file.write(await asyncio.to_thread(unpacker.read))
    except zlib.error as error:
        raise FetchFailed(
            f"{shown(str(response.url))} is not compressed as its Content-Encoding says."
        ) from error
    if not unpacker.eof:
        raise FetchUnavailable(f"The compressed body of {shown(str(response.url))} ends early.")


class _Unpacker:
    """Unpacks gzip or zlib, whichever it is; of a body in several members, all of them."""

    def __init__(self) -> None:
        self.packed = memoryview(b"")
        """What has come and is not unpacked yet."""
        self._member = _new_member()

    @property
    def eof(self) -> bool:
        return self._member.eof

    def read(self) -> bytes:
        """At most `WRITE_BYTES` of what is unpacked; nothing where it takes more to go on."""
        unpacked, left = [], WRITE_BYTES
        while self.packed and left:
            if self._member.eof:
                self._member = _new_member()
            part = self.packed[:UNPACK_BYTES]
            unpacked.append(self._member.decompress(part, left))
            left -= len(unpacked[-1])
            rest_bytes = len(self._member.unused_data) or len(self._member.unconsumed_tail)
            self.packed = self.packed[len(part) - rest_bytes :]
        return b"".join(unpacked)


def _new_member() -> "zlib._Decompress":
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # by its header


def retry_after_s(value: str) -> float | None:
    """Seconds to wait by a Retry-After header, in seconds or as a date; None where it has none."""
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())

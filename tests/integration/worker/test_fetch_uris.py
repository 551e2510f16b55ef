"""Whatever text an event names as its address, the fetcher answers with a typed error."""

import re
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.errors import FetchFailed, UriUnsupported
from worker.fetch.fetcher import Fetcher
from worker.settings import FetchSettings

NOWHERE = "http://127.0.0.1:9"
MARKS = [
    ":",
    "/",
    "//",
    "///",
    "@",
    "#",
    "?",
    "%",
    "..",
    ".",
    "[",
    "]",
    "\\",
    " ",
    "\t",
    "\n",
    "\0",
]
HOSTS = ["[::1]", "127.0.0.1", "0x7f", "localhost", "bucket", "user:pass@", ":80"]
PATHS = ["a.mp3", "%2e", "%00", "%ff", "?versionId=", "versionId=1", "http", "s3", "file"]
PIECES = st.sampled_from([*MARKS, *HOSTS, *PATHS])
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=10).map("".join)
URIS = st.tuples(
    st.sampled_from(["", "http://", "https://", "s3://", "gs://", "az://", "file://", "file:"]),
    TEXTS,
).map("".join)


class NoNames(AbstractResolver):
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        raise OSError("names are not resolved in this test")

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
async def fetcher(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fetcher]:
    folder: Path = tmp_path_factory.mktemp("uris")
    (folder / "music").mkdir()
    configured = FetchSettings(
        spool_dir=folder / "spool",
        file_roots=(folder / "music",),
        attempts=1,
        connect_timeout_s=0.2,
        s3_endpoint=NOWHERE,
        gs_endpoint=NOWHERE,
        az_endpoint=NOWHERE,
        az_account_name="account",
    )
    async with Fetcher(configured, resolver=NoNames()) as made:
        yield made


@settings(max_examples=1000, deadline=None)
@given(URIS)
@example("http://[\u00e4::1]/a.mp3")
@example("file:///" + "a/" * 4000)
@example("file:///" + "x" * 8000)
@example("s3://bucket/" + "x" * 8000)
@example("http://" + "x." * 4000)
@example("http://h/" + "%" * 8000)
@example("http://[" + "1:" * 4000)
@example("https://\ud800/")
@example("s3://bucket/\udcff")
@example("s3://bucket/a?versionId=\udcff")
@example("file:///\udcff")
@example("http://[::1]user:pass@")
async def test_any_text_ends_as_a_short_printable_reason_without_its_password(
    fetcher: Fetcher, uri: str
) -> None:
    with pytest.raises(FetchFailed) as raised:
        async with fetcher.fetch(uri):
            pass
    assert len(raised.value.message.encode()) < 600
    assert raised.value.message.isprintable()
    assert not re.search("(?<!/)//user:pass@", raised.value.message), "a path is no secret"


async def test_a_host_longer_than_names_can_be_takes_no_time(fetcher: Fetcher) -> None:
    before_s = time.process_time()
    for _ in range(10):
        with pytest.raises(UriUnsupported, match="longer than names can be"):
            async with fetcher.fetch("http://" + "\ufdfa" * 8000 + "/"):
                pass
    assert time.process_time() - before_s < 2.0, "0.7 s each where it is encoded first"

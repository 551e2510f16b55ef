"""The fetcher against object stores: moto's S3, and raw answers in the forms of all three."""

import asyncio
import hashlib
import json
import os
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
import trustme
from aiohttp import web
from moto.server import ThreadedMotoServer

from tests.web import answering
from worker.errors import (
    AudioNotFound,
    AudioTooLarge,
    FetchFailed,
    FetchForbidden,
    FetchTimeout,
    FetchTooSlow,
    FetchUnavailable,
    SettingsInvalid,
    TimbreError,
    UriUnsupported,
)
from worker.fetch.fetcher import Fetcher
from worker.fetch.object_stores import location
from worker.settings import FetchSettings

AUDIO = os.urandom(700_000)
STALL_S = 0.5
DRIPPED_BYTES = 2500  # at 1000 a second, longer than any wait here
KEYS = [
    "a.mp3", "deep/er/b.flac", "two words+ü%20#?.ogg", "a=b&c~(1)*'!.mp3",
    "a\u3000b.mp3", "a\u00a0b.mp3", "fam\u200dily.mp3", "a\u00adb.mp3",
]  # fmt: skip


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 API with a bucket of tracks; its endpoint."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = s3_client(endpoint)
    client.create_bucket(Bucket="music")
    for key in KEYS:
        client.put_object(Bucket="music", Key=key, Body=AUDIO, ACL="public-read")
    client.put_object(Bucket="music", Key="private.mp3", Body=AUDIO)
    yield endpoint
    server.stop()


def s3_client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., FetchSettings]:
    def configure(**changes: Any) -> FetchSettings:
        defaults: dict[str, Any] = {
            "spool_dir": tmp_path / "spool",
            "stall_timeout_s": STALL_S,
            "connect_timeout_s": 2.0,
            "timeout_s": 10.0,
            "attempts": 2,
            "backoff_initial_s": 0.01,
            "backoff_max_s": 0.05,
            "max_bytes": 10**6,
        }
        return FetchSettings(**{**defaults, **changes})

    return configure


def stores_at(endpoint: str) -> dict[str, str]:
    """Settings for stores of all kinds that are served at one address."""
    endpoints = {f"{scheme}_endpoint": endpoint for scheme in ("s3", "gs", "az")}
    return {**endpoints, "az_account_name": "account"}


async def failure(fetcher: Fetcher, uri: str) -> TimbreError:
    with pytest.raises(TimbreError) as raised:
        async with fetcher.fetch(uri):
            pass
    assert "secret" not in raised.value.message
    assert len(raised.value.message) < 500
    return raised.value


class TestS3:
    @pytest.fixture(params=["signed", "anonymous"])
    async def fetcher(
        self, s3: str, configured: Callable[..., FetchSettings], request: pytest.FixtureRequest
    ) -> AsyncIterator[Fetcher]:
        keys = {"s3_access_key_id": "key", "s3_secret_access_key": "secret"}
        settings = configured(s3_endpoint=s3, **(keys if request.param == "signed" else {}))
        async with Fetcher(settings) as made:
            yield made

    @pytest.mark.parametrize("key", KEYS)
    async def test_objects_arrive_whatever_their_keys(self, fetcher: Fetcher, key: str) -> None:
        async with fetcher.fetch(f"s3://music/{quote(key)}") as audio:
            assert audio.path.read_bytes() == AUDIO
            assert audio.sha256 == hashlib.sha256(AUDIO).hexdigest()
        assert not audio.path.exists()

    @pytest.mark.parametrize("uri", ["s3://music/none.mp3", "s3://no-bucket/a.mp3"])
    async def test_what_is_not_there(self, fetcher: Fetcher, uri: str) -> None:
        assert isinstance(await failure(fetcher, uri), AudioNotFound)

    async def test_the_version_that_the_event_names(self, s3: str, fetcher: Fetcher) -> None:
        client = s3_client(s3)
        client.create_bucket(Bucket="versions")
        enabled = {"Status": "Enabled"}
        client.put_bucket_versioning(Bucket="versions", VersioningConfiguration=enabled)
        track = {"Bucket": "versions", "Key": "a.mp3", "ACL": "public-read"}
        old = client.put_object(**track, Body=b"old")["VersionId"]
        client.put_object(**track, Body=b"new")
        async with fetcher.fetch(f"s3://versions/a.mp3?versionId={old}") as audio:
            assert audio.path.read_bytes() == b"old"
        async with fetcher.fetch("s3://versions/a.mp3") as audio:
            assert audio.path.read_bytes() == b"new"

    async def test_private_objects_need_keys(
        self, s3: str, configured: Callable[..., FetchSettings]
    ) -> None:
        async with Fetcher(configured(s3_endpoint=s3)) as anonymous:
            assert isinstance(await failure(anonymous, "s3://music/private.mp3"), FetchForbidden)

    async def test_too_large_ones_are_refused_by_their_size(
        self, s3: str, configured: Callable[..., FetchSettings]
    ) -> None:
        sizes: list[int] = []
        settings = configured(s3_endpoint=s3, max_bytes=len(AUDIO) - 1)
        async with Fetcher(settings, on_bytes=sizes.append) as fetcher:
            assert isinstance(await failure(fetcher, "s3://music/a.mp3"), AudioTooLarge)
        assert sizes == []


@pytest.fixture
async def endpoint() -> AsyncIterator[str]:
    """A server of any bucket: `a.mp3` is there, a number is a status, the rest is a fault."""

    async def answer(request: web.Request) -> web.StreamResponse:
        name = request.path.rpartition("/")[2]
        if name.isdigit():
            return web.Response(status=int(name))
        headers = {"ETag": '"x"', "Last-Modified": "Sat, 31 Jan 2026 12:00:00 GMT"}
        if name == "a.mp3":
            return web.Response(body=AUDIO, headers=headers)
        response = web.StreamResponse(headers={**headers, "Content-Length": str(len(AUDIO))})
        await response.prepare(request)
        await response.write(AUDIO[:1000])
        if name == "stalled":
            await asyncio.sleep(30)
        assert request.transport is not None
        request.transport.abort()
        return response

    async with answering(answer) as address:
        yield address


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
class TestAnyStore:
    @pytest.fixture
    async def fetcher(
        self, endpoint: str, configured: Callable[..., FetchSettings]
    ) -> AsyncIterator[Fetcher]:
        async with Fetcher(configured(**stores_at(endpoint))) as made:
            yield made

    async def test_objects_arrive(self, fetcher: Fetcher, scheme: str) -> None:
        async with fetcher.fetch(f"{scheme}://music/a.mp3") as audio:
            assert audio.path.read_bytes() == AUDIO

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("404", AudioNotFound),
            ("401", FetchForbidden),
            ("403", FetchForbidden),
            ("400", FetchForbidden),
            ("301", FetchFailed),
            ("429", FetchUnavailable),
            ("500", FetchUnavailable),
            ("503", FetchUnavailable),
            ("reset", FetchUnavailable),
            ("stalled", FetchTimeout),
        ],
    )
    async def test_failures_are_typed(
        self, fetcher: Fetcher, scheme: str, name: str, kind: type[TimbreError]
    ) -> None:
        assert type(await failure(fetcher, f"{scheme}://music/{name}")) is kind

    async def test_nobody_listens(
        self, configured: Callable[..., FetchSettings], scheme: str
    ) -> None:
        endpoint = {f"{scheme}_endpoint": "http://127.0.0.1:9", "az_account_name": "account"}
        async with Fetcher(configured(**endpoint)) as fetcher:
            error = await failure(fetcher, f"{scheme}://music/a.mp3")
        assert isinstance(error, FetchUnavailable)

    @pytest.mark.parametrize(
        "rest",
        [
            "",
            "music",
            "music/",
            "/a.mp3",
            "MUSIC/a.mp3",
            "mu..sic/a.mp3",
            "-music/a.mp3",
            "user:secret@music/a.mp3",
            "music:80/a.mp3",
            "127.0.0.1:9000@x/a.mp3",
            "m/a.mp3",
            "music/../other/a.mp3",
            "music/./a.mp3",
            "music//a.mp3",
            "music/a/",
            "music/%2e%2e/a.mp3",
            "music/a%00b",
            "music/a%0d%0ab",
            "music/%ff",
            "music/" + "x" * 1025,
        ],
    )
    async def test_what_names_no_object(self, fetcher: Fetcher, scheme: str, rest: str) -> None:
        assert isinstance(await failure(fetcher, f"{scheme}://{rest}"), UriUnsupported)


class Dripping:
    """A store of any object, which comes at 1000 bytes a second; a number for a key is a status."""

    def __init__(self) -> None:
        self.requests = 0
        self.endpoint = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        name = request.path.rpartition("/")[2]
        headers = {"ETag": '"x"', "Last-Modified": "Sat, 31 Jan 2026 12:00:00 GMT"}
        response = web.StreamResponse(status=int(name) if name.isdigit() else 200, headers=headers)
        response.content_length = DRIPPED_BYTES
        await response.prepare(request)
        for at in range(0, DRIPPED_BYTES, 50):
            await asyncio.sleep(0.05)
            await response.write(AUDIO[at : at + 50])
        return response


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
class TestSlowStores:
    @pytest.fixture
    async def store(self) -> AsyncIterator[Dripping]:
        store = Dripping()
        async with answering(store.answer) as store.endpoint:
            yield store

    async def test_are_left_after_a_window_and_not_tried_again(
        self, store: Dripping, configured: Callable[..., FetchSettings], scheme: str
    ) -> None:
        started = time.monotonic()
        async with Fetcher(configured(**stores_at(store.endpoint))) as fetcher:
            error = await failure(fetcher, f"{scheme}://music/a.mp3")
        assert isinstance(error, FetchTooSlow)
        assert "MIN_BYTES_PER_S" in error.message
        assert STALL_S <= time.monotonic() - started < STALL_S + 1.5
        assert store.requests == 1

    async def test_may_be_as_slow_as_the_limit(
        self, store: Dripping, configured: Callable[..., FetchSettings], scheme: str
    ) -> None:
        settings = configured(**stores_at(store.endpoint), min_bytes_per_s=200)
        async with Fetcher(settings) as fetcher, fetcher.fetch(f"{scheme}://music/a.mp3") as audio:
            assert audio.path.read_bytes() == AUDIO[:DRIPPED_BYTES]

    async def test_have_the_time_of_an_answer_for_an_error(
        self, store: Dripping, configured: Callable[..., FetchSettings], scheme: str
    ) -> None:
        started = time.monotonic()
        settings = configured(**stores_at(store.endpoint), connect_timeout_s=0.3)
        async with Fetcher(settings) as fetcher:
            assert isinstance(await failure(fetcher, f"{scheme}://music/400"), FetchTimeout)
        assert time.monotonic() - started < 2 * (0.3 + STALL_S) + 1.5
        assert store.requests == 2


async def test_azure_needs_an_account(configured: Callable[..., FetchSettings]) -> None:
    async with Fetcher(configured()) as fetcher:
        error = await failure(fetcher, "az://music/a.mp3")
    assert isinstance(error, UriUnsupported)
    assert "AZ_ACCOUNT_NAME" in error.message


@pytest.fixture(scope="module")
def service_account() -> dict[str, Any]:
    """A service account's key with the fields that are read of it."""
    pem = trustme.CA(key_type=trustme.KeyType.RSA).private_key_pem.bytes().decode()
    return {"client_email": "timbre@example.com", "private_key_id": "1", "private_key": pem}


def assert_refused(settings: FetchSettings, name: str) -> None:
    """Before any fetch, naming the setting and showing nothing of the key."""
    with pytest.raises(SettingsInvalid, match=f"TIMBRE_FETCH__{name}") as raised:
        Fetcher(settings)
    assert "secret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("key", ["", "secret", "{}", '["secret"]', '{"private_key": "secret"}'])
def test_a_google_key_that_is_no_service_account_s_is_refused(
    configured: Callable[..., FetchSettings], key: str
) -> None:
    assert_refused(configured(gs_service_account_key=key), "GS_SERVICE_ACCOUNT_KEY")


@pytest.mark.parametrize(
    "damage", [str.upper, lambda pem: pem.replace("\n", " "), lambda _: "secret"]
)
def test_a_google_key_that_is_damaged_is_refused(
    configured: Callable[..., FetchSettings],
    service_account: dict[str, Any],
    damage: Callable[[str], str],
) -> None:
    damaged = {**service_account, "private_key": damage(service_account["private_key"])}
    settings = configured(gs_service_account_key=json.dumps(damaged))
    assert_refused(settings, "GS_SERVICE_ACCOUNT_KEY")


@pytest.mark.parametrize("key", ["secre", "secret!!", "c2VjcmV0\n"])
def test_an_azure_key_that_is_not_base64_is_refused(
    configured: Callable[..., FetchSettings], key: str
) -> None:
    assert_refused(configured(az_account_key=key, az_account_name="account"), "AZ_ACCOUNT_KEY")


def test_an_azure_key_needs_an_account(configured: Callable[..., FetchSettings]) -> None:
    assert_refused(configured(az_account_key="c2VjcmV0"), "AZ_ACCOUNT_NAME")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT", "http://127.0.0.1:9"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9"),
        ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true"),  # a path without the bucket
        ("AWS_S3_EXPRESS", "true"),
        ("AWS_SKIP_SIGNATURE", "true"),
        ("AWS_SESSION_TOKEN", "token"),  # of other keys
        ("GOOGLE_BASE_URL", "http://127.0.0.1:9"),
        ("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9"),
        ("AZURE_STORAGE_USE_EMULATOR", "true"),
        ("AZURE_SKIP_SIGNATURE", "true"),
    ],
)
async def test_the_environment_changes_no_request(
    configured: Callable[..., FetchSettings],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
) -> None:
    asked: list[tuple[str, bool, bool]] = []

    async def answer(request: web.Request) -> web.Response:
        headers = request.headers
        asked.append((request.path, "Authorization" in headers, "X-Amz-Security-Token" in headers))
        stated = {"ETag": '"x"', "Last-Modified": "Sat, 31 Jan 2026 12:00:00 GMT"}
        return web.Response(body=AUDIO, headers=stated)

    monkeypatch.setenv(variable, value)
    keys = {
        "s3_access_key_id": "key",
        "s3_secret_access_key": "secret",
        "az_account_key": "c2VjcmV0",
    }
    async with (
        answering(answer) as address,
        Fetcher(configured(**stores_at(address), **keys)) as fetcher,
    ):
        for scheme in ("s3", "gs", "az"):
            async with fetcher.fetch(f"{scheme}://music/a.mp3") as audio:
                assert audio.size_bytes == len(AUDIO)
    path = "/music/a.mp3"
    assert asked == [(path, True, False), (path, False, False), (path, True, False)]


async def test_keys_of_the_form_that_their_stores_have_are_taken(
    endpoint: str, configured: Callable[..., FetchSettings], service_account: dict[str, Any]
) -> None:
    keys = {
        "gs_service_account_key": json.dumps(service_account),
        "az_account_key": "c2VjcmV0",
    }
    async with (
        Fetcher(configured(**stores_at(endpoint), **keys)) as fetcher,
        fetcher.fetch("az://music/a.mp3") as audio,
    ):
        assert audio.path.read_bytes() == AUDIO


async def test_broken_credentials_of_the_machine_are_named_and_not_tried_again(
    configured: Callable[..., FetchSettings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    codes: list[str] = []
    async with Fetcher(configured(ambient_credentials=True), on_retry=codes.append) as fetcher:
        error = await failure(fetcher, "gs://music/a.mp3")
    assert type(error) is FetchFailed
    assert "TIMBRE_FETCH__GS_" in error.message
    assert codes == []


@pytest.mark.parametrize("uri", ["s3://bk/key", "gs://MUSIC/key", "az://my_music/key"])
def test_a_name_that_no_bucket_can_have_is_said_to_be_one(uri: str) -> None:
    with pytest.raises(UriUnsupported, match="has a name that none can have"):
        location(uri)

"""Audio from object stores: S3 and what speaks like it, Google Cloud Storage, Azure Blob."""

import asyncio
import re
from collections.abc import Callable
from contextlib import aclosing
from datetime import timedelta
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store
from pydantic import SecretStr

from worker.errors import (
    AudioNotFound,
    FetchFailed,
    FetchForbidden,
    FetchTimeout,
    FetchUnavailable,
    SettingsInvalid,
    UriUnsupported,
)
from worker.fetch.addresses import shown
from worker.fetch.downloads import PASSING
from worker.fetch.pace import paced
from worker.fetch.spool import SpoolFile
from worker.settings import FetchSettings

if TYPE_CHECKING:
    from obstore.store import (
        AzureConfig,
        ClientConfig,
        GCSConfig,
        RetryConfig,
        S3Config,
        S3Credential,
    )

Store = S3Store | GCSStore | AzureStore

URI = re.compile(r"(s3|gs|az)://([^/]+)/(.+?)(?:\?versionId=([^&?#]+))?", re.DOTALL | re.IGNORECASE)
BUCKET = {
    "s3": re.compile(r"[a-z0-9](?!.*\.\.)[a-z0-9.-]{1,61}[a-z0-9]"),
    "gs": re.compile(r"[a-z0-9](?!.*\.\.)[a-z0-9._-]{1,220}[a-z0-9]"),
    "az": re.compile(r"\$root|\$web|(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]"),
}
UNREADABLE = {
    "gs": "TIMBRE_FETCH__GS_SERVICE_ACCOUNT_KEY can't be read; give it the JSON that Google made "
    "for the service account, whole and unchanged.",
    "az": "TIMBRE_FETCH__AZ_ACCOUNT_KEY can't be read; give it a key of the account, in base64 as "
    "Azure shows it, and name the account in TIMBRE_FETCH__AZ_ACCOUNT_NAME.",
}
MAX_KEY_BYTES = 1024
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_STORES = 64  # events name buckets; clients for them are kept, but not without end
STATUS = re.compile(r"status code: (\d{3})")
TIMED_OUT = "kind: Timeout"
NO_RETRIES: "RetryConfig" = {"max_retries": 0}


class Location(NamedTuple):
    """An object, by its store's own names."""

    scheme: str
    bucket: str
    key: str
    version: str | None


class ObjectStores:
    """Clients by bucket. Credentials are those of the settings, or the machine's own where allowed;
    without any, requests are unsigned.

    Retries are left to the fetch that all addresses have in common.

    Raises
    ------
    SettingsInvalid
        A key is not of the form that its store has.
    """

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._store: Callable[[str, str], Store] = lru_cache(MAX_STORES)(self._connect)
        self._check_keys()

    async def copy(self, uri: str, file: SpoolFile) -> None:
        """Stream an object into `file`.

        Raises
        ------
        FetchFailed
            A subclass of it; retryable where the same request may pass later.
        """
        where = location(uri)
        try:
            store = self._store(where.scheme, where.bucket)
            async with asyncio.timeout(self._settings.answer_timeout_s):
                # Errors are answered with a body, which may drip like any other.
                found = await obstore.get_async(
                    store, where.key, options={"version": where.version} if where.version else None
                )
            file.expect(found.meta["size"])
            as_they_come = found.stream(min_chunk_size=1)  # or a drip would go unnoticed
            async with aclosing(paced(as_they_come, uri, self._settings)) as pieces:
                async for data in pieces:
                    await file.write(memoryview(data))
        except (BaseError, OSError, ValueError) as error:
            raise _typed(error, uri) from error

    def _check_keys(self) -> None:
        """Have the clients read the keys at the start, and not with the first track."""
        given = {"gs": self._settings.gs_service_account_key, "az": self._settings.az_account_key}
        for scheme, key in given.items():
            if key is not None:
                try:
                    self._connect(scheme, "any-bucket")
                except FetchFailed:
                    raise SettingsInvalid(UNREADABLE[scheme]) from None

    def _connect(self, scheme: str, bucket: str) -> Store:
        makers: dict[str, Callable[[str], Store]] = {"s3": self._s3, "gs": self._gs, "az": self._az}
        try:
            return makers[scheme](bucket)
        except BaseError:  # no request was made yet
            raise FetchFailed(
                f"No client for {scheme} addresses can be made; see "
                f"TIMBRE_FETCH__{scheme.upper()}_*, and the credentials of this machine itself."
            ) from None  # the cause may tell of a key

    def _s3(self, bucket: str) -> S3Store:
        region = self._settings.s3_region or "us-east-1"
        endpoint = self._settings.s3_endpoint or f"https://s3.{region}.amazonaws.com"
        config: S3Config = {
            "region": region,
            "aws_endpoint_url_s3": endpoint,  # goes before `endpoint`
            "virtual_hosted_style_request": False,
            "s3_express": False,
        }
        key, secret = self._settings.s3_access_key_id, self._settings.s3_secret_access_key
        given = None
        if key is not None and secret is not None:
            config["skip_signature"] = False
            # Not in `config`, where a session token of the environment would go with them.
            given = partial(_s3_credential, key, secret)
        elif not self._settings.ambient_credentials:
            config["skip_signature"] = True
        return S3Store(
            bucket,
            config=config,
            client_options=self._client(endpoint),
            retry_config=NO_RETRIES,
            credential_provider=given,
        )

    def _gs(self, bucket: str) -> GCSStore:
        endpoint = self._settings.gs_endpoint or "https://storage.googleapis.com"
        config: GCSConfig = {"base_url": endpoint}
        if (key := self._settings.gs_service_account_key) is not None:
            config["service_account_key"] = key.get_secret_value()
            config["skip_signature"] = False
        elif not self._settings.ambient_credentials:
            config["skip_signature"] = True
        client = self._client(endpoint)
        return GCSStore(bucket, config=config, client_options=client, retry_config=NO_RETRIES)

    def _az(self, container: str) -> AzureStore:
        account = self._settings.az_account_name
        if account is None:
            raise UriUnsupported(
                "az addresses need an account; name it in TIMBRE_FETCH__AZ_ACCOUNT_NAME."
            )
        endpoint = self._settings.az_endpoint or f"https://{account}.blob.core.windows.net"
        config: AzureConfig = {
            "account_name": account,
            "endpoint": endpoint,
            "use_emulator": False,
        }
        if (key := self._settings.az_account_key) is not None:
            config["account_key"] = key.get_secret_value()
            config["skip_signature"] = False
        elif not self._settings.ambient_credentials:
            config["skip_signature"] = True
        client = self._client(endpoint)
        return AzureStore(container, config=config, client_options=client, retry_config=NO_RETRIES)

    def _client(self, endpoint: str) -> "ClientConfig":
        """How to speak to an endpoint; like the stores' own options named explicitly, so that no
        environment variable wins."""
        return {
            "connect_timeout": timedelta(seconds=self._settings.connect_timeout_s),
            "read_timeout": timedelta(seconds=self._settings.stall_timeout_s),
            "timeout": timedelta(seconds=self._settings.timeout_s),
            "allow_http": endpoint.startswith("http://"),
        }


def _s3_credential(key: SecretStr, secret: SecretStr) -> "S3Credential":
    return {
        "access_key_id": key.get_secret_value(),
        "secret_access_key": secret.get_secret_value(),
        "expires_at": None,
    }


def location(uri: str) -> Location:
    """Read an object's URI: `scheme://bucket/key`, the key percent-encoded where it must be.

    Raises
    ------
    UriUnsupported
    """
    match = URI.fullmatch(uri)
    if match is None:
        raise UriUnsupported(
            f"{shown(uri)} names no object; write s3://bucket/key, gs://bucket/key or "
            "az://container/key."
        )
    scheme, bucket = match[1].lower(), match[2]
    if not BUCKET[scheme].fullmatch(bucket):
        raise UriUnsupported(
            f"The bucket or container of {shown(uri)} has a name that none can have in {scheme} "
            "stores; see that the event spells it as the store does."
        )
    try:
        key = unquote(match[3], errors="strict")
        version = unquote(match[4], errors="strict") if match[4] else None
        key_bytes = len(key.encode())
    except UnicodeError:
        raise UriUnsupported(f"The key of {shown(uri)} is not UTF-8.") from None
    if key_bytes > MAX_KEY_BYTES or not all(
        segment not in {"", ".", ".."} and not CONTROL.search(segment) for segment in key.split("/")
    ):
        raise UriUnsupported(
            f"The key of {shown(uri)} has an empty or dotted part, a control character, or "
            f"more than {MAX_KEY_BYTES} bytes; copy the object to a plainer key."
        )
    return Location(scheme, bucket, key, version)


def _typed(error: Exception, uri: str) -> FetchFailed:
    """The failure that obstore means."""
    where = shown(uri)
    if isinstance(error, FileNotFoundError):
        return AudioNotFound(f"There is no object at {where}.")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return FetchForbidden(
            f"The store refuses {where} to this worker; see its keys in TIMBRE_FETCH__*, "
            "or the bucket's policy."
        )
    if isinstance(error, ValueError):
        return UriUnsupported(f"The store has no client for {where}.")
    if isinstance(error, TimeoutError) or TIMED_OUT in str(error):
        return FetchTimeout(f"The store sent nothing of {where} for too long.")
    return _typed_by_text(str(error), where)


def _typed_by_text(text: str, where: str) -> FetchFailed:
    """For most failures obstore has one type, and tells the cause in its text only."""
    if "without LOCATION" in text:
        return FetchFailed(f"{where} lies in another region; set TIMBRE_FETCH__S3_REGION.")
    status = STATUS.search(text)
    if status and status[1][0] == "4" and int(status[1]) not in PASSING:
        return FetchForbidden(f"The store refuses to read {where} (HTTP {status[1]}).")
    answer = f"HTTP {status[1]}" if status else "the connection failed"
    return FetchUnavailable(f"The store of {where} is not available at the moment ({answer}).")

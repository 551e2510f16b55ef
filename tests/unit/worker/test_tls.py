from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import SecretStr

from worker import cache
from worker.errors import SettingsInvalid
from worker.kafka import connection
from worker.settings import KafkaSettings, RedisSettings


def kafka(**files: Path) -> None:
    connection.client_options(KafkaSettings(security_protocol="SSL", **files))


def redis(**files: Path) -> None:
    cache.connect(RedisSettings(url=SecretStr("rediss://redis/0"), **files))


services = pytest.mark.parametrize("service", [kafka, redis])


@services
def test_an_encrypted_client_key_is_refused_and_nobody_asked_for_its_password(
    service: Callable[..., None], tmp_path: Path
) -> None:
    certificate = trustme.CA().issue_cert("worker")
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "worker.pem"))
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    (tmp_path / "worker.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )

    name = rf"encrypted.*TIMBRE_{service.__name__.upper()}__SSL_KEY_FILE"
    with pytest.raises(SettingsInvalid, match=name):
        service(ssl_cert_file=tmp_path / "worker.pem", ssl_key_file=tmp_path / "worker.key")


@services
@pytest.mark.parametrize("setting", ["ssl_ca_file", "ssl_cert_file"])
def test_a_file_without_certificates_is_told_at_the_start(
    service: Callable[..., None], setting: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.pem"
    file.write_text("no certificate")

    name = f"TIMBRE_{service.__name__}__{setting}".upper()
    with pytest.raises(SettingsInvalid, match=name):
        service(**{setting: file})

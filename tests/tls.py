"""Servers that can be trusted, for tests of TLS."""

import ssl
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import SecretStr

from tests.proxy import proxy
from worker.services.kafka import Kafka
from worker.services.redis import Redis
from worker.settings import KafkaSettings


@dataclass(frozen=True, slots=True)
class Security:
    """A user's name and password, and what makes a server speak TLS.

    `certificate_file` holds an unencrypted PKCS #8 key followed by its certificate chain, as PEM.
    """

    username: str
    password: str
    certificate_file: Path
    ca_file: Path


def issue_security(folder: Path, user: str, password: str) -> Security:
    """In `folder` a certificate for 127.0.0.1 and the authority it is of; and who may enter."""
    folder.mkdir(exist_ok=True)
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    (folder / "server.pem").write_bytes(pkcs8 + chain)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return Security(user, password, folder / "server.pem", folder / "ca.pem")


class GuardedKafka(Kafka):
    """A Kafka that speaks TLS only, to clients that know a password by SCRAM-SHA-512 or PLAIN.

    They may do everything, but for what is forbidden by an ACL.
    """

    def __init__(self, folder: Path, jars: list[Path], security: Security) -> None:
        super().__init__(folder, jars)
        self._security = security

    def client_settings(self) -> KafkaSettings:
        """Settings by which Timbre's clients reach this broker."""
        return KafkaSettings(
            bootstrap_servers=self.address,
            security_protocol="SASL_SSL",
            sasl_username=self._security.username,
            sasl_password=SecretStr(self._security.password),
            ssl_ca_file=self._security.ca_file,
        )

    def _format_options(self) -> list[str]:
        user = f"name={self._security.username},password={self._security.password}"
        return [*super()._format_options(), "--add-scram", f"SCRAM-SHA-512=[{user}]"]

    def _configuration(self) -> dict[str, object]:
        security, listener = self._security, "listener.name.clients"
        module = "org.apache.kafka.common.security"
        plain = f'{module}.plain.PlainLoginModule required user_{security.username}="%s";'
        return super()._configuration() | {
            "listener.security.protocol.map": self._protocols("SASL_SSL"),
            "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
            f"{listener}.scram-sha-512.sasl.jaas.config": (
                f"{module}.scram.ScramLoginModule required;"
            ),
            f"{listener}.plain.sasl.jaas.config": plain % security.password,
            f"{listener}.ssl.keystore.type": "PEM",
            f"{listener}.ssl.keystore.location": security.certificate_file,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
        }


class GuardedRedis(Redis):
    """A Redis that asks for a password; over TLS by `tls_proxy`, which its binary can't do."""

    def __init__(self, folder: Path, password: str) -> None:
        super().__init__(folder)
        self._password = password

    def _configuration(self) -> Iterator[tuple[str, object]]:
        yield from super()._configuration()
        yield "requirepass", self._password


def tls_proxy(
    port: int, security: Security, *, asks_clients: bool = False
) -> AbstractAsyncContextManager[int]:
    """A port that speaks TLS and nothing else, before one of this machine that can't.

    It may ask its clients for a certificate of the same authority.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(security.certificate_file)
    if asks_clients:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(security.ca_file)
    return proxy(port, context=context)

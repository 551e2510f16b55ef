"""How Timbre speaks to Kafka: one place turns settings into what each client library wants."""

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    UnsupportedSaslMechanismError,
)
from faust.auth import SASLCredentials, SSLCredentials

from worker.errors import ServicesUnavailable
from worker.kafka.aiokafka_faults import mend
from worker.settings import KafkaSettings
from worker.tls import client_context

MAX_REQUEST_OVERHEAD_BYTES = 1024 * 1024

Client = TypeVar("Client", AIOKafkaConsumer, AIOKafkaProducer)


mend()


def ssl_context(kafka: KafkaSettings) -> ssl.SSLContext | None:
    """The TLS context, or None where the protocol is plain text.

    Raises
    ------
    SettingsInvalid
        A certificate or key file can't be read, or is encrypted.
    """
    return client_context("Kafka", kafka) if "SSL" in kafka.security_protocol else None


def client_options(kafka: KafkaSettings) -> dict[str, Any]:
    """Keyword arguments that every aiokafka client takes."""
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "security_protocol": kafka.security_protocol,
        "ssl_context": ssl_context(kafka),
        "request_timeout_ms": int(kafka.request_timeout_s * 1000),
    }
    if kafka.security_protocol.startswith("SASL"):
        assert kafka.sasl_password is not None  # the settings' validator saw to it
        options |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.sasl_username,
            "sasl_plain_password": kafka.sasl_password.get_secret_value(),
        }
    return options


def faust_credentials(kafka: KafkaSettings) -> SASLCredentials | SSLCredentials | None:
    """The same as `client_options`, in faust's own terms."""
    context = ssl_context(kafka)
    if kafka.security_protocol.startswith("SASL"):
        assert kafka.sasl_password is not None  # the settings' validator saw to it
        return SASLCredentials(
            username=kafka.sasl_username,
            password=kafka.sasl_password.get_secret_value(),
            mechanism=kafka.sasl_mechanism,
            ssl_context=context,
        )
    return None if context is None else SSLCredentials(context)


def producer(kafka: KafkaSettings) -> AIOKafkaProducer:
    """A producer that reports delivery only once every in-sync replica has the message.

    Not an idempotent one: aiokafka numbers a batch before it gives it up (no leader for a while, or
    a message that is too large), and the broker then refuses everything after the gap, for good.
    So a message may be there twice, under the same event id.
    """
    return AIOKafkaProducer(
        **client_options(kafka),
        acks="all",
        compression_type="gzip",
        linger_ms=5,
        max_request_size=8 * kafka.max_event_bytes + MAX_REQUEST_OVERHEAD_BYTES,
    )


@asynccontextmanager
async def started(
    client: Client, kafka: KafkaSettings, topics: Sequence[str] = ()
) -> AsyncIterator[Client]:
    """A client for as long as the context lasts; stopped also where it can't start.

    Raises
    ------
    ServicesUnavailable
        Kafka can't be reached, or is gone half-way, or one of `topics` is not there.
    """
    try:
        await client.start()
        yield client
    except KafkaError as error:
        if topics and isinstance(error, UnknownTopicOrPartitionError):
            raise no_topic(kafka, topics) from error
        raise unreachable(kafka, error) from error
    finally:
        await client.stop()


def unreachable(kafka: KafkaSettings, error: KafkaError) -> ServicesUnavailable:
    """What to tell of a broker that doesn't answer, or refuses."""
    why, check = obstacle(error)
    return ServicesUnavailable(
        f"Kafka at {kafka.bootstrap_servers} can't be reached ({why}); check {check}."
    )


def no_topic(kafka: KafkaSettings, topics: Sequence[str]) -> ServicesUnavailable:
    """What to tell where Kafka shows none of a name: it has none, or this user may not see it."""
    return ServicesUnavailable(
        f"Kafka at {kafka.bootstrap_servers} has no topic {' or '.join(topics)} that this user may "
        "see; make it, or name the topics in use with TIMBRE_KAFKA__TOPIC_*."
    )


def obstacle(error: BaseException) -> tuple[str, str]:
    """Why Kafka can't be reached, and what to check then."""
    cause = error.__cause__ or error
    if isinstance(cause, KafkaConnectionError):  # closed by the broker, which may have told why
        cause = cause.__cause__ or error
    match cause:
        case SaslAuthenticationFailed():
            return (
                "the user name or the password is refused",
                "TIMBRE_KAFKA__SASL_USERNAME, TIMBRE_KAFKA__SASL_PASSWORD and "
                "TIMBRE_KAFKA__SASL_MECHANISM",
            )
        case TopicAuthorizationFailedError() | GroupAuthorizationFailedError():
            return f"a right is missing: {cause}", "what Kafka allows this user"
        case UnsupportedSaslMechanismError():
            return "the SASL mechanism is not offered", "TIMBRE_KAFKA__SASL_MECHANISM"
        case ssl.SSLCertVerificationError():
            return (
                f"the certificate is refused: {cause.verify_message}",
                "TIMBRE_KAFKA__SSL_CA_FILE, and that TIMBRE_KAFKA__BOOTSTRAP_SERVERS and the "
                "brokers' advertised listeners name hosts as the certificates do",
            )
        case ssl.SSLError():
            return (
                f"TLS fails: {cause.reason}",
                "TIMBRE_KAFKA__SECURITY_PROTOCOL, TIMBRE_KAFKA__SSL_CERT_FILE and "
                "TIMBRE_KAFKA__SSL_KEY_FILE",
            )
    return (
        type(cause).__name__,
        "that it runs, TIMBRE_KAFKA__BOOTSTRAP_SERVERS and TIMBRE_KAFKA__SECURITY_PROTOCOL",
    )

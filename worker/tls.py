"""TLS with Kafka and Redis, from the PEM files that their settings name."""

import ssl

from worker.errors import SettingsInvalid
from worker.settings import KafkaSettings, RedisSettings


def client_context(service: str, files: KafkaSettings | RedisSettings) -> ssl.SSLContext:
    """A context that trusts the CA, or else the system's, and shows the client certificate, if any.

    Raises
    ------
    SettingsInvalid
        A file can't be read, or the key is encrypted; told with the settings of `service`.
    """
    variables = f"TIMBRE_{service.upper()}__SSL_"

    def refuse_encrypted() -> str:
        """OpenSSL would ask whoever sits at the terminal, and wait."""
        raise SettingsInvalid(
            f"{service}'s client key is encrypted; decrypt it (openssl pkey) into a file that only "
            f"the worker's user can read, and name that in {variables}KEY_FILE."
        )

    try:
        context = ssl.create_default_context(cafile=files.ssl_ca_file)
        if files.ssl_cert_file is not None:
            context.load_cert_chain(files.ssl_cert_file, files.ssl_key_file, refuse_encrypted)
    except OSError as error:
        raise SettingsInvalid(
            f"{service}'s TLS files can't be read ({error}); check {variables}CA_FILE, "
            f"{variables}CERT_FILE and {variables}KEY_FILE."
        ) from None
    return context

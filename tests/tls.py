"""A server that can be trusted, for tests of TLS."""

from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from worker.services.service import Security


def issue_security(folder: Path, user: str, password: str) -> Security:
    """In `folder` a certificate for 127.0.0.1 and the authority it is of; and who may enter."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    (folder / "server.pem").write_bytes(pkcs8 + chain)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return Security(user, password, folder / "server.pem", folder / "ca.pem")

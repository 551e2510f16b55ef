"""A Kafka record as the stages see it, free of any client library."""

from dataclasses import dataclass

UNREAD = "timbre-unread"
"""Header of a record that stands for one which could not be read out of its batch; its value is
that one's bytes, where they are too many"""


@dataclass(frozen=True, slots=True)
class Record:
    """One consumed message with where it came from.

    `timestamp_s` is the record's time in seconds since the epoch, `headers` keep their order.
    """

    topic: str
    partition: int
    offset: int
    timestamp_s: float
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()

    @property
    def unread(self) -> bool:
        """Whether it stands for a record that could not be read."""
        return any(name == UNREAD for name, _ in self.headers)

    @property
    def unread_bytes(self) -> int:
        """How many bytes it stands for, where that is why they were not read, else 0."""
        return int(dict(self.headers).get(UNREAD) or 0)

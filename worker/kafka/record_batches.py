"""Records out of Kafka's batches, whatever an outsider packed into one.

The broker accepts header names that are not text, millions of headers, batches that unpack to
thousands of times their size, and records that claim an offset outside their batch; its disk may
spoil any batch. Spoilt ones and the first stop aiokafka's consumer for good, the last move it past
what follows, the others exhaust the time and memory of every worker in turn. But honest batches
unpack to hundreds of times their size too, as a producer bounds what it sends and not what it
packs. So a batch is unpacked no further than the record that is asked for, and a record that can't
be read is given with neither key nor value, and a header (`record.UNREAD`) that says so, to end as
any bad event does; from others such a header is not taken.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from aiokafka.consumer import fetcher
from aiokafka.record import default_records, memory_records
from aiokafka.record.util import decode_varint

from worker.kafka import compression
from worker.record import UNREAD

MAX_HEADERS = 1000  # of one record
HEAD_BYTES = 21  # hold a record's attributes, time and offset
# A record that is too large is passed over to read those behind it, where it is no larger than
# this; a producer in good faith doesn't make such.
MAX_SKIPPED_BYTES = 16 << 20
# A batch is unpacked no further, so that its end is reached: a thousand times what Kafka takes at
# once. Apache's producer packs events that are much alike to a five-hundredth.
MAX_UNPACKED_BYTES = 1 << 30
# One poll unpacks little more of a partition, however much is packed into what was fetched.
POLL_BYTES = 1 << 20


def read_whatever_was_sent() -> None:
    """Have every aiokafka consumer of this process read batches as this module does.

    Only aiokafka's reader in Python can be told so; it is fast enough for events.
    """
    memory_records.DefaultRecordBatch = _Batch
    fetcher.MemoryRecords = memory_records._MemoryRecordsPy
    fetcher.FetchResult = _FetchResult


@contextmanager
def bounded_unpacking(max_bytes: int) -> Iterator[None]:
    """Let this process unpack no record of more than `max_bytes`.

    For where outsiders' events are read. Dead letters are written by Timbre, and one may hold a
    large and empty event.
    """
    before, _Batch.max_unpacked_bytes = _Batch.max_unpacked_bytes, max_bytes
    try:
        yield
    finally:
        _Batch.max_unpacked_bytes = before


class _FetchResult(fetcher.FetchResult):  # type: ignore[misc]
    """What was fetched of a partition, of which a poll gives a bounded part."""

    def getall(self, max_records: int | None = None) -> list[Any]:
        records = list[Any]()
        most_bytes = _Stream.unpacked_bytes + POLL_BYTES
        while len(records) != max_records and _Stream.unpacked_bytes < most_bytes:
            record = super().getall(1)
            if not record:
                break
            records += record
        return records


class _Batch(default_records._DefaultRecordBatchPy):  # type: ignore[misc]
    """A batch that gives as many records as it says it has, and raises nothing."""

    max_unpacked_bytes: ClassVar[int] = sys.maxsize
    _buffer: bytearray
    _pos: int
    _next_record_index: int
    _num_records: int

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        self._stream: _Stream | None = _Stream(self._unpacked())
        self._least_delta = 0  # of the next record; compaction leaves gaps

    def _unpacked(self) -> Iterator[bytes]:
        yield from compression.unpacked(bytes(self._buffer[self._pos :]), self.compression_type)

    def validate_crc(self) -> bool:
        """Keep a batch that isn't as it was sent, with records that can't be read.

        Where the broker's disk spoilt it, it comes as often as it is fetched.
        """
        if not super().validate_crc():
            self._stream = None
            self._num_records = min(self._num_records, self.last_offset_delta + 1)
        return True

    def _maybe_uncompress(self) -> None:
        """Not at once."""

    def __next__(self) -> Any:
        if self._next_record_index >= self._num_records:
            raise StopIteration
        self._next_record_index += 1
        if self._stream is not None:
            try:
                return self._read(self._stream)
            except compression.ERRORS:
                self._stream = None
        return self._unread(self._least_delta)

    def _read(self, stream: "_Stream") -> Any:
        length = stream.number()
        too_large = self.compression_type != self.CODEC_NONE and length > self.max_unpacked_bytes
        record = _Reader(stream.take(HEAD_BYTES if too_large else length))
        record.number()  # attributes, of which there are none
        time_delta, offset_delta = record.number(), record.number()
        behind = self._num_records - self._next_record_index
        if not self._least_delta <= offset_delta <= self.last_offset_delta - behind:
            raise ValueError("the record's offset is not its own")
        if too_large:
            if length <= MAX_SKIPPED_BYTES:
                stream.skip(length - HEAD_BYTES)
            else:
                self._stream = None
            return self._unread(offset_delta, length)
        timestamp = self.first_timestamp + time_delta
        if self.timestamp_type == self.LOG_APPEND_TIME:
            timestamp = self.max_timestamp
        key, value, headers = record.field(), record.field(), record.number()
        if headers > MAX_HEADERS:
            return self._unread(offset_delta)
        kept = [header for _ in range(headers) if (header := record.header())[0] != UNREAD]
        self._least_delta = offset_delta + 1
        return default_records._DefaultRecordPy(
            self.base_offset + offset_delta, timestamp, self.timestamp_type, key, value, kept
        )

    def _unread(self, offset_delta: int, too_many_bytes: int | None = None) -> Any:
        self._least_delta = offset_delta + 1
        why = b"" if too_many_bytes is None else b"%d" % too_many_bytes
        return default_records._DefaultRecordPy(
            self.base_offset + offset_delta, self.max_timestamp, self.timestamp_type, None, None,
            [(UNREAD, why)],
        )  # fmt: skip


class _Stream:
    """The bytes of a batch one after another, of which little more than a record is held."""

    unpacked_bytes: ClassVar[int] = 0
    """Of all batches that this process read"""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = bytearray()
        self._pos = 0
        self._left_bytes = MAX_UNPACKED_BYTES

    def number(self) -> int:
        number: int
        number, end = decode_varint(self._held, self._pos)
        while end > len(self._held):
            self._unpack()
            number, end = decode_varint(self._held, self._pos)
        self._pos = end
        return number

    def take(self, size: int) -> bytes:
        if size < 0:
            raise ValueError("a record has less than nothing")
        while size > len(self._held) - self._pos:
            self._unpack()
        start, self._pos = self._pos, self._pos + size
        return bytes(self._held[start : self._pos])

    def skip(self, size: int) -> None:
        while (there := len(self._held) - self._pos) < size:
            size -= there
            self._pos += there
            self._unpack()
        self._pos += size

    def _unpack(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise EOFError("the record ends beyond its batch")
        self._left_bytes -= len(piece)
        if self._left_bytes < 0:
            raise ValueError("the batch unpacks to too much")
        _Stream.unpacked_bytes += len(piece)
        del self._held[: self._pos]
        self._pos = 0
        self._held += piece


class _Reader:
    """Reads a record's fields one after another, none of them beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pos = 0

    def number(self) -> int:
        number: int
        number, self._pos = decode_varint(self._data, self._pos)
        self._stay_inside()
        return number

    def field(self) -> bytes | None:
        size = self.number()
        if size < 0:
            return None
        start, self._pos = self._pos, self._pos + size
        self._stay_inside()
        return self._data[start : self._pos]

    def header(self) -> tuple[str, bytes | None]:
        """Its name as text, whatever it is."""
        name = self.field() or b""
        return name.decode(errors="backslashreplace"), self.field()

    def _stay_inside(self) -> None:
        if self._pos > len(self._data):
            raise ValueError("a field ends beyond its record")

"""Records out of Kafka's batches, whatever an outsider packed into one.

The broker accepts header names that are not text, millions of headers, and batches that unpack to
thousands of times their size. The first stop aiokafka's consumer for good; the others exhaust the
time and memory of every worker in turn. Here a record that can't be read is given with neither key
nor value, and a header (`record.UNREAD`) that says so, to end as any bad event does.
"""

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, ClassVar

import cramjam
import numpy as np
from aiokafka.codec import snappy_decode
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records, memory_records
from aiokafka.record.util import decode_varint

from worker.record import UNREAD

# Where it is bounded a batch may unpack to this, and to so many times its size besides: more than
# events compress.
UNPACKED_BYTES = 1 << 20
UNPACKED_RATIO = 50
MAX_HEADERS = 1000  # of one record
UNPACKING_ERRORS = (
    OSError, EOFError, ValueError, struct.error, zlib.error, cramjam.DecompressionError,
)  # fmt: skip


def read_whatever_was_sent() -> None:
    """Have every aiokafka consumer of this process read batches as this module does.

    Only aiokafka's reader in Python can be told so; it is fast enough for events.
    """
    memory_records.DefaultRecordBatch = _Batch
    fetcher.MemoryRecords = memory_records._MemoryRecordsPy


@contextmanager
def bounded_unpacking() -> Iterator[None]:
    """Let no batch that this process reads unpack to more than events do.

    For where outsiders' events are read. Dead letters are written by Timbre, and one may hold a
    large and empty event.
    """
    before, _Batch.bounded = _Batch.bounded, True
    try:
        yield
    finally:
        _Batch.bounded = before


class _Batch(default_records._DefaultRecordBatchPy):  # type: ignore[misc]
    """A batch that gives as many records as it says it has, and raises nothing."""

    bounded: ClassVar[bool] = False
    _buffer: bytearray
    _pos: int
    _next_record_index: int
    _decompressed: bool

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__(buffer)
        self._broken = False

    def __next__(self) -> Any:
        if not self._broken:
            try:
                return super().__next__()
            except CorruptRecordException:
                self._broken = True
        if self._next_record_index >= self._num_records:
            raise StopIteration
        self._next_record_index += 1
        return self._unread(self._next_record_index - 1)

    def _maybe_uncompress(self) -> None:
        if self._decompressed or self.compression_type == self.CODEC_NONE:
            return
        try:
            if self.bounded:
                self._buffer = _unpacked(bytes(self._buffer[self._pos :]), self.compression_type)
                self._pos = 0
            else:
                super()._maybe_uncompress()
        except UNPACKING_ERRORS:
            self._broken = True
        self._decompressed = True

    def _read_msg(self, *_: object) -> Any:
        """The record at `_pos`; IndexError or ValueError where there is none."""
        length, start = decode_varint(self._buffer, self._pos)
        reader = _Reader(self._buffer, start, start + length)
        self._pos = start + length
        reader.number()  # attributes, of which there are none
        time_delta, offset_delta = reader.number(), reader.number()
        timestamp = self.first_timestamp + time_delta
        if self.timestamp_type == self.LOG_APPEND_TIME:
            timestamp = self.max_timestamp
        key, value, headers = reader.field(), reader.field(), reader.number()
        if headers > MAX_HEADERS:
            return self._unread(offset_delta)
        return default_records._DefaultRecordPy(
            self.base_offset + offset_delta, timestamp, self.timestamp_type, key, value,
            [reader.header() for _ in range(headers)],
        )  # fmt: skip

    def _unread(self, offset_delta: int) -> Any:
        return default_records._DefaultRecordPy(
            self.base_offset + offset_delta, self.max_timestamp, self.timestamp_type, None, None,
            [(UNREAD, b"")],
        )  # fmt: skip


class _Reader:
    """Reads a record's fields one after another, none of them beyond its end."""

    def __init__(self, data: bytearray, start: int, end: int) -> None:
        if not start <= end <= len(data):
            raise ValueError("the record ends beyond its batch")
        self._data = memoryview(data)[:end]
        self._pos = start

    def number(self) -> int:
        number: int
        number, self._pos = decode_varint(self._data, self._pos)
        return number

    def field(self) -> bytes | None:
        size = self.number()
        if size < 0:
            return None
        start, self._pos = self._pos, self._pos + size
        if self._pos > len(self._data):
            raise ValueError("a field ends beyond its record")
        return bytes(self._data[start : self._pos])

    def header(self) -> tuple[str, bytes | None]:
        """Its name as text, whatever it is."""
        name = self.field() or b""
        return name.decode(errors="backslashreplace"), self.field()


def _unpacked(packed: bytes, codec: int) -> bytearray:
    """The records of a batch; ValueError, or what its library raises, where they are too many."""
    most = UNPACKED_BYTES + UNPACKED_RATIO * len(packed)
    if codec == _Batch.CODEC_SNAPPY:  # gives 22 times its size at most
        return bytearray(snappy_decode(packed))
    if codec == _Batch.CODEC_GZIP:
        with gzip.GzipFile(fileobj=BytesIO(packed)) as file:
            unpacked = file.read(most + 1)
        if len(unpacked) > most:
            raise ValueError("the batch unpacks to too much")
        return bytearray(unpacked)
    room = np.empty(most, np.uint8)
    library = cramjam.lz4 if codec == _Batch.CODEC_LZ4 else cramjam.zstd
    return bytearray(room[: library.decompress_into(packed, room)])

"""Kafka's compressions, unpacked piece by piece.

A batch of a few KiB may unpack to gigabytes. What comes here is a piece at a time, and what it
takes to unpack the next one is bounded, whatever was packed.
"""

import struct
import sys
import zlib
from collections.abc import Iterator
from gzip import GzipFile
from io import BytesIO

import cramjam
from aiokafka.codec import _detect_xerial_stream
from aiokafka.record.default_records import DefaultRecordBase as Codecs
from backports import zstd

# What broken bytes raise.
ERRORS = (
    OSError, EOFError, ValueError, struct.error, zlib.error,
    cramjam.DecompressionError, zstd.ZstdError,
)  # fmt: skip

PIECE_BYTES = 64 * 1024
# The window that any reader of zstd grants (RFC 8878), and the largest that levels up to 19 want.
WINDOW_LOG = 23

LZ4_MAGIC = 0x184D2204
LZ4_INDEPENDENT_BLOCKS, LZ4_BLOCK_CHECKSUMS, LZ4_CONTENT_SIZE, LZ4_DICTIONARY = 32, 16, 8, 1
SNAPPY_RATIO = 22  # three bytes stand for 64 at most
XERIAL_HEADER_BYTES = 16


def unpacked(packed: bytes, codec: int) -> Iterator[bytes]:
    """The pieces that a batch unpacks to; one of `ERRORS` where it is broken."""
    match codec:
        case Codecs.CODEC_NONE:
            return _read(BytesIO(packed))
        case Codecs.CODEC_GZIP:
            return _read(GzipFile(fileobj=BytesIO(packed)))
        case Codecs.CODEC_SNAPPY:
            return _snappy(packed)
        case Codecs.CODEC_LZ4:
            return _lz4(packed)
        case Codecs.CODEC_ZSTD:
            return _zstd(packed)
    raise ValueError(f"no compression has the number {codec}")


def _read(file: BytesIO | GzipFile) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


def _zstd(packed: bytes) -> Iterator[bytes]:
    """One frame, as producers send no more.

    Its window fills as it is unpacked. Where that may become a large one (level 20 and above ask
    for it even for little) it is unpacked no further than a usual window reaches.
    """
    frame = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
    left_bytes = sys.maxsize
    try:
        piece = frame.decompress(packed, PIECE_BYTES)
    except zstd.ZstdError:
        frame = zstd.ZstdDecompressor()
        left_bytes = 1 << WINDOW_LOG
        piece = frame.decompress(packed, PIECE_BYTES)
    while piece and left_bytes > 0:
        left_bytes -= len(piece)
        yield piece
        piece = b"" if frame.eof else frame.decompress(b"", PIECE_BYTES)


def _lz4(packed: bytes) -> Iterator[bytes]:
    """One frame of blocks that don't depend on each other: the broker takes no others."""
    magic, flags, descriptor = struct.unpack_from("<IBB", packed)
    if magic != LZ4_MAGIC or not flags & LZ4_INDEPENDENT_BLOCKS:
        raise ValueError("not what Kafka calls LZ4")
    room = bytearray(1 << (8 + 2 * (descriptor >> 4 & 7)))
    start = 7 + (8 if flags & LZ4_CONTENT_SIZE else 0) + (4 if flags & LZ4_DICTIONARY else 0)
    while True:
        (size,) = struct.unpack_from("<I", packed, start)
        if size == 0:
            return
        start += 4
        end = start + (size & 0x7FFFFFFF)
        block = packed[start:end]
        if size >> 31:
            yield block
        else:
            size = cramjam.lz4.decompress_block_into(block, room, output_len=len(room))
            yield bytes(room[:size])
        start = end + (4 if flags & LZ4_BLOCK_CHECKSUMS else 0)


def _snappy(packed: bytes) -> Iterator[bytes]:
    """One block, or many in the frame of xerial's Java library."""
    if not _detect_xerial_stream(packed):
        yield _snappy_block(packed)
        return
    start = XERIAL_HEADER_BYTES
    while start < len(packed):
        (size,) = struct.unpack_from(">I", packed, start)
        start += 4
        yield _snappy_block(packed[start : start + size])
        start += size


def _snappy_block(block: bytes) -> bytes:
    # Room is made for as much as a block says that it has.
    if cramjam.snappy.decompress_raw_len(block) > SNAPPY_RATIO * len(block):
        raise ValueError("the block can't have what it says")
    return bytes(cramjam.snappy.decompress_raw(block))

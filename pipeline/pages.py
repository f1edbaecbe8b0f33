"""Parquet files of other people, held to the memory that their rows can need.

A page says itself how large it is once unpacked, and Arrow believes it: 58 kB of zstd in a sound-looking file take 1.8
GiB. A row group, read as a whole, can hold any number of rows in next to no bytes. So both are looked at first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.schema import ROW_GROUP_ROWS

_HEADER_BYTES = 1 << 12, 1 << 16  # read at first; at most, where statistics in it are long
_SPARE_BYTES = 1 << 20  # of a page, for lengths, levels and a dictionary
_VALUE_BYTES = 8
_I32, _I64, _BINARY, _LIST, _SET, _STRUCT = 5, 6, 8, 9, 10, 12
_FIXED_BYTES = {1: 0, 2: 0, 3: 1, 7: 8}  # true, false, byte, double


def require_moderate(source: pa.NativeFile, parquet: pq.ParquetFile, groups: Iterable[int], columns: set[str]) -> None:
    """Refuses row groups of more rows than a frames file has in one, and pages larger than those rows.

    Args:
        source: The file.
        parquet: The same, opened; of flat columns.
        groups: Row groups that will be read.
        columns: Names of the columns that will be read.

    Raises:
        ValueError: Says which size, and what it may be.
    """
    for index in groups:
        group = parquet.metadata.row_group(index)
        if not 0 <= group.num_rows <= ROW_GROUP_ROWS:
            raise ValueError(f"a row group has {group.num_rows} rows, more than {ROW_GROUP_ROWS}")
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema not in columns:
                continue
            held = parquet.schema_arrow.field(chunk.path_in_schema).type
            width = held.byte_width if pa.types.is_fixed_size_binary(held) else _VALUE_BYTES
            most = ROW_GROUP_ROWS * width + _SPARE_BYTES
            for size in page_sizes(source, chunk):
                if size > most:
                    raise ValueError(f"a page of {chunk.path_in_schema} takes {size} bytes, more than {most}")


def page_sizes(source: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> Iterator[int]:
    """What each page of a column chunk takes when it is unpacked, in bytes, as its own header says.

    Raises:
        ValueError: A header is not sound.
    """
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        at = min(at, chunk.dictionary_page_offset)
    end = at + chunk.total_compressed_size
    while at < end:
        unpacked, packed, length = _sizes(source, at, end)
        at += length + packed
        if at > end:
            raise ValueError("a page leads out of its column")
        yield unpacked


def _sizes(source: pa.NativeFile, at: int, end: int) -> tuple[int, int, int]:
    """Bytes of the page there, unpacked and packed, and of its header."""
    for num_bytes in _HEADER_BYTES:
        header = _Header(source.read_at(min(num_bytes, end - at), at))
        with contextlib.suppress(_CutOffError):
            return *header.sizes(), header.at
    raise ValueError("a page's header does not end")


class _CutOffError(Exception):
    """More of the file is needed."""


class _Header:
    """A page's header, a struct in Thrift's compact encoding, of which two numbers are wanted and the length.

    parquet.thrift: PageHeader has 2: i32 uncompressed_page_size, 3: i32 compressed_page_size. What Arrow could read in
    another way than this does is refused: a field that comes twice, of another type, or cut to 16 or 32 bits.
    """

    def __init__(self, content: bytes) -> None:
        self._content, self.at = content, 0

    def sizes(self) -> tuple[int, int]:
        """The page's size unpacked and packed, in bytes; `at` is the header's length then."""
        found = self._struct(depth=0)
        unpacked, packed = found.get(2, -1), found.get(3, -1)
        if not (0 <= unpacked < 1 << 31 and 0 <= packed < 1 << 31):
            raise ValueError("a page's header says no size")
        return unpacked, packed

    def _byte(self) -> int:
        if self.at >= len(self._content):
            raise _CutOffError
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a page's header holds no number where one is due")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _struct(self, depth: int) -> dict[int, int]:
        """Its integers of 32 bits, by the number of their field; in that order they come."""
        found, last = {}, 0
        while head := self._byte():
            field = last + (head >> 4) if head >> 4 else self._integer()
            if not last < field < 1 << 15:
                raise ValueError("a page's header names its fields in another order")
            value, last = self._value(head & 0x0F, depth), field
            if value is not None:
                found[field] = value
        return found

    def _value(self, kind: int, depth: int) -> int | None:
        if depth > 8:
            raise ValueError("a page's header is too deep")
        if 4 <= kind <= _I64:
            number = self._integer()
            return number if kind == _I32 else None
        if kind in _FIXED_BYTES:
            self.at += _FIXED_BYTES[kind]
        elif kind == _BINARY:
            length = self._varint()
            self.at += length
        elif kind in (_LIST, _SET):
            head = self._byte()
            count, kind = head >> 4 if head >> 4 < 15 else self._varint(), head & 0x0F
            if kind in _FIXED_BYTES:
                self.at += count * max(1, _FIXED_BYTES[kind])  # truths take a byte each here
                return None
            for _ in range(count):
                self._value(kind, depth + 1)
                if self.at > len(self._content):
                    break
        elif kind == _STRUCT:
            self._struct(depth + 1)
        else:
            raise ValueError(f"a page's header holds a field of kind {kind}")
        return None

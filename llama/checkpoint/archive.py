"""Safe listing of the records in a `.pth` file, which is a zip archive.

`torch.save` writes records uncompressed, so that tensors can be memory-mapped: `NAME/data.pkl`, a pickle that
describes the tensors; `NAME/data/N`, their values; and a few small records. Oversized records are refused before torch
reads them, and so are compressed ones, which can expand from kilobytes to gigabytes.

Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3, restricted to what torch writes: the directory is right before
the end record, and nothing follows that.
"""

from __future__ import annotations

import hashlib
import io
import pickletools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llama.errors import quote

MAX_PICKLE_BYTES = 4 * 1024**2  # 20 times the size of the pickle in the released 70B
_MAX_SMALL_BYTES = 64 * 1024  # for any other record without tensor values
_MAX_DIRECTORY_BYTES = 4 * 1024**2
_LEGACY_PICKLES = 5  # in files from before torch 1.6: magic number, version, system, the dict, storage names

_END = struct.Struct("<4s4H2LH")  # signature, disks, entries on disk and total, directory size and offset, comment
_END_64_LOCATOR = struct.Struct("<4sLQL")  # signature, disk, offset of the 64-bit end record, disks
_END_64 = struct.Struct("<4sQ2H2L4Q")  # the 64-bit version of _END
_ENTRY = struct.Struct("<4s6H3L5H2L")  # directory entry
_LOCAL = struct.Struct("<4s5H3L2H")  # local header, in front of a record's content
_DESCRIPTOR = struct.Struct("<4sL")  # after the content, if the checksum was not known when the header was written
_CHECKSUM_AT, _LOCAL_CHECKSUM_AT = 16, 14  # byte offsets in a directory entry and in a local header
_IN_EXTRA_FIELD = 0xFFFFFFFF  # marks a value that does not fit in 32 bits; it is in the 64-bit extra field
_ENCRYPTED, _HAS_DESCRIPTOR = 1, 8  # bits of an entry's flags


class ArchiveError(ValueError):
    """The file is not an archive in the form that `torch.save` writes."""


@dataclass(frozen=True)
class Record:
    """A record of the archive.

    Attributes:
        name: the record's name, starting with the archive's own name.
        size: size of the content in bytes.
        offset: byte offset of the content in the file.
        checksum_offsets: byte offsets of the two places in the file that hold the content's CRC-32.
    """

    name: str
    size: int
    offset: int
    checksum_offsets: tuple[int, ...]


def is_archive(file: BinaryIO) -> bool:
    """Whether the file is a zip archive, as written since torch 1.6; older files cannot be memory-mapped."""
    file.seek(0)
    return file.read(2) == b"PK"


def read_records(path: Path) -> list[Record]:
    """Returns the archive's records, after checking that they are uncompressed, within the file and within the limits.

    Raises:
        ArchiveError: a check failed, or the file is damaged; the message names the record, not the file.
    """
    with path.open("rb") as file:
        start, end, n_entries = _directory(file)
        file.seek(start)
        directory = file.read(end - start)
        records: dict[str, Record] = {}
        at = 0
        for _ in range(n_entries):
            record, at = _read_entry(file, directory, at, start)
            if record.name.lower() in records:  # torch's reader ignores case
                raise ArchiveError(f"record names must be unique, got two records named {quote(record.name)}")
            records[record.name.lower()] = record
    if at != len(directory) or not records:
        raise ArchiveError("the directory is empty or does not have the size that its end record states")
    listed = list(records.values())
    _check_sizes(listed)
    _check_overlaps(listed)
    return listed


def count_records(path: Path) -> int:
    """Returns the number of records in the archive's directory, reading only the end of the file.

    Raises:
        ArchiveError: the file is damaged or cut short.
    """
    with path.open("rb") as file:
        return _directory(file)[2]


def content_digest(path: Path) -> bytes | None:
    """A digest of the names, sizes and checksums of all records, which only equal archives share.

    None if the largest record has no checksum. Only the end of the file is read.

    Raises:
        ArchiveError: the file is damaged or cut short.
    """
    with path.open("rb") as file:
        start, end, n_entries = _directory(file)
        file.seek(start)
        directory = file.read(end - start)
    at = largest = 0
    has_checksum = False
    for _ in range(n_entries):
        if len(directory) < at + _ENTRY.size:
            raise ArchiveError("an entry of the directory is damaged")
        fields = _ENTRY.unpack_from(directory, at)
        if fields[9] > largest:
            largest, has_checksum = fields[9], fields[7] != 0
        at += _ENTRY.size + fields[10] + fields[11] + fields[12]
    return hashlib.sha256(directory).digest() if has_checksum else None


def check_pickles(path: Path) -> None:
    """Raises ArchiveError if the pickle that describes the tensors is damaged or could allocate unbounded memory.

    Damage is found by the checksum, if the file has one (see `torch.serialization.set_crc32_options`). torch's
    restricted unpickler runs no code from the file, but allocates byte arrays of any size that the file asks for.
    """
    with path.open("rb") as file:
        for pickle_stream in _pickles(path, file):
            for opcode, argument, _ in pickletools.genops(pickle_stream):
                if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                    raise ArchiveError("its pickle must not create a byte array, which can take any amount of memory")


def _pickles(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    if not is_archive(file):
        file.seek(0)
        head = io.BytesIO(file.read(_LEGACY_PICKLES * MAX_PICKLE_BYTES))
        for _ in range(_LEGACY_PICKLES):
            yield head  # `genops` stops at the end of a pickle, which is where the next one starts
        return
    for record in read_records(path):
        if _is_pickle(record.name):
            file.seek(record.checksum_offsets[0])
            stated = int.from_bytes(file.read(4), "little")
            file.seek(record.offset)
            content = file.read(record.size)
            if stated and stated != zlib.crc32(content):
                raise ArchiveError(f"record {quote(record.name)} does not match its checksum")
            yield io.BytesIO(content)


def _is_pickle(name: str) -> bool:
    return name.lower().endswith("/data.pkl")


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Returns the byte offsets of the directory's start and end, and its number of entries."""
    size = file.seek(0, io.SEEK_END)
    end_at = size - _END.size
    end = _unpack(_END, file, end_at, b"PK\x05\x06")
    n_entries, directory_size, start, comment_size = end[4:]
    directory_end = end_at
    locator_at = end_at - _END_64_LOCATOR.size
    if locator_at >= 0 and _peek(file, locator_at) == b"PK\x06\x07":
        directory_end = _unpack(_END_64_LOCATOR, file, locator_at, b"PK\x06\x07")[2]
        if directory_end != locator_at - _END_64.size:
            raise ArchiveError("the end record is out of place")
        n_entries, directory_size, start = _unpack(_END_64, file, directory_end, b"PK\x06\x06")[7:]
    if comment_size or start + directory_size != directory_end:
        raise ArchiveError("the directory is out of place")
    if directory_size > _MAX_DIRECTORY_BYTES or n_entries * _ENTRY.size > directory_size:
        raise ArchiveError(f"a directory of {n_entries} records in {directory_size} bytes is not possible")
    return start, directory_end, n_entries


def _read_entry(file: BinaryIO, directory: bytes, at: int, directory_start: int) -> tuple[Record, int]:
    """Returns the record that the directory entry at `at` describes, and the offset of the next entry."""
    if len(directory) < at + _ENTRY.size or directory[at : at + 4] != b"PK\x01\x02":
        raise ArchiveError("an entry of the directory is damaged")
    fields = _ENTRY.unpack_from(directory, at)
    flags, method, packed, size, header = (fields[i] for i in (3, 4, 8, 9, 16))
    name_at = at + _ENTRY.size
    extra_at = name_at + fields[10]
    comment_at = extra_at + fields[11]
    next_at = comment_at + fields[12]
    if next_at > len(directory):
        raise ArchiveError("an entry of the directory is damaged")
    name = directory[name_at:extra_at].decode("utf-8", "replace")
    size, packed, header = _widened(directory[extra_at:comment_at], size, packed, header)
    if method or packed != size or flags & _ENCRYPTED:
        raise ArchiveError(f"record {quote(name)} must be stored uncompressed")
    offset, checksum_offset = _content(file, header, directory[name_at:extra_at], size, flags)
    stated = (directory_start + at + _CHECKSUM_AT, checksum_offset)
    file.seek(checksum_offset)
    if offset + size > directory_start or file.read(4) != directory[at + _CHECKSUM_AT : at + _CHECKSUM_AT + 4]:
        raise ArchiveError(f"record {quote(name)} is not where the directory says")
    return Record(name, size, offset, stated), next_at


def _content(file: BinaryIO, header: int, name: bytes, size: int, flags: int) -> tuple[int, int]:
    """Returns the offsets of a record's content and its checksum, and checks the record's own name."""
    local = _unpack(_LOCAL, file, header, b"PK\x03\x04")
    offset = header + _LOCAL.size + local[-2] + local[-1]
    if file.read(len(name)) != name or local[-2] != len(name):
        raise ArchiveError(f"record {quote(name.decode('utf-8', 'replace'))} has a different name in its local header")
    if not flags & _HAS_DESCRIPTOR:
        return offset, header + _LOCAL_CHECKSUM_AT
    _unpack(_DESCRIPTOR, file, offset + size, b"PK\x07\x08")
    return offset, offset + size + 4


def _widened(extra: bytes, *values: int) -> Iterator[int]:
    """Yields an entry's sizes and offset; those too large for 32 bits are read from extra field 1, in this order."""
    wide = b""
    while len(extra) >= 4 and not wide:
        kind, size = struct.unpack_from("<2H", extra)
        wide, extra = (extra[4 : 4 + size] if kind == 1 else b""), extra[4 + size :]
    for value in values:
        if value == _IN_EXTRA_FIELD and len(wide) >= 8:
            yield int.from_bytes(wide[:8], "little")
            wide = wide[8:]
        else:
            yield value


def _check_sizes(records: list[Record]) -> None:
    values = records[0].name.partition("/")[0] + "/data/"
    for record in records:
        limit = MAX_PICKLE_BYTES if _is_pickle(record.name) else _MAX_SMALL_BYTES
        if not record.name.startswith(values) and record.size > limit:
            raise ArchiveError(f"record {quote(record.name)} must have at most {limit} bytes, got {record.size}")


def _check_overlaps(records: list[Record]) -> None:
    """Checks that no two records overlap, so that a changed offset cannot give one tensor the values of another."""
    end = 0
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < end:
            raise ArchiveError(f"record {quote(record.name)} must not overlap another record")
        end = record.offset + record.size


def _unpack(layout: struct.Struct, file: BinaryIO, offset: int, signature: bytes) -> tuple[int, ...]:
    """Returns the fields at `offset`, after checking that the first one is `signature`."""
    content = b""
    if 0 <= offset < 2**63 - layout.size:
        file.seek(offset)
        content = file.read(layout.size)
    if len(content) < layout.size or content[:4] != signature:
        raise ArchiveError("a part of the zip archive is missing or out of place")
    return layout.unpack(content)


def _peek(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(4)

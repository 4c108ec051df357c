"""The zip archive that a `.pth` file is, listed without trusting the file.

`torch.save` writes its records uncompressed, so that tensors can be memory-mapped: `NAME/data.pkl`, a pickle that
describes the tensors; `NAME/data/N`, the values; and a few records of some bytes. Compressed records, which a few
kilobytes let grow to gigabytes, and oversized ones are refused before torch reads them.

The format is that of PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3, in the one form that torch writes: nothing after
the end record, and the directory right before it.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llama.quoting import quote

MAX_PICKLE_BYTES = 4 * 1024**2  # 20 times that of the released 70B
_MAX_SMALL_BYTES = 64 * 1024  # of every other record that holds no tensor
_MAX_DIRECTORY_BYTES = 4 * 1024**2
_LEGACY_PICKLES = 5  # before torch 1.6: magic number, version, system, the dict, names of the storages

_END = struct.Struct("<4s4H2LH")  # signature, disks, entries on disk and in all, directory size and offset, comment
_END_64_LOCATOR = struct.Struct("<4sLQL")  # signature, disk, offset of the 64-bit end record, disks
_END_64 = struct.Struct("<4sQ2H2L4Q")  # as _END, with 64 bits
_ENTRY = struct.Struct("<4s6H3L5H2L")  # of the directory
_LOCAL = struct.Struct("<4s5H3L2H")  # before a record's bytes
_DESCRIPTOR = struct.Struct("<4sL")  # after them, where their checksum was not known before
_CHECKSUM_AT, _LOCAL_CHECKSUM_AT = 16, 14  # in an entry of the directory, in a local header
_IN_EXTRA_FIELD = 0xFFFFFFFF  # the value does not fit, and is in the 64-bit extra field
_ENCRYPTED, _HAS_DESCRIPTOR = 1, 8  # bits of an entry's flags


class ArchiveError(ValueError):
    """The file is no archive as `torch.save` writes it."""


@dataclass(frozen=True)
class Record:
    """A record of the archive.

    Attributes:
        name: with the archive's own name in front.
        size: of its content, in bytes.
        offset: of its content in the file.
        checksum_offsets: where the file states the CRC-32 of the content.
    """

    name: str
    size: int
    offset: int
    checksum_offsets: tuple[int, ...]


def is_archive(file: BinaryIO) -> bool:
    """Whether the file has torch.save's format since 1.6, a zip archive; the one before cannot be memory-mapped."""
    file.seek(0)
    return file.read(2) == b"PK"


def read_records(path: Path) -> list[Record]:
    """The records of an archive, checked to be stored uncompressed, inside the file, and no larger than they may be.

    Raises:
        ArchiveError: they are not, or the file is damaged; the message names the record and not the file.
    """
    with path.open("rb") as file:
        start, end, n_entries = _directory(file)
        file.seek(start)
        directory = file.read(end - start)
        records: dict[str, Record] = {}
        at = 0
        for _ in range(n_entries):
            record, at = _read_entry(file, directory, at, start)
            if record.name.lower() in records:  # torch's reader takes no account of case
                raise ArchiveError(f"two records are named {quote(record.name)}")
            records[record.name.lower()] = record
    if at != len(directory) or not records:
        raise ArchiveError("its directory has another size than it states")
    found = list(records.values())
    _check_sizes(found)
    _check_overlaps(found)
    return found


def count_records(path: Path) -> int:
    """The number of records that an archive's directory lists, from the end of the file alone.

    Raises:
        ArchiveError: the file is damaged or cut short.
    """
    with path.open("rb") as file:
        return _directory(file)[2]


def check_pickles(path: Path) -> None:
    """Raises ArchiveError if the file's description of its tensors is damaged, or would take memory without bound.

    Damage shows by the checksum, unless the file has none (`torch.serialization.set_crc32_options`). torch's restricted
    unpickler runs no code of the file, but makes byte arrays of any size that it asks for.
    """
    with path.open("rb") as file:
        for pickle_stream in _pickles(path, file):
            for opcode, argument, _ in pickletools.genops(pickle_stream):
                if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                    raise ArchiveError("it holds a byte array")


def _pickles(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    if not is_archive(file):
        file.seek(0)
        head = io.BytesIO(file.read(_LEGACY_PICKLES * MAX_PICKLE_BYTES))
        for _ in range(_LEGACY_PICKLES):
            yield head  # each ends where the next one starts
        return
    for record in read_records(path):
        if _is_pickle(record.name):
            file.seek(record.checksum_offsets[0])
            stated = int.from_bytes(file.read(4), "little")
            file.seek(record.offset)
            content = file.read(record.size)
            if stated and stated != zlib.crc32(content):
                raise ArchiveError(f"record {quote(record.name)} has another checksum than the file states")
            yield io.BytesIO(content)


def _is_pickle(name: str) -> bool:
    return name.lower().endswith("/data.pkl")


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Where the archive's directory starts and ends, and the number of its entries."""
    size = file.seek(0, io.SEEK_END)
    end_at = size - _END.size
    end = _unpack(_END, file, end_at, b"PK\x05\x06")
    n_entries, directory_size, start, comment_size = end[4:]
    directory_end = end_at
    locator_at = end_at - _END_64_LOCATOR.size
    if locator_at >= 0 and _peek(file, locator_at) == b"PK\x06\x07":
        directory_end = _unpack(_END_64_LOCATOR, file, locator_at, b"PK\x06\x07")[2]
        if directory_end != locator_at - _END_64.size:
            raise ArchiveError("its end record is out of place")
        n_entries, directory_size, start = _unpack(_END_64, file, directory_end, b"PK\x06\x06")[7:]
    if comment_size or start + directory_size != directory_end:
        raise ArchiveError("its directory is out of place")
    if directory_size > _MAX_DIRECTORY_BYTES or n_entries * _ENTRY.size > directory_size:
        raise ArchiveError(f"its directory of {n_entries} records in {directory_size} bytes cannot be")
    return start, directory_end, n_entries


def _read_entry(file: BinaryIO, directory: bytes, at: int, directory_start: int) -> tuple[Record, int]:
    """The record that an entry of the directory describes, and where the next entry starts."""
    if len(directory) < at + _ENTRY.size or directory[at : at + 4] != b"PK\x01\x02":
        raise ArchiveError("an entry of its directory is damaged")
    fields = _ENTRY.unpack_from(directory, at)
    flags, method, packed, size, header = (fields[i] for i in (3, 4, 8, 9, 16))
    name_at = at + _ENTRY.size
    extra_at = name_at + fields[10]
    comment_at = extra_at + fields[11]
    following = comment_at + fields[12]
    if following > len(directory):
        raise ArchiveError("an entry of its directory is damaged")
    name = directory[name_at:extra_at].decode("utf-8", "replace")
    size, packed, header = _widened(directory[extra_at:comment_at], size, packed, header)
    if method or packed != size or flags & _ENCRYPTED:
        raise ArchiveError(f"record {quote(name)} must be stored uncompressed")
    offset, checksum_offset = _content(file, header, directory[name_at:extra_at], size, flags)
    stated = (directory_start + at + _CHECKSUM_AT, checksum_offset)
    file.seek(checksum_offset)
    if offset + size > directory_start or file.read(4) != directory[at + _CHECKSUM_AT : at + _CHECKSUM_AT + 4]:
        raise ArchiveError(f"record {quote(name)} is not where the directory says")
    return Record(name, size, offset, stated), following


def _content(file: BinaryIO, header: int, name: bytes, size: int, flags: int) -> tuple[int, int]:
    """Where a record's bytes start, and where their checksum is beside them; the record must have that name."""
    local = _unpack(_LOCAL, file, header, b"PK\x03\x04")
    offset = header + _LOCAL.size + local[-2] + local[-1]
    if file.read(len(name)) != name or local[-2] != len(name):
        raise ArchiveError(f"record {quote(name.decode('utf-8', 'replace'))} has another name than in the directory")
    if not flags & _HAS_DESCRIPTOR:
        return offset, header + _LOCAL_CHECKSUM_AT
    _unpack(_DESCRIPTOR, file, offset + size, b"PK\x07\x08")
    return offset, offset + size + 4


def _widened(extra: bytes, *values: int) -> Iterator[int]:
    """Sizes and offset of an entry; those too large for 32 bits stand in its extra field 1, in this order."""
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
    """Each record has its bytes for itself, so that a changed offset cannot give one tensor another's values."""
    end = 0
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < end:
            raise ArchiveError(f"record {quote(record.name)} overlaps another one")
        end = record.offset + record.size


def _unpack(layout: struct.Struct, file: BinaryIO, offset: int, signature: bytes) -> tuple[int, ...]:
    """The fields at `offset`; the first is the signature, which is checked."""
    content = b""
    if 0 <= offset < 2**63 - layout.size:
        file.seek(offset)
        content = file.read(layout.size)
    if len(content) < layout.size or content[:4] != signature:
        raise ArchiveError("a part of the zip archive is not in its place")
    return layout.unpack(content)


def _peek(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(4)

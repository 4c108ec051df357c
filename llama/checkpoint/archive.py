"""Safe listing of the records in a `.pth` file, which is a zip archive.

`torch.save` writes records uncompressed, so that tensors can be memory-mapped: `NAME/data.pkl`, a pickle that
describes the tensors; `NAME/data/N`, their values; and a few small records. Oversized records are refused before torch
reads them, and so are compressed ones, which can expand from kilobytes to gigabytes.

Format: PKWARE's APPNOTE.TXT, section 4.3, restricted to what torch writes: the directory is right before the end
record, and nothing follows that. So torch's reader and Python's, which parses the directory here, see the same one.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llama.errors import quote

MAX_PICKLE_BYTES = 4 * 1024**2  # 20 times the size of the pickle in the released 70B
_MAX_SMALL_BYTES = 64 * 1024  # for any other record without tensor values
_MAX_DIRECTORY_BYTES = 4 * 1024**2

_END = struct.Struct("<4s4H2LH")  # signature, disks, entries on disk and total, directory size and offset, comment
_END_64_LOCATOR = struct.Struct("<4sLQL")  # signature, disk, offset of the 64-bit end record, disks
_END_64 = struct.Struct("<4sQ2H2L4Q")  # the 64-bit version of _END
_LOCAL = struct.Struct("<4s22x2H")  # header in front of a record's content: signature, sizes of name and extra field
_DESCRIPTOR = struct.Struct("<4sL")  # after the content, if the checksum was not known when the header was written
_ENTRY_BYTES = 46  # of a directory entry, without name, extra field and comment
_CHECKSUM_AT, _LOCAL_CHECKSUM_AT = 16, 14  # byte offsets in a directory entry and in a local header
_ENCRYPTED, _HAS_DESCRIPTOR, _IS_UTF8 = 1, 8, 2048  # bits of an entry's flags


class ArchiveError(ValueError):
    """The file is not an archive in the form that `torch.save` writes."""


@dataclass(frozen=True)
class Record:
    """A record of the archive; sizes and offsets are in bytes."""

    name: str  # starts with the archive's own name
    size: int
    offset: int  # of the content, in the file
    checksum: int  # CRC-32 of the content; 0 in files without checksums
    checksum_offsets: tuple[int, int]  # the two places in the file that hold it


def read_records(path: Path) -> list[Record]:
    """Returns the archive's records, after checking that they are uncompressed, within the file and within the limits.

    Raises:
        ArchiveError: a check failed, or the file is damaged; the message names the record, not the file.
    """
    with path.open("rb") as file:
        start, entries = _read_directory(file)
        records: dict[str, Record] = {}
        at = start
        for entry in entries:
            record = _read_record(file, entry, at, start)
            if record.name.lower() in records:  # torch's reader ignores case
                raise ArchiveError(f"record names must be unique, got two records named {quote(record.name)}")
            records[record.name.lower()] = record
            at += _ENTRY_BYTES + len(_raw_name(entry)) + len(entry.extra) + len(entry.comment)
    _check_layout(list(records.values()))
    return list(records.values())


def read_entries(path: Path) -> list[zipfile.ZipInfo]:
    """Returns the entries of the archive's directory, at least one, reading only the end of the file.

    Raises:
        ArchiveError: the file is damaged or cut short.
    """
    with path.open("rb") as file:
        return _read_directory(file)[1]


def check_pickles(path: Path) -> None:
    """Raises ArchiveError if the pickle that describes the tensors is damaged or could allocate unbounded memory.

    Damage is found by the checksum, if the file has one (see `torch.serialization.set_crc32_options`). torch's
    restricted unpickler runs no code from the file, but allocates byte arrays of any size that the file asks for.
    """
    with path.open("rb") as file:
        for record in filter(lambda record: _is_pickle(record.name), read_records(path)):
            content = _read(file, record.offset, record.size)
            if record.checksum and record.checksum != zlib.crc32(content):
                raise ArchiveError(f"record {quote(record.name)} does not match its checksum")
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                    raise ArchiveError("its pickle must not create a byte array, which can take any amount of memory")


def _is_pickle(name: str) -> bool:
    return name.lower().endswith("/data.pkl")


def _read_directory(file: BinaryIO) -> tuple[int, list[zipfile.ZipInfo]]:
    """Returns the directory's byte offset and its entries."""
    if _read(file, 0, 2) != b"PK":
        raise ArchiveError("it must be a zip archive, as torch.save writes since torch 1.6")
    end_at = file.seek(0, io.SEEK_END) - _END.size
    n_entries, directory_size, start, comment_size = _unpack(_END, file, end_at, b"PK\x05\x06")[4:]
    directory_end = end_at
    locator_at = end_at - _END_64_LOCATOR.size
    if locator_at >= 0 and _read(file, locator_at, 4) == b"PK\x06\x07":
        directory_end = _unpack(_END_64_LOCATOR, file, locator_at, b"PK\x06\x07")[2]
        if directory_end != locator_at - _END_64.size:
            raise ArchiveError("the end record is out of place")
        n_entries, directory_size, start = _unpack(_END_64, file, directory_end, b"PK\x06\x06")[7:]
    if comment_size or start + directory_size != directory_end:
        raise ArchiveError("the directory is out of place")
    if directory_size > _MAX_DIRECTORY_BYTES or n_entries * _ENTRY_BYTES > directory_size:
        raise ArchiveError(f"a directory of {n_entries} records in {directory_size} bytes is not possible")
    try:
        entries = zipfile.ZipFile(file).infolist()
    except Exception as error:  # of many kinds, over a damaged file
        raise ArchiveError("an entry of the directory is damaged") from error
    if not entries or len(entries) != n_entries:  # torch's reader goes by the number, Python's by the size
        raise ArchiveError("the directory is empty or does not have the size that its end record states")
    return start, entries


def _read_record(file: BinaryIO, entry: zipfile.ZipInfo, entry_at: int, directory_start: int) -> Record:
    """Returns the record of a directory entry, after comparing it with the record's own header."""
    name, size, flags = entry.filename, entry.file_size, entry.flag_bits
    if entry.compress_type or entry.compress_size != size or flags & _ENCRYPTED:
        raise ArchiveError(f"record {quote(name)} must be stored uncompressed")
    _, name_size, extra_size = _unpack(_LOCAL, file, entry.header_offset, b"PK\x03\x04")
    if file.read(name_size) != _raw_name(entry):
        raise ArchiveError(f"record {quote(name)} has a different name in its local header")
    offset = entry.header_offset + _LOCAL.size + name_size + extra_size
    checksum_at = entry.header_offset + _LOCAL_CHECKSUM_AT
    if flags & _HAS_DESCRIPTOR:
        _unpack(_DESCRIPTOR, file, offset + size, b"PK\x07\x08")
        checksum_at = offset + size + 4
    if offset + size > directory_start or _read(file, checksum_at, 4) != entry.CRC.to_bytes(4, "little"):
        raise ArchiveError(f"record {quote(name)} is not where the directory says")
    return Record(name, size, offset, entry.CRC, (entry_at + _CHECKSUM_AT, checksum_at))


def _raw_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & _IS_UTF8 else "cp437")


def _check_layout(records: list[Record]) -> None:
    """Checks each record's size, and that none overlap: a changed offset cannot give a tensor another one's values."""
    values, end = records[0].name.partition("/")[0] + "/data/", 0
    for record in sorted(records, key=lambda record: record.offset):
        limit = MAX_PICKLE_BYTES if _is_pickle(record.name) else _MAX_SMALL_BYTES
        if not record.name.startswith(values) and record.size > limit:
            raise ArchiveError(f"record {quote(record.name)} must have at most {limit} bytes, got {record.size}")
        if record.offset < end:
            raise ArchiveError(f"record {quote(record.name)} must not overlap another record")
        end = record.offset + record.size


def _unpack(layout: struct.Struct, file: BinaryIO, offset: int, signature: bytes) -> tuple[int, ...]:
    """Returns the fields at `offset`, after checking that the first one is `signature`."""
    content = _read(file, offset, layout.size) if 0 <= offset < 2**63 - layout.size else b""
    if len(content) < layout.size or content[:4] != signature:
        raise ArchiveError("a part of the zip archive is missing or out of place")
    return layout.unpack(content)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)

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
from collections.abc import Iterator
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
_ENTRY_BYTES = 46  # of a directory entry, without name, extra field and comment
_DESCRIPTOR, _HAS_DESCRIPTOR = b"PK\x07\x08", 8  # what follows a record's content before its checksum; the flag for it
_CHECKSUM_AT, _DESCRIPTOR_CHECKSUM_AT = 16, 4  # byte offsets in a directory entry, and after a record's content


class ArchiveError(ValueError):
    """The file is not an archive in the form that `torch.save` writes."""


@dataclass(frozen=True)
class Record:
    """A record of the archive; sizes and offsets are in bytes."""

    name: str  # starts with the archive's own name
    size: int
    offset: int  # of the content, in the file
    checksum: int  # CRC-32 of the content; 0 in files without checksums


def read_records(path: Path) -> list[Record]:
    """Returns the archive's records, after checking that they are uncompressed, within the file and within the limits.

    Raises:
        ArchiveError: a check failed, or the file is damaged; the message names the record, not the file.
    """
    with path.open("rb") as file:
        archive = _read_directory(file)
        records = [_read_record(file, archive, entry) for entry in archive.infolist()]
    _check_layout(records, archive.start_dir)
    return records


def checksum_offsets(path: Path, records: list[Record]) -> Iterator[tuple[int, int]]:
    """Yields for each record the two places in a file, written by torch, that hold its checksum."""
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir
        for entry, record in zip(archive.infolist(), records, strict=True):
            yield at + _CHECKSUM_AT, record.offset + record.size + _DESCRIPTOR_CHECKSUM_AT
            at += _ENTRY_BYTES + len(entry.filename.encode()) + len(entry.extra)


def read_entries(path: Path) -> list[zipfile.ZipInfo]:
    """Returns the entries of the archive's directory, at least one, reading only the end of the file.

    Raises:
        ArchiveError: the file is damaged or cut short.
    """
    with path.open("rb") as file:
        return _read_directory(file).infolist()


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


def _read_directory(file: BinaryIO) -> zipfile.ZipFile:
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
        archive = zipfile.ZipFile(file)
    except Exception as error:  # of many kinds, over a damaged file
        raise ArchiveError("an entry of the directory is damaged") from error
    if not n_entries or len(archive.infolist()) != n_entries:  # torch's reader goes by the number, Python's by the size
        raise ArchiveError("the directory is empty or does not have the size that its end record states")
    return archive


def _read_record(file: BinaryIO, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Record:
    name, size = entry.filename, entry.file_size
    if entry.compress_type or entry.compress_size != size:
        raise ArchiveError(f"record {quote(name)} must be stored uncompressed")
    try:
        with archive.open(entry):  # compares the entry with the record's own header
            offset = file.tell()
    except Exception as error:  # of many kinds, over a damaged file
        raise ArchiveError(f"record {quote(name)} is not what the directory says") from error
    # torch writes the checksum after the content too, which shows that this starts where the header says.
    after = _DESCRIPTOR + entry.CRC.to_bytes(4, "little")
    if entry.flag_bits & _HAS_DESCRIPTOR and _read(file, offset + size, len(after)) != after:
        raise ArchiveError(f"record {quote(name)} is not what the directory says")
    return Record(name, size, offset, entry.CRC)


def _check_layout(records: list[Record], directory_start: int) -> None:
    """Checks each record's name and size, and that none overlap: no changed offset gives a tensor another's values."""
    values, end = records[0].name.partition("/")[0] + "/data/", 0
    names: set[str] = set()
    for record in sorted(records, key=lambda record: record.offset):
        limit = MAX_PICKLE_BYTES if _is_pickle(record.name) else _MAX_SMALL_BYTES
        if not record.name.startswith(values) and record.size > limit:
            raise ArchiveError(f"record {quote(record.name)} must have at most {limit} bytes, got {record.size}")
        if record.offset < end or record.offset + record.size > directory_start:
            raise ArchiveError(f"record {quote(record.name)} must not overlap another record or the directory")
        end = record.offset + record.size
        if record.name.lower() in names:  # torch's reader ignores case
            raise ArchiveError(f"record names must be unique, got two records named {quote(record.name)}")
        names.add(record.name.lower())


def _unpack(layout: struct.Struct, file: BinaryIO, offset: int, signature: bytes) -> tuple[int, ...]:
    """Returns the fields at `offset`, after checking that the first one is `signature`."""
    content = _read(file, offset, layout.size) if 0 <= offset < 2**63 - layout.size else b""
    if len(content) < layout.size or content[:4] != signature:
        raise ArchiveError("a part of the zip archive is missing or out of place")
    return layout.unpack(content)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)

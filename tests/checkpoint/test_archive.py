"""The zip archive of a `.pth` file, against Python's own zip reader; and what of hostile archives is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from llama.checkpoint.archive import ArchiveError, check_pickles, read_entries, read_records

MIB = 1024**2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three tensors."""
    path = tmp_path / "consolidated.00.pth"
    torch.save({f"t{i}": torch.arange(100.0 * i) for i in range(1, 4)}, path)
    return path


def rewrite(path: Path, changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> None:
    """The same archive with some records replaced, added or (None) left out, all written with `method`."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in (content | changes).items():
            if data is not None:
                archive.writestr(name, data)


@pytest.mark.parametrize("writer", ["torch", "zipfile"])
def test_records_are_those_that_pythons_reader_finds(path: Path, writer: str) -> None:
    if writer == "zipfile":
        rewrite(path, {})
    content = path.read_bytes()
    records = read_records(path)
    with zipfile.ZipFile(path) as archive:
        assert [record.name for record in records] == archive.namelist()
        for record in records:
            data = archive.read(record.name)
            assert content[record.offset : record.offset + record.size] == data
            assert record.checksum == archive.getinfo(record.name).CRC
    assert len(read_entries(path)) == len(records)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records_are_refused(path: Path, method: int) -> None:
    """A few kilobytes of them can unpack to gigabytes."""
    rewrite(path, {}, method)
    with pytest.raises(ArchiveError, match="must be stored uncompressed"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "size", "limit"),
    [
        ("data.pkl", 4 * MIB + 1, 4 * MIB),
        ("DATA.PKL", 4 * MIB + 1, 4 * MIB),  # torch finds records whatever their case
        ("byteorder", 65537, 65536),
        ("version", 65537, 65536),
        (".data/serialization_id", 65537, 65536),
        ("other", 65537, 65536),
    ],
)
def test_records_without_tensors_may_not_be_large(path: Path, name: str, size: int, limit: int) -> None:
    old = "consolidated.00/data.pkl" if name == "DATA.PKL" else f"consolidated.00/{name}"
    rewrite(path, {old: None, f"consolidated.00/{name}": bytes(size)})
    with pytest.raises(ArchiveError, match=f"{name}' must have at most {limit} bytes, got {size}"):
        read_records(path)


def test_two_records_of_one_name_are_refused(path: Path) -> None:
    """Two readers might take different ones."""
    rewrite(path, {"consolidated.00/DATA.pkl": b"other"})
    with pytest.raises(ArchiveError, match="got two records named"):
        read_records(path)


@pytest.mark.parametrize("where", ["in front", "behind"])
def test_bytes_around_the_archive_are_refused(path: Path, where: str) -> None:
    """Readers differ in what they skip, so that one could see other records than the other."""
    content = path.read_bytes()
    path.write_bytes(b"PK" + bytes(98) + content if where == "in front" else content + bytes(10))
    with pytest.raises(ArchiveError):
        read_records(path)


def test_a_huge_directory_is_refused_before_it_is_read(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(50_000):
            archive.writestr(f"consolidated.00/{'x' * 60}{i}", b"")
    with pytest.raises(ArchiveError, match="directory of 50000 records"):
        read_records(path)


def test_byte_arrays_are_refused(tmp_path: Path) -> None:
    """Their size is a number in the pickle: a file of 300 bytes can ask for terabytes."""
    path = tmp_path / "x.pth"
    torch.save({"t": torch.ones(2)}, path)
    check_pickles(path)
    torch.save({"t": torch.ones(2), "b": bytearray(4)}, path)
    with pytest.raises(ArchiveError, match="byte array"):
        check_pickles(path)


def test_a_changed_pickle_shows_by_its_checksum(path: Path) -> None:
    """It could be well-formed still, and give a tensor another one's values."""
    content = bytearray(path.read_bytes())
    (record,) = (record for record in read_records(path) if record.name.endswith("data.pkl"))
    content[record.offset + record.size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="does not match its checksum"):
        check_pickles(path)


def test_a_file_without_checksums_is_read(path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"t": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    check_pickles(path)


def test_a_record_that_is_another_one_by_its_own_header_is_refused(path: Path) -> None:
    """The directory gives the first tensor the second one's place."""
    content = bytearray(path.read_bytes())
    entries = [content.rindex(b"consolidated.00/data/%d" % i) - 46 for i in (0, 1)]
    content[entries[0] + 42 : entries[0] + 46] = content[entries[1] + 42 : entries[1] + 46]
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="is not what the directory says"):
        read_records(path)


def test_any_changed_byte_of_a_header_gives_the_same_records_or_an_error(path: Path) -> None:
    """A header of another length shifts the values of a tensor, within the space between the records."""
    content, records = path.read_bytes(), read_records(path)
    (record,) = (record for record in records if record.name.endswith("data/1"))
    start = content.rindex(b"PK\3\4", 0, record.offset)
    directory = content.index(b"PK\1\2")
    refused = []
    for at in (*range(start, start + 30), *range(directory, len(content))):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            assert read_records(path) == records
        except ArchiveError as error:
            refused.append(str(error))
    assert len(refused) > 150 and all(message.isprintable() and len(message) < 300 for message in refused)

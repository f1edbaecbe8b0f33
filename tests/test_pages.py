"""Files that stand for much more memory than their bytes: refused before any of it is taken."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sealing import reseal_dataset
from toy_frames import toy_dataset

from pipeline.episodes import read_episodes
from pipeline.errors import UserError
from pipeline.order import RowRange
from pipeline.pages import page_sizes
from pipeline.schema import EPISODES_SCHEMA, ROW_GROUP_ROWS
from pipeline.source import Place, read_rows
from pipeline.store import FramesDataset
from pipeline.untrusted import parse_object

BOMB_BYTES = 1 << 30
FILE = "data/part-0.parquet"


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_pages_are_as_large_as_the_file_says_in_all(
    tmp_path: Path, version: str, use_dictionary: bool, compression: str
) -> None:
    """Of all kinds of pages that Arrow writes: their headers are walked to the end of every column."""
    random = np.random.default_rng(0)
    columns = {
        "number": random.integers(0, 900, 9000),
        "text": [None if i % 7 == 0 else "x" * (i % 50) for i in range(9000)],
    }
    path = tmp_path / "pages.parquet"
    options = {"data_page_version": version, "use_dictionary": use_dictionary, "compression": compression}
    pq.write_table(pa.table(columns), path, data_page_size=2000, write_page_checksum=True, **options)
    source = pa.OSFile(str(path))
    for number in range(2):
        chunk = pq.ParquetFile(path).metadata.row_group(0).column(number)
        sizes = list(page_sizes(source, chunk))
        assert len(sizes) > 2
        assert 0 < chunk.total_uncompressed_size - sum(sizes) < 100 * len(sizes)  # the headers


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def after_varint(content: bytes, at: int) -> int:
    return at + 1 if content[at] < 0x80 else after_varint(content, at + 1)


def plainly(unpacked: int, packed: int) -> bytes:
    """A page's two sizes as every writer puts them: fields 2 and 3, of 32 bits."""
    return b"\x15" + varint(2 * unpacked) + b"\x15" + varint(2 * packed)


def then_as_64_bits(unpacked: int, packed: int) -> bytes:
    """Field 2 once more, small, of a type that Arrow skips."""
    return b"\x15" + varint(2 * unpacked) + b"\x06" + varint(4) + varint(20) + b"\x15" + varint(2 * packed)


def under_a_number_of_17_bits(unpacked: int, packed: int) -> bytes:
    """A small field 2, then the large one as field 65538, of which Arrow keeps 16 bits."""
    large = b"\x05" + varint(2 * 65538) + varint(2 * unpacked)
    return b"\x15" + varint(20) + large + b"\x05" + varint(6) + varint(2 * packed)


Sizes = Callable[[int, int], bytes]


def plant_bomb(path: Path, sizes_of: Sizes = plainly) -> None:
    """Puts zeros, few bytes of sound zstd, into the place of the only page of obs; the footer stays true."""
    content = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(c for c in map(metadata.column, range(metadata.num_columns)) if c.path_in_schema == "obs")
    begin, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    kind_end = after_varint(content, begin + 1)
    sizes_end = after_varint(content, after_varint(content, kind_end + 1) + 1)
    assert content[begin] == content[kind_end] == 0x15  # an i32, the next field
    packed = pa.Codec("zstd").compress(bytes(BOMB_BYTES), asbytes=True)
    header_end = next(at for at in range(sizes_end, end) if content[at : at + 4] == b"\x28\xb5\x2f\xfd")  # zstd's sign
    size = end - header_end - 16  # 8 bytes of a frame that is skipped; longer sizes
    header = content[begin:kind_end] + sizes_of(BOMB_BYTES, size) + content[sizes_end:header_end]
    size = end - begin - len(header)
    header = content[begin:kind_end] + sizes_of(BOMB_BYTES, size) + content[sizes_end:header_end]
    skipped = b"\x50\x2a\x4d\x18" + (size - len(packed) - 8).to_bytes(4, "little")
    page = (header + packed + skipped).ljust(end - begin, b"\0")
    assert len(page) == end - begin
    path.write_bytes(content[:begin] + page + content[end:])


def noisy_dataset(folder: Path) -> FramesDataset:
    """One whose frames do not compress, so that there is room for a bomb in their place; without page checksums."""
    dataset = toy_dataset(folder, [600], height=84, width=84)
    table = pq.read_table(folder / FILE)
    pixels = np.random.default_rng(0).integers(0, 256, (600, 84 * 84), dtype=np.uint8)
    obs = pa.array([row.tobytes() for row in pixels], table.schema.field("obs").type)
    table = table.set_column(2, table.schema.field("obs"), obs)
    pq.write_table(table, folder / FILE, use_dictionary=False, compression="zstd", data_page_size=8 << 20)
    return dataset


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize(
    ("sizes_of", "complaint"),
    [
        (plainly, f"a page of obs takes {BOMB_BYTES} bytes, more than"),
        (then_as_64_bits, "a page's header names its fields in another order"),
        (under_a_number_of_17_bits, "a page's header names its fields in another order"),
    ],
)
def test_a_page_that_grows_when_it_is_unpacked(tmp_path: Path, sizes_of: Sizes, complaint: str) -> None:
    dataset = noisy_dataset(tmp_path / "data")
    plant_bomb(tmp_path / "data" / FILE, sizes_of)
    reseal_dataset(tmp_path / "data")
    before = peak_bytes()
    with pytest.raises(UserError, match=complaint):
        read_rows(Place.of(dataset), RowRange(FILE, 0, 10), ["obs"])
    [problem] = FramesDataset.open(dataset.uri).verify()
    assert complaint in problem
    assert peak_bytes() - before < BOMB_BYTES // 4


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (plainly(10, (1 << 32) + 10), "says no size"),  # of which Arrow keeps 10, and reads on after them
        (plainly(10, 1_000), "leads out of its column"),
        (plainly((1 << 32) + 10, 10), "says no size"),
        (b"\x26" + varint(20) + b"\x15" + varint(20), "says no size"),  # of 64 bits
        (plainly(10, 10) + b"\x69\xf1" + varint(1 << 40), "does not end"),  # so many truths, of no byte each
    ],
)
def test_a_header_that_is_read_in_two_ways(header: bytes, complaint: str) -> None:
    content = b"\x15\x00" + header + b"\x00" + bytes(10)
    chunk = SimpleNamespace(data_page_offset=0, has_dictionary_page=False, total_compressed_size=len(content))
    with pytest.raises(ValueError, match=complaint):
        list(page_sizes(pa.BufferReader(content), chunk))


def test_a_row_group_without_end(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "data", [40])
    table = pq.read_table(tmp_path / "data" / FILE)
    table = pa.concat_tables([table] * 30)
    pq.write_table(table, tmp_path / "data" / FILE, use_dictionary=False)
    with pytest.raises(UserError, match=f"a row group has 1200 rows, more than {ROW_GROUP_ROWS}"):
        read_rows(Place.of(dataset), RowRange(FILE, 0, 10), ["obs"])


def test_a_table_of_episodes_with_one_long_text(tmp_path: Path) -> None:
    """Stored once and named a hundred thousand times."""
    dataset = toy_dataset(tmp_path / "data", [40])
    rows, name = 100_000, "x" * (1 << 20)
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [name])
    numbers = {
        field.name: np.ones(rows, field.type.to_pandas_dtype())
        for field in EPISODES_SCHEMA
        if field.name not in ("file", "split")
    }
    table = pa.table({field.name: numbers.get(field.name, texts) for field in EPISODES_SCHEMA})
    path = tmp_path / "data/meta/episodes.parquet"
    pq.write_table(table, path, store_schema=False)
    manifest = tmp_path / "data/meta/manifest.json"
    manifest.write_text(manifest.read_text().replace('"frames": 40', '"frames": 4000000'))
    reseal_dataset(tmp_path / "data")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="texts are longer than names can be"):
        _ = FramesDataset.open(dataset.uri).episodes


def test_a_table_of_episodes_whose_pages_are_moderate_but_many(tmp_path: Path) -> None:
    """Every row in a group of its own, with one long text, which takes few bytes."""
    row = {field.name: [1] for field in EPISODES_SCHEMA} | {"file": ["x" * (30 << 20)], "split": ["val"]}
    table, path = pa.table(row, EPISODES_SCHEMA), tmp_path / "episodes.parquet"
    with pq.ParquetWriter(path, EPISODES_SCHEMA, compression="zstd") as writer:
        for _ in range(9):
            writer.write_table(table)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"pages take 28\d{7} bytes, more than all of it can"):
        read_episodes(path.read_bytes(), 1_000)


def test_json_of_nothing_but_brackets() -> None:
    with pytest.raises(UserError, match="18000009 bytes, more than the 16777216"):
        parse_object(b'{"a": [' + b"[]," * 6_000_000 + b"0]}"[:2], "it")


def test_a_long_header_is_read_to_its_end() -> None:
    header = b"\x15\x00" + plainly(20, 10) + b"\x18" + varint(5_000) + bytes(5_000) + b"\x00"  # as of long statistics
    content = (header + bytes(10)) * 2
    chunk = SimpleNamespace(data_page_offset=0, has_dictionary_page=False, total_compressed_size=len(content))
    assert list(page_sizes(pa.BufferReader(content), chunk)) == [20, 20]

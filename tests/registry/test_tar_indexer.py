"""What is in a tar is the same whoever looks: the pass that stores it, a walk over its headers, or a feed of any pieces.

`HOSTILE` has the rows of tars that no layer may be; the tests of the endpoints push them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.errors import LayerTarInvalid
from kitspec.layer_tar import DEPTH_MAX, PAX_SIZE_MAX, TRAILER, format_member, format_padding
from registry import tar_indexer
from registry.member_table import MemberTable
from registry.tar_indexer import PassIndexer, TarIndexer, walk_tar
from storage_backends.interface import StorageUnavailable
from tests.kitspec.test_layer_tar import extension, header, member, record
from tests.registry.kits import tar_of


def sized(size: int) -> bytes:
    return b"%011o\0" % size


def with_path(path: bytes) -> bytes:
    return extension(b"x", record(b"path", path)) + header() + TRAILER


HOSTILE: Mapping[str, tuple[bytes, str]] = {
    "T_03_an_absolute_link": (header(typeflag=b"2", link=b"/etc/passwd") + TRAILER, "a symbolic link"),
    "T_03_a_link_that_leads_out": (header(typeflag=b"2", link=b"../../x") + TRAILER, "a symbolic link"),
    "T_03_a_link_inside": (member("a", b"1") + header(typeflag=b"2", link=b"a") + TRAILER, "a symbolic link"),
    "T_04_a_chain_of_links": (
        header(b"current", typeflag=b"2", link=b".")
        + header(b"parent", typeflag=b"2", link=b"current/..")
        + TRAILER,
        "a symbolic link",
    ),
    "T_05_a_long_chain_of_links": (
        b"".join(
            header(b"%x" % step, typeflag=b"2", link=b"/".join([b"%x" % (step - 1)] * 16))
            for step in range(1, 17)
        )
        + TRAILER,
        "a symbolic link",
    ),
    "T_09_a_hard_link": (header(typeflag=b"1", link=b"a") + TRAILER, "a hard link"),
    "T_09_a_character_device": (header(typeflag=b"3") + TRAILER, "a character device"),
    "T_09_a_block_device": (header(typeflag=b"4") + TRAILER, "a block device"),
    "T_09_a_fifo": (header(typeflag=b"6") + TRAILER, "a FIFO"),
    "T_09_a_contiguous_file": (header(typeflag=b"7") + TRAILER, "a contiguous file"),
    "T_09_a_sparse_file": (header(typeflag=b"S") + TRAILER, "a sparse file"),
    "T_09_a_sparse_file_of_pax": (
        extension(b"x", record(b"GNU.sparse.major", b"1")) + header() + TRAILER,
        "a sparse file",
    ),
    "T_09_a_volume": (header(typeflag=b"M") + TRAILER, "multi-volume"),
    "T_09_an_unknown_type": (header(typeflag=b"Z") + TRAILER, "unknown type"),
    "T_12_an_escape": (member("a", b"1") + header(b"../x") + TRAILER, "leads out"),
    "T_12_an_absolute_path": (header(b"/etc/passwd") + TRAILER, "the absolute path"),
    "T_12_a_nul": (header(b"safe\0/../evil") + TRAILER, "a NUL inside the name"),
    "T_12_a_newline": (header(b"a\nb") + TRAILER, "a control character"),
    "T_12_an_escape_sequence": (header(b"\x1b[31mred") + TRAILER, "a control character"),
    "T_12_text_turned_around": (header("a\u202etxt.exe".encode()) + TRAILER, "a control character"),
    "T_12_no_utf_8": (header(b"caf\xe9") + TRAILER, "not UTF-8"),
    "T_12_a_long_component": (with_path(b"a" * 256), "a component of more than 255 bytes"),
    "T_12_a_long_path": (with_path(b"/".join([b"a" * 255] * 16) + b"/b"), "a path of 4097 bytes"),
    "T_12_a_deep_path": (with_path(b"/".join([b"a"] * (DEPTH_MAX + 872))), "a path of 1000 components"),
    "T_20_no_tar": (b"no tar at all" * 100, "not an octal checksum"),
    "T_20_nothing": (b"", "cut off after 0 bytes"),
    "T_20_a_wrong_checksum": (b"X" + header()[1:] + TRAILER, "wrong checksum"),
    "T_20_a_header_cut_off": (header()[:300], "cut off"),
    "T_20_a_body_cut_off": (member("f", bytes(5000))[:3000], "cut off"),
    "T_20_no_end": (member("f", bytes(5000)), "cut off"),
    "T_20_a_negative_size": (header(size=b"-0000000001\0") + TRAILER, "not an octal size"),
    "T_20_a_negative_base_256_size": (header(size=b"\xff" * 12) + TRAILER, "not an octal size"),
    "T_20_an_octal_size_that_is_none": (header(size=b"00000000008\0") + TRAILER, "not an octal size"),
    "T_20_a_huge_size": (header(size=b"\x80" + b"\x7f" * 11) + TRAILER, "beyond 2^63"),
    "T_20_the_hugest_size": (header(size=b"\x80\0\0\0\x7f" + b"\xff" * 7) + TRAILER, "cut off"),
    "T_20_data_behind_the_end": (header() + TRAILER + header() + TRAILER, "data behind the end"),
    "T_20_data_behind_one_block": (
        header() + bytes(512) + header() + TRAILER,
        "data behind a block of zeros",
    ),
    "T_20_endless_padding": (header() + TRAILER + bytes(1024 * 1024 + 512), "more than 1048576 bytes behind"),
    "T_21_a_global_path": (
        extension(b"g", record(b"path", b"x")) + header() + TRAILER,
        "a global extended header",
    ),
    "T_21_two_paths": (
        extension(b"x", record(b"path", b"a") + record(b"path", b"b")) + header() + TRAILER,
        "gives 'path' twice",
    ),
    "T_21_two_long_names": (
        extension(b"x", record(b"path", b"a")) + extension(b"L", b"b\0") + header() + TRAILER,
        "two long names",
    ),
    "T_21_a_wrong_length": (extension(b"x", b"99 path=a\n") + header() + TRAILER, "a broken record"),
    "T_21_a_path_that_is_no_utf_8": (with_path(b"\xff\xfe"), "not UTF-8"),
    "T_21_a_size_that_is_none": (extension(b"x", record(b"size", b"-1")) + header() + TRAILER, "not a size"),
    "T_33_a_large_extended_header": (
        header(typeflag=b"x", size=sized(PAX_SIZE_MAX + 1)) + TRAILER,
        "an extended header of 1048577 bytes",
    ),
    "T_33_a_large_long_name": (
        header(typeflag=b"L", size=sized(256 * 1024 * 1024)) + TRAILER,
        "an extended header of 268435456 bytes",
    ),
    "T_34_gzip": (gzip.compress(b"x" * 5000, mtime=0), "gzip"),
    "T_34_zstd": (b"\x28\xb5\x2f\xfd" + bytes(1000), "zstd"),
    "two_files_of_one_path": (
        tar_of({"a": b"1"})[:-1024] + tar_of({"a": b"1"}),
        "two members are called 'a'",
    ),
    "a_file_and_a_folder_of_one_path": (member("a") + header(b"a/", typeflag=b"5") + TRAILER, "two members"),
    "a_folder_with_content": (header(typeflag=b"5", size=sized(5)) + bytes(512) + TRAILER, "has content"),
    "a_file_that_is_the_root": (header(b".") + TRAILER, "names the root"),
}


class Stored:
    """A layer, and how much of it was read."""

    def __init__(self, layer: bytes) -> None:
        self.layer = layer
        self.read_size = 0

    def read_at(self, offset: int, size: int) -> bytes:
        assert 0 <= offset < len(self.layer)
        assert size > 0
        piece = self.layer[offset : offset + size]
        self.read_size += len(piece)
        return piece


def fed(layer: bytes, cuts: Sequence[int] = (), *, hash_members: bool = False) -> MemberTable:
    indexer = TarIndexer(hash_members=hash_members)
    for piece in pieces_of(layer, cuts):
        indexer.feed(piece)
    assert indexer.size == len(layer)
    return indexer.finish().build(inflated_size=len(layer))


def pieces_of(layer: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    edges = [0, *sorted(min(cut, len(layer)) for cut in cuts), len(layer)]
    return (layer[start:stop] for start, stop in pairwise(edges))


def passed(layer: bytes, cuts: Sequence[int] = ()) -> MemberTable | None:
    indexer = PassIndexer()
    for piece in pieces_of(layer, cuts):
        indexer.observe(piece)
    assert indexer.offset == len(layer)
    return indexer.table()


# ---- the same whoever looks

NAMES = st.text("ab é.", min_size=1, max_size=8).filter(lambda name: name not in {".", ".."})
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
CONTENTS = st.none() | st.binary(max_size=1500) | st.integers(0, 200_000).map(bytes)


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Tars as several writers make them: folders that are listed twice, the root, long names, one block at the end."""
    form = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, None]))
    found: dict[str, bytes | None] = draw(st.dictionaries(PATHS, CONTENTS, max_size=6))
    members = (
        [("." * draw(st.integers(0, 1)) or "a", None)] if draw(st.booleans()) and "a" not in found else []
    )
    members += [*found.items()]
    members += [(path, None) for path, content in found.items() if content is None and draw(st.booleans())]
    stream = io.BytesIO()
    if form is None:
        for path, content in members:
            size = len(content or b"")
            if path != ".":
                stream.write(format_member(path, size=size, mode=0o640, is_directory=content is None))
                stream.write((content or b"") + format_padding(size))
        stream.write(draw(st.sampled_from([TRAILER, TRAILER[:512], bytes(10240)])))
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for path, content in members:
            info = tarfile.TarInfo(path)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size, info.mtime = len(content or b""), 1.5
            archive.addfile(info, io.BytesIO(content or b""))
    return stream.getvalue()


CUTS = st.lists(st.integers(0, 300_000), max_size=12)


@given(tars(), CUTS, st.sampled_from([512, 777, 4096, 64 * 1024]))
def test_a_table_is_the_same_from_the_pass_from_a_walk_and_from_any_pieces(
    layer: bytes, cuts: list[int], walk_size: int
) -> None:
    expected = fed(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_indexer, "_WALK_SIZE", walk_size)
        walked = walk_tar(Stored(layer).read_at, len(layer))

    for table in (fed(layer, cuts), passed(layer, cuts), walked):
        assert table is not None
        assert table.to_bytes() == expected.to_bytes()


@given(tars(), CUTS)
def test_a_table_says_what_the_standard_library_says(layer: bytes, cuts: list[int]) -> None:
    table = fed(layer, cuts, hash_members=True)

    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        expected = {
            info.name: (info.isdir(), info.mode, info.offset_data, info.size)
            for info in reversed([info for info in archive if info.name != "."])
        }
    assert {row.path: (row.is_folder, row.mode, row.offset, row.size) for row in table.members()} == expected
    for row in table.members():
        content = layer[row.offset : row.offset + row.size]
        assert row.digest == (None if row.is_folder else Digest.of(content))
    assert table.is_hashed


@given(tars())
def test_a_table_that_is_hashed_later_is_the_one_that_was_hashed_at_once(layer: bytes) -> None:
    table = walk_tar(Stored(layer).read_at, len(layer))

    for row in table.unhashed():
        table.set_digest(row.path, hashlib.sha256(layer[row.offset : row.offset + row.size]).digest())

    assert table.to_bytes() == fed(layer, hash_members=True).to_bytes()


@given(tars())
def test_the_bytes_from_the_start_of_a_member_to_its_end_are_the_member_alone(layer: bytes) -> None:
    for row in fed(layer).members():
        stop = row.offset + row.size + -row.size % 512
        (alone,) = fed(layer[row.start : stop] + TRAILER).members()
        assert (alone.path, alone.is_folder, alone.mode, alone.size) == (
            row.path, row.is_folder, row.mode, row.size,
        )  # fmt: skip


# ---- what no layer may be


@pytest.mark.parametrize(("layer", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tar_is_refused_by_all_and_stops_no_pass(layer: bytes, said: str) -> None:
    assert passed(layer) is None
    assert passed(layer, range(0, min(len(layer), 20_000), 100)) is None
    messages = set()
    for look in (lambda: walk_tar(Stored(layer).read_at, len(layer)), lambda: fed(layer)):
        with pytest.raises(LayerTarInvalid) as caught:
            look()
        messages.add(str(caught.value))
    if not said.endswith(("gzip", "zstd")):  # whose magic numbers are seen before: test_member_index.py
        assert all(said in message for message in messages)
    assert all(message.isascii() and message.isprintable() and len(message) < 1000 for message in messages)


@given(st.binary(max_size=3000), CUTS)
def test_whatever_is_stored_stops_no_pass(content: bytes, cuts: list[int]) -> None:
    table = passed(content, cuts)

    assert table is None or len(content) >= 512


@given(tars(), st.data())
def test_a_damaged_tar_is_seen_by_all_or_by_none(layer: bytes, data: st.DataObject) -> None:
    damaged = bytearray(layer)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, min(len(layer), 3000) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    layer = bytes(damaged)

    tables = [passed(layer), None, None]
    with contextlib.suppress(LayerTarInvalid):
        tables[1] = walk_tar(Stored(layer).read_at, len(layer))
    with contextlib.suppress(LayerTarInvalid):
        tables[2] = fed(layer)

    assert len({None if table is None else table.to_bytes() for table in tables}) == 1


# ---- what it costs


def test_a_walk_reads_headers_and_leaves_contents_out() -> None:
    size = 20 * 1024 * 1024
    stored = Stored(tar_of({"m/a": bytes(size), "m/b": bytes(size), "m/c": b""}))

    table = walk_tar(stored.read_at, len(stored.layer))

    assert [row.path for row in table.members()] == ["m", "m/a", "m/b", "m/c"]
    assert stored.read_size <= 4 * 64 * 1024


def test_a_pass_gives_up_on_many_small_members_and_goes_on_counting_bytes() -> None:
    small = tar_of({f"{number:04}": b"x" for number in range(200)})
    indexer = PassIndexer()

    indexer.observe(small)

    assert not indexer.is_watching
    assert indexer.offset == len(small)
    assert indexer.table() is None


def test_a_pass_keeps_on_with_many_members_that_are_large() -> None:
    content = bytes(128 * 1024)
    indexer = PassIndexer()

    for number in range(100):
        indexer.observe(member(f"{number:04}", content))
        assert indexer.is_watching
    indexer.observe(TRAILER)

    table = indexer.table()
    assert table is not None
    assert len(table) == 100


def test_a_pass_that_has_not_seen_the_end_has_no_table() -> None:
    indexer = PassIndexer()

    indexer.observe(member("a", b"1"))

    assert indexer.is_watching
    assert indexer.table() is None


# ---- a store that fails is not a tar that is broken


def test_a_stored_layer_that_ends_early_is_the_store_s_fault() -> None:
    layer = tar_of({"a": bytes(200_000)})

    with pytest.raises(StorageUnavailable, match="should have"):
        walk_tar(lambda offset, size: layer[: len(layer) // 2][offset : offset + size], len(layer))


def test_a_store_may_give_less_at_a_time_than_was_asked_for() -> None:
    layer = tar_of({"a": bytes(200_000), "b/c": b"1"})

    table = walk_tar(lambda offset, _: layer[offset : offset + 100], len(layer))

    assert table.to_bytes() == fed(layer).to_bytes()


def test_what_the_store_raises_goes_through_a_walk() -> None:
    def fail(offset: int, size: int) -> bytes:
        raise StorageUnavailable("not now")

    with pytest.raises(StorageUnavailable, match="not now"):
        walk_tar(fail, 1024)

"""What a layer's blob may become: regular files and folders below the target, whole and verified; or nothing."""

from __future__ import annotations

import asyncio
import functools
import gzip
import hashlib
import os
import resource
import stat
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from kitclient.archive import LayerPlan, extract
from kitclient.compression import LayerBroken, UnpackLimit, deflater
from kitclient.errors import ClientError
from kitclient.progress import Silence
from kitclient.staging import Existing, Staging
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, DigestInvalid, LayerTarInvalid, SizeInvalid
from kitspec.layer_tar import TRAILER
from kitspec.media_types import parse_layer_media_type
from tests.kitclient.tars import file_of, header, layer_tar, pax, record

MIB = 1024 * 1024


async def chunks_of(blob: bytes, size: int = 70_000) -> AsyncIterator[bytes]:
    for position in range(0, len(blob), size):
        yield blob[position : position + size]


def plan_of(
    blob: bytes, media_type: str = "application/vnd.kitops.modelkit.model.v1.tar", **details
) -> LayerPlan:
    layer_type = parse_layer_media_type(media_type)
    assert layer_type is not None
    return LayerPlan(Descriptor(media_type, Digest.of(blob), len(blob)), layer_type, **details)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "here" / "target"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def unpack(target: Path):
    return functools.partial(unpack_into, target)


async def unpack_into(
    target: Path,
    blob: bytes,
    plan: LayerPlan | None = None,
    *,
    served: bytes | None = None,
    limit=None,
    size=70_000,
):
    """Extract one blob and place it; the paths of the target afterwards."""
    plan = plan or plan_of(blob)
    with ThreadPoolExecutor(2) as threads:
        staging = await in_thread(Staging(target).__enter__)
        try:
            tree = await in_thread(lambda: staging.layer(plan.key))
            try:
                await extract(
                    plan,
                    chunks_of(blob if served is None else served, size),
                    tree,
                    limit=limit or UnpackLimit(10**9, 1000),
                    threads=threads,
                    progress=Silence(),
                )
            finally:
                await in_thread(tree.close)
            await in_thread(lambda: (tree.keep(), staging.place({plan.key: tree.members}, Existing.REFUSE)))
        finally:
            await in_thread(lambda: staging.__exit__(None, None, None))
    return sorted(str(path.relative_to(target)) for path in target.rglob("*"))


async def in_thread(work):
    return await asyncio.to_thread(work)


@pytest.fixture(autouse=True)
def nothing_is_left_beside(target: Path):
    yield
    assert list(target.parent.iterdir()) == [target]
    assert list(target.parent.parent.iterdir()) == [target.parent]


@pytest.mark.parametrize("size", [1, 511, 512, 70_000])
async def test_files_come_out_as_they_went_in(unpack, target: Path, size: int):
    blob = layer_tar([("a", None), ("a/naïve", b"x" * 1000), ("b", b""), ("a/c" * 60, b"long")])

    paths = await unpack(blob, size=size)

    assert {"a", "a/naïve", "b"} <= set(paths)
    assert (target / "a/naïve").read_bytes() == b"x" * 1000
    assert (target / ("a/c" * 60)).read_bytes() == b"long"


@pytest.mark.parametrize("compression", ["gzip", "gzip-fastest", "zstd"])
async def test_compressed_layers_come_out_as_they_went_in(unpack, target: Path, compression):
    content = os.urandom(3 * MIB)
    plain = layer_tar([("a", content)])
    stream = deflater(compression)
    assert stream is not None
    blob = stream.compress(plain) + stream.flush()
    media_type = f"application/vnd.kitops.modelkit.model.v1.tar+{compression.partition('-')[0]}"

    await unpack(blob, plan_of(blob, media_type, diff_id=Digest.of(plain)))

    assert (target / "a").read_bytes() == content


async def test_C_12_changed_bytes_of_the_same_length_leave_nothing(unpack, target: Path):
    blob = layer_tar([("a", b"right")])

    with pytest.raises(DigestInvalid):
        await unpack(blob, served=blob.replace(b"right", b"wrong"))

    assert list(target.iterdir()) == []


async def test_a_blob_that_is_longer_or_shorter_than_announced_leaves_nothing(unpack, target: Path):
    blob = layer_tar([("a", b"right")])

    for served in (blob + bytes(512), blob[:-512]):
        with pytest.raises(SizeInvalid):
            await unpack(blob, served=served)

    assert list(target.iterdir()) == []


LINKS = {
    "absolute": header(b"l", typeflag=b"2", link=b"/etc"),
    "relative": header(b"l", typeflag=b"2", link=b"../.."),
    "inside": header(b"l", typeflag=b"2", link=b"a"),
    "hard": header(b"l", typeflag=b"1", link=b"a"),
}


@pytest.mark.parametrize("link", LINKS)
async def test_T_03_links_are_refused(unpack, target: Path, link: str):
    with pytest.raises(LayerTarInvalid, match="link"):
        await unpack(file_of("a", b"1") + LINKS[link] + TRAILER)

    assert list(target.iterdir()) == []


async def test_T_04_a_chain_of_links_is_refused(unpack, target: Path):
    chain = header(b"current", typeflag=b"2", link=b".") + header(
        b"parent", typeflag=b"2", link=b"current/.."
    )

    with pytest.raises(LayerTarInvalid):
        await unpack(chain + file_of("parent/escape", b"1") + TRAILER)

    assert list(target.iterdir()) == []


async def test_T_05_links_longer_than_a_path_may_be_are_refused(unpack, target: Path):
    steps = b""
    for step in range(16):
        folder = "/".join(chr(97 + number) * 247 for number in range(step))
        steps += file_of(f"{folder}/{chr(97 + step) * 247}".lstrip("/"), None)
        steps += pax(record("path", f"{folder}/{step}".lstrip("/").encode())) + header(
            b"x", typeflag=b"2", link=b"d"
        )

    with pytest.raises(LayerTarInvalid):
        await unpack(steps + TRAILER)

    assert list(target.iterdir()) == []


@pytest.mark.parametrize("typeflag", [b"1", b"2", b"3", b"4", b"6", b"7", b"S", b"M", b"Z", b"K", b"s"])
async def test_T_09_only_files_and_folders_come_out(unpack, target: Path, typeflag: bytes):
    with pytest.raises(LayerTarInvalid):
        await unpack(file_of("a", b"1") + header(b"odd", typeflag=typeflag) + TRAILER)

    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "wanted"), [(0o6777, 0o755), (0, 0o644), (0o1777, 0o755), (0o444, 0o644), (0o100, 0o755)]
)
async def test_T_10_modes_are_0644_or_0755_under_the_umask(unpack, target: Path, mode: int, wanted: int):
    blob = file_of("a", b"1", mode=mode) + header(b"d", typeflag=b"5", mode=b"0006777\0") + TRAILER

    await unpack(blob)

    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((target / "a").stat().st_mode) == wanted & ~umask
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o755 & ~umask


NAMES = {
    "absolute": b"/etc/x",
    "dots": b"../x",
    "dots inside": b"a/../../x",
    "dots only": b"..",
    "control": b"a\x1b[2Jb",
    "newline": b"a\nb",
    "nul": b"a\0b",
    "right to left": "a\u202eb".encode(),
    "not utf-8": b"a\xff",
    "file at the root": b".",
    "long component": b"c" * 256,
    "long path": b"/".join([b"c" * 200] * 21),
    "deep": b"/".join([b"d"] * 1000),
}


@pytest.mark.parametrize("name", NAMES)
async def test_T_12_names_that_mislead_are_refused_with_an_escaped_message(unpack, target: Path, name: str):
    raw = NAMES[name]
    member = header(raw) if len(raw) <= 100 else pax(record("path", raw)) + header(b"x")

    with pytest.raises(LayerTarInvalid) as refusal:
        await unpack(member + TRAILER)

    assert str(refusal.value).isprintable()
    assert list(target.iterdir()) == []


BROKEN = {
    "checksum": header(b"a", checksum=1) + TRAILER,
    "truncated header": header(b"a")[:300],
    "truncated body": header(b"a", size=b"00000001000\0") + b"x",
    "negative size": header(b"a", size=b"\xff" * 12) + TRAILER,
    "octal garbage": header(b"a", size=b"0000000008x\0") + TRAILER,
    "huge base 256": header(b"a", size=b"\x80" + b"\xff" * 11) + TRAILER,
    "no end": file_of("a", b"1"),
    "data after the end": file_of("a", b"1") + TRAILER + b"x" * 512,
    "endless padding": file_of("a", b"1") + TRAILER + bytes(3 * MIB),
    "empty": b"",
}


@pytest.mark.parametrize("case", BROKEN)
async def test_T_20_broken_tars_leave_nothing(unpack, target: Path, case: str):
    with pytest.raises(LayerTarInvalid):
        await unpack(BROKEN[case])

    assert list(target.iterdir()) == []


async def test_T_20_one_block_of_zeros_at_the_end_is_enough(unpack):
    assert await unpack(file_of("a", b"1") + bytes(512)) == ["a"]


async def test_T_21_extended_headers_give_path_and_size_and_nothing_else(unpack, target: Path):
    records = (
        record("path", b"other")
        + record("size", b"3")
        + record("linkpath", b"/etc/passwd")
        + record("SCHILY.xattr.user.x", b"y")
        + record("uid", b"0")
    )
    blob = pax(records) + header(b"a", size=b"00000000000\0") + b"abc" + bytes(509) + TRAILER

    assert await unpack(blob) == ["other"]
    assert (target / "other").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "records",
    [
        record("path", b"a") + record("path", b"b"),
        b"99 path=a\n",
        record("path", b"\xff"),
        b"x",
        record("size", b"-1"),
        record("GNU.sparse.major", b"1"),
    ],
)
async def test_T_21_extended_headers_that_contradict_themselves_are_refused(
    unpack, target: Path, records: bytes
):
    with pytest.raises(LayerTarInvalid):
        await unpack(pax(records) + header(b"a") + TRAILER)

    assert list(target.iterdir()) == []


def bomb(start: bytes, count: int) -> bytes:
    """A gzip stream of `start` and `count` MiB of zeros: one MiB is compressed, and its bytes are repeated."""
    stream = zlib.compressobj(9, zlib.DEFLATED, 31)
    blob = stream.compress(start) + stream.flush(zlib.Z_FULL_FLUSH)
    return blob + (stream.compress(bytes(MIB)) + stream.flush(zlib.Z_FULL_FLUSH)) * count + stream.flush()


async def test_T_30_a_gzip_bomb_stops_at_the_ratio_and_leaves_nothing(unpack, target: Path):
    blob = bomb(header(b"a", size=b"%011o\0" % (300 * MIB)), 300)
    assert len(blob) < 320_000

    with pytest.raises(LayerBroken, match="--max-unpacked"):
        await unpack(blob, plan_of(blob, "application/vnd.kitops.modelkit.model.v1.tar+gzip"))

    assert list(target.iterdir()) == []


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_T_30_a_bomb_stops_at_the_number_of_bytes(unpack, target: Path, compression: str):
    plain = layer_tar([("a", bytes(20 * MIB))])
    blob = gzip.compress(plain) if compression == "gzip" else zstandard.compress(plain)

    with pytest.raises(LayerBroken, match="more than 10485760 bytes"):
        await unpack(
            blob,
            plan_of(blob, f"application/vnd.kitops.modelkit.model.v1.tar+{compression}"),
            limit=UnpackLimit(10 * MIB, None),
        )

    assert list(target.iterdir()) == []


def test_T_30_a_zstd_bomb_never_grows_the_memory(target: Path):
    # In a process of its own: what other tests have left in the allocator is none of its growth.
    script = f"""
import asyncio, pathlib
from tests.kitclient.test_archive import growth_by_a_zstd_bomb
print(asyncio.run(growth_by_a_zstd_bomb(pathlib.Path({str(target)!r}))))
"""
    root = Path(__file__).parents[2]

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )

    assert int(done.stdout) < 160 * 1024


async def growth_by_a_zstd_bomb(target: Path) -> int:
    """KiB that the process grows by."""
    blob = zstandard.ZstdCompressor().compress(bytes(256 * MIB))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises((LayerBroken, LayerTarInvalid)):
        await unpack_into(
            target, blob, plan_of(blob, "application/vnd.kitops.modelkit.model.v1.raw+zstd", path="a")
        )

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


async def test_T_32_a_wrong_diff_id_leaves_nothing(unpack, target: Path):
    plain = layer_tar([("a", b"1")])
    blob = gzip.compress(plain)

    for media_type, content in (("tar+gzip", blob), ("tar", plain)):
        plan = plan_of(
            content, f"application/vnd.kitops.modelkit.model.v1.{media_type}", diff_id=Digest.of(b"other")
        )
        with pytest.raises(LayerBroken, match="the kit says"):
            await unpack(content, plan)

    assert list(target.iterdir()) == []


@pytest.mark.parametrize("typeflag", [b"x", b"L", b"g"])
async def test_T_33_a_huge_extended_header_is_refused_without_being_read(
    unpack, target: Path, typeflag: bytes
):
    blob = bomb(header(b"x", typeflag=typeflag, size=b"%011o\0" % (256 * MIB)), 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(LayerTarInvalid, match="at most"):
        await unpack(blob, plan_of(blob, "application/vnd.kitops.modelkit.model.v1.tar+gzip"))

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("media_type", "blob", "words"),
    [
        ("tar", gzip.compress(layer_tar([("a", b"1")]), mtime=0), ("plain tar", "gzip")),
        ("tar", zstandard.compress(layer_tar([("a", b"1")])), ("plain tar", "zstd")),
        ("tar+gzip", layer_tar([("a", b"1")]), ("gzip", "not compressed")),
        ("tar+gzip", zstandard.compress(layer_tar([("a", b"1")])), ("gzip", "zstd")),
        ("tar+zstd", gzip.compress(layer_tar([("a", b"1")]), mtime=0), ("zstd", "gzip")),
    ],
)
async def test_T_34_a_media_type_that_lies_about_compression_is_named(
    unpack, target: Path, media_type, blob, words
):
    for size in (3, 70_000):
        with pytest.raises(LayerBroken) as refusal:
            await unpack(
                blob, plan_of(blob, f"application/vnd.kitops.modelkit.model.v1.{media_type}"), size=size
            )
        assert all(word in str(refusal.value) for word in words)

    assert list(target.iterdir()) == []


STREAMS = {
    "cut gzip": ("gzip", gzip.compress(layer_tar([("a", b"1")]))[:-9]),
    "trailing gzip": ("gzip", gzip.compress(layer_tar([("a", b"1")])) + b"garbage"),
    "many members": ("gzip", gzip.compress(b"") * 1001 + gzip.compress(layer_tar([("a", b"1")]))),
    "cut zstd": ("zstd", zstandard.compress(layer_tar([("a", os.urandom(9000))]))[:-9]),
    "trailing zstd": ("zstd", zstandard.compress(layer_tar([("a", b"1")])) + b"garbage"),
}


@pytest.mark.parametrize("case", STREAMS)
async def test_L_23_streams_that_end_early_go_on_or_are_many_are_refused(unpack, target: Path, case: str):
    compression, blob = STREAMS[case]

    with pytest.raises((LayerBroken, ContentInvalid)):
        await unpack(blob, plan_of(blob, f"application/vnd.kitops.modelkit.model.v1.tar+{compression}"))

    assert list(target.iterdir()) == []


async def test_L_23_a_window_beyond_128_mib_is_refused(unpack):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = stream.compress(layer_tar([("a", b"1")])) + stream.flush()

    with pytest.raises(LayerBroken, match="zstd"):
        await unpack(blob, plan_of(blob, "application/vnd.kitops.modelkit.model.v1.tar+zstd"))


async def test_gzip_of_several_members_is_one_stream(unpack):
    plain = layer_tar([("a", b"1")])
    blob = gzip.compress(plain[:700]) + gzip.compress(plain[700:])

    assert await unpack(blob, plan_of(blob, "application/vnd.kitops.modelkit.model.v1.tar+gzip")) == ["a"]


async def test_L_22_more_entries_than_a_kit_may_have_are_refused(unpack, monkeypatch):
    monkeypatch.setattr(UnpackLimit, "_ENTRIES_MAX", 3)

    with pytest.raises(LayerBroken, match="more than 3"):
        await unpack(layer_tar([(f"{number}", b"") for number in range(4)]))


async def test_a_raw_layer_is_one_file_at_its_path(unpack, target: Path):
    blob = b"\x1f\x8b any bytes at all"

    await unpack(
        blob, plan_of(blob, "application/vnd.kitops.modelkit.model.v1.raw", path="m/w.bin", mode=0o700)
    )

    assert (target / "m/w.bin").read_bytes() == blob
    assert (target / "m/w.bin").stat().st_mode & 0o100


async def test_an_old_layer_lands_below_the_folder_of_its_entry(unpack):
    blob = layer_tar([("w.bin", b"1")])

    assert await unpack(blob, plan_of(blob, path="models")) == ["models", "models/w.bin"]


async def test_one_path_twice_in_a_layer_is_refused(unpack, target: Path):
    for second in ("a", "./a", "a/b"):
        with pytest.raises(ClientError):
            await unpack(file_of("a", b"1") + header(second.encode()) + TRAILER)

    assert list(target.iterdir()) == []


async def test_a_layer_of_another_digest_algorithm_is_verified_too(unpack):
    blob = layer_tar([("a", b"right")])
    descriptor = Descriptor("x", Digest(f"sha512:{hashlib.sha512(blob).hexdigest()}"), len(blob))
    plan = LayerPlan(descriptor, plan_of(blob).layer_type, diff_id=Digest.of(blob))

    assert await unpack(blob, plan) == ["a"]
    with pytest.raises(DigestInvalid):
        await unpack(blob, plan, served=blob.replace(b"right", b"wrong"))

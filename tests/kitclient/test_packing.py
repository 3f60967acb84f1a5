"""A folder becomes the very bytes that kit writes, or an error; nothing in between."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import stat
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kitclient import source_tree
from kitclient.image_layout import LayoutRegistry
from kitclient.packing import Packed, PackRefused, PackStyle, creation_time, pack
from kitclient.source_tree import SourceInvalid
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.kitfile import Kitfile
from kitspec.layer_tar import LayerTarReader, Member
from kitspec.names import RepositoryName, Tag

GOLDEN_KITFILE = b"""
manifestVersion: "1.0.0"
package: {name: golden, version: 0.1.0, authors: ["A <a@x.org>", B]}
model: {name: w, path: ./models, parameters: {z: 1, a: {k: "v&w"}}}
datasets: [{name: t, path: data/t.csv}]
docs: [{path: docs/}]
"""
# The digests are what kit 1.7.0 made of the same files.
GOLDEN_LAYERS = [
    ("sha256:ae50621ff955a3c4944d028f8a06b980536e26b6361f551f12acbfbf34c102cc", 4096),
    ("sha256:0bd55136a31e0366ec65160de70eff3676eeb7b5295d1931772884ea8f09f948", 2560),
    ("sha256:c59b4eb2d9e27d89b99f5d5db286fa3693bd1fa29e06894d30c17c0cb5dfbcfd", 8192),
]
GOLDEN_CONFIG = ("sha256:4b97b46acbd6736357c793f43aceac950eafcdf4b0351beb883fa45fbadb9bc9", 764)
GOLDEN_MANIFEST = ("sha256:49925ce7a86946964692d440f0f75e8afa8999b7ffbc548219c2b894b209ee54", 722)
EMPTY_LAYER = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
OLD = PackStyle(form="1.7")
FIXED = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        target.write_bytes(content)
        target.chmod(0o644)
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "context"
    path.mkdir()
    return path


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LayoutRegistry]:
    async with LayoutRegistry(tmp_path / "store") as registry:
        yield registry


@pytest.fixture
def packed(folder: Path, store: LayoutRegistry):
    async def run(
        kitfile: bytes | str, *, style: PackStyle | None = None, warnings=None, **details
    ) -> Packed:
        content = Kitfile.from_yaml(kitfile.encode() if isinstance(kitfile, str) else kitfile)
        place = Place(store, RepositoryName("kit"))
        seen = warnings.append if warnings is not None else lambda _: None
        return await pack(
            folder, content, place, tags=(Tag("v1"),), style=style or OLD, warn=seen, created=FIXED, **details
        )

    return run


async def blob(store: LayoutRegistry, digest: str) -> bytes:
    async with store.open_blob(RepositoryName("kit"), Digest(digest)) as body:
        return b"".join([chunk async for chunk in body])


async def names(store: LayoutRegistry, packed: Packed) -> list[list[str]]:
    """The names in each layer."""
    found = []
    for layer, _ in packed.layers:
        content = await blob(store, layer.digest)
        found.append([event.path for event in LayerTarReader().feed(content) if isinstance(event, Member)])
    return found


def write_golden(folder: Path) -> None:
    write(
        folder,
        {
            "models/w.bin": b"hello weights\n",
            "models/sub/run.sh": b"#!/bin/sh\n",
            "data/t.csv": b"a,b\n1,2\n",
            "docs/naïve.md": b"x",
            "docs/empty": b"",
            f"docs/{60 * 'd'}/{60 * 'e'}/{40 * 'f'}.txt": b"long",
            f"docs/{120 * 'g'}.txt": b"pax",
        },
    )
    (folder / "models/sub/run.sh").chmod(0o755)


async def test_the_golden_kit_of_kit_1_7_comes_out_to_the_byte(folder: Path, packed):
    write_golden(folder)

    result = await packed(GOLDEN_KITFILE)

    assert [(layer.digest, layer.size) for layer, _ in result.layers] == GOLDEN_LAYERS
    assert (result.config.digest, result.config.size) == GOLDEN_CONFIG
    assert (result.manifest.digest, result.manifest.size) == GOLDEN_MANIFEST


async def test_a_kitfile_without_entries_gives_the_manifest_that_kit_1_7_gives(packed):
    result = await packed('manifestVersion: "1.0.0"')

    assert result.config.digest == "sha256:140e17e620f62380c7801047d14343caddbbfc87d97a2788f77e9a210843826c"
    assert result.manifest.digest == "sha256:553da412073cc6da11e1894b90890c1d692af6b3f4e56ed2bf9f23338bb21f21"


async def test_INV_C3_the_same_inputs_give_the_same_digest(folder: Path, packed, monkeypatch):
    write_golden(folder)
    first = await packed(GOLDEN_KITFILE, style=PackStyle())
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))

    second = await packed(GOLDEN_KITFILE, style=PackStyle())

    assert second.manifest == first.manifest
    assert [existed for _, existed in second.layers] == [True, True, True]


async def test_the_current_form_says_type_path_date_and_version(folder: Path, store: LayoutRegistry, packed):
    write(folder, {"m/w.bin": b"1"})

    result = await packed("model: {path: ./m/}", style=PackStyle())

    document = json.loads(await blob(store, result.manifest.digest))
    assert list(document) == ["schemaVersion", "mediaType", "artifactType", "config", "layers", "annotations"]
    assert document["artifactType"] == "application/vnd.kitops.modelkit.manifest.v1+json"
    assert document["layers"][0]["annotations"] == {"org.cncf.model.filepath": "m"}
    assert document["annotations"]["org.opencontainers.image.created"] == "2026-01-02T03:04:05Z"
    assert document["annotations"]["ml.kitops.modelkit.cli-version"].startswith("kitclient-")


def test_SOURCE_DATE_EPOCH_is_the_date_and_nothing_else_is():
    assert creation_time({"SOURCE_DATE_EPOCH": "86400"}) == dt.datetime(1970, 1, 2, tzinfo=dt.UTC)
    for text in ("x", "1.5", "-1", "²", "9" * 20):
        with pytest.raises(PackRefused, match="SOURCE_DATE_EPOCH"):
            creation_time({"SOURCE_DATE_EPOCH": text})


async def test_a_file_below_another_entry_stays_out_and_one_that_only_begins_alike_stays_in(
    folder: Path, store: LayoutRegistry, packed
):
    write(folder, {"a/b/y": b"1", "a/x": b"2", "top": b"3", "a-v2/z": b"4", "a.txt": b"5"})

    result = await packed("model: {path: a/b}\ncode: [{path: a}, {path: .}]")

    assert await names(store, result) == [
        ["a", "a/b", "a/b/y"],
        ["a", "a/x"],
        ["a-v2", "a-v2/z", "a.txt", "top"],
    ]


async def test_the_paths_of_a_parent_kit_stay_out(folder: Path, store: LayoutRegistry, packed):
    write(folder, {"base/w": b"1", "top": b"3"})

    result = await packed("model: {path: 'org/base:v1'}\ncode: [{path: .}]", parent_paths=["./base"])

    assert await names(store, result) == [["top"]]


async def test_ignored_files_and_kitfiles_stay_out(folder: Path, store: LayoutRegistry, packed):
    write(
        folder,
        {"d/a": b"1", "d/b.tmp": b"2", "d/keep.tmp": b"3", "s/x": b"4", ".DS_Store": b"5", "Kitfile": b"6"},
    )
    write(folder, {"kitfile": b"6", ".kitfile": b"6", "sub/Kitfile": b"7", "d/thumbs.DB": b"8"})
    write(folder, {".kitignore": b"# no\n**/*.tmp\n!d/keep.tmp\ns\n!.kitignore\n!Kitfile\n"})

    old = await packed("code: [{path: .}]")
    new = await packed("code: [{path: .}]", style=PackStyle())

    wanted = ["d", "d/a", "d/keep.tmp", "sub", "sub/Kitfile"]
    assert await names(store, new) == [wanted]
    assert await names(store, old) == [sorted([".DS_Store", *wanted, "d/thumbs.DB"])]


async def test_an_entry_that_is_ignored_gives_an_empty_layer_and_a_warning(folder: Path, packed):
    write(folder, {"w": b"1", ".kitignore": b"w\n"})
    warnings: list[str] = []

    result = await packed("model: {path: w}", warnings=warnings)

    assert result.layers[0][0].digest == EMPTY_LAYER
    assert any("ignored by .kitignore" in warning for warning in warnings)
    assert "No files detected in model layer with path w" in warnings


async def test_T_37_links_and_special_files_are_skipped_with_a_warning_and_never_waited_for(
    folder: Path, store: LayoutRegistry, packed
):
    write(folder, {"d/a": b"1", "outside": b"2"})
    (folder / "d/link").symlink_to("../outside")
    (folder / "d/folder").symlink_to("/etc")
    os.mkfifo(folder / "d/fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder / "d")
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    warnings: list[str] = []

    result = await packed("model: {path: d}\ncode: [{path: d/link}]", warnings=warnings)

    assert await names(store, result) == [["d", "d/a"], ["d"]]
    assert {
        "Skipping symlink d/link (symlinks are not supported)",
        "Skipping symlink d/folder (symlinks are not supported)",
        "Skipping special file d/fifo (special files are not supported)",
        "Skipping special file d/socket (special files are not supported)",
    } <= set(warnings)


def change_while_reading(monkeypatch, change) -> None:
    """Let `change` happen after the first piece of a file was read."""
    read = os.read
    pending = [change]

    def read_and_change(file: int, count: int) -> bytes:
        piece = read(file, min(count, 1000))
        if pending and piece:
            pending.pop()()
        return piece

    monkeypatch.setattr(source_tree.os, "read", read_and_change)


@pytest.mark.parametrize("size", [500, 4000, 5000])
async def test_T_37_a_file_that_changes_while_it_is_packed_is_an_error(
    folder: Path, packed, monkeypatch, size: int
):
    write(folder, {"w": b"x" * 4000})

    def change() -> None:
        with (folder / "w").open("r+b") as file:
            file.write(b"y")
            file.truncate(size)
        os.utime(folder / "w", (1, 1))

    change_while_reading(monkeypatch, change)

    with pytest.raises(SourceInvalid, match="while it was packed"):
        await packed("model: {path: w}")


@pytest.mark.parametrize("kind", ["gone", "link", "fifo", "other"])
async def test_T_37_a_file_that_is_replaced_between_listing_and_reading_is_an_error(
    folder: Path, packed, monkeypatch, kind: str
):
    write(folder, {"w": b"1234", "x": b"1234"})
    files = source_tree.SourceTree.files

    def list_then_replace(tree, path):
        listed = files(tree, path)
        (folder / "w").unlink()
        if kind == "link":
            (folder / "w").symlink_to("x")
        elif kind == "fifo":
            os.mkfifo(folder / "w")
        elif kind == "other":
            (folder / "x").rename(folder / "w")
        return listed

    monkeypatch.setattr(source_tree.SourceTree, "files", list_then_replace)

    with pytest.raises(SourceInvalid):
        await packed("model: {path: w}")


async def test_T_37_a_name_that_is_not_utf_8_is_an_error(folder: Path, packed):
    (folder / "d").mkdir()
    (folder / "d" / os.fsdecode(b"a\xff")).write_bytes(b"1")

    with pytest.raises(SourceInvalid, match="not UTF-8"):
        await packed("model: {path: d}")


async def test_T_37_files_with_two_names_are_packed_twice(folder: Path, store: LayoutRegistry, packed):
    write(folder, {"d/a": b"1"})
    os.link(folder / "d/a", folder / "d/b")

    assert await names(store, await packed("model: {path: d}")) == [["d", "d/a", "d/b"]]


async def test_T_37_a_sparse_file_is_packed_as_what_it_reads_as(folder: Path, store: LayoutRegistry, packed):
    with (folder / "w").open("wb") as file:
        file.truncate(30_000_000)

    result = await packed("model: {path: w}", style=PackStyle(packaging="raw"))

    assert result.layers[0][0].size == 30_000_000


async def test_what_is_missing_or_outside_is_an_error(packed):
    for path in ("nothere.bin", "a/b"):
        with pytest.raises(SourceInvalid, match=f"error processing model: path {path} does not exist"):
            await packed(f"model: {{path: {path}}}")
    with pytest.raises(SourceInvalid, match="outside"):
        await packed("model: {path: ../x}")


async def test_nothing_is_tagged_and_no_upload_is_left_when_a_pack_fails(
    folder: Path, tmp_path: Path, store: LayoutRegistry, packed
):
    write(folder, {"d/a": b"1"})

    with pytest.raises(SourceInvalid):
        await packed("model: {path: d}\ncode: [{path: nothere}]")

    assert [name async for name in store.repositories()] == []
    assert not [path for path in (tmp_path / "store/ingest").iterdir() if path.name.startswith("upload")]


@pytest.mark.parametrize("compression", ["gzip", "gzip-fastest", "zstd"])
async def test_compressed_layers_inflate_to_their_diff_id(
    folder: Path, store: LayoutRegistry, packed, compression
):
    write_golden(folder)

    result = await packed(GOLDEN_KITFILE, style=PackStyle(compression=compression))

    config = json.loads(await blob(store, result.config.digest))
    assert config["model"]["diffId"] == GOLDEN_LAYERS[0][0]
    assert config["model"]["digest"] == result.layers[0][0].digest
    suffix = "zstd" if compression == "zstd" else "gzip"
    assert result.layers[0][0].media_type == f"application/vnd.kitops.modelkit.model.v1.tar+{suffix}"
    if suffix == "gzip":
        start = await blob(store, result.layers[0][0].digest)
        assert (
            start[:10]
            == bytes.fromhex("1f8b080000000000") + (b"\4" if "fastest" in compression else b"\0") + b"\xff"
        )


async def test_a_raw_layer_is_the_file_and_says_what_it_was(folder: Path, store: LayoutRegistry, packed):
    write(folder, {"m/w.bin": b"raw bytes"})
    os.utime(folder / "m/w.bin", ns=(0, 1_500_000_000))

    result = await packed("model: {path: m/w.bin}", style=PackStyle(packaging="raw"))

    layer = result.layers[0][0]
    assert layer.media_type == "application/vnd.kitops.modelkit.model.v1.raw"
    assert await blob(store, layer.digest) == b"raw bytes"
    assert json.loads(layer.annotations["org.cncf.model.file.metadata+json"]) == {
        "name": "w.bin",
        "mode": 0o644,
        "uid": 0,
        "gid": 0,
        "size": 9,
        "mtime": "1970-01-01T00:00:01.5Z",
        "typeflag": 0,
    }
    with pytest.raises(PackRefused, match="exactly one regular file"):
        await packed("model: {path: m}", style=PackStyle(packaging="raw"))


async def test_a_modelpack_carries_its_kitfile(folder: Path, store: LayoutRegistry, packed):
    write_golden(folder)

    result = await packed(GOLDEN_KITFILE, style=PackStyle(form="modelpack"))

    document = json.loads(await blob(store, result.manifest.digest))
    config = json.loads(await blob(store, result.config.digest))
    assert document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert [layer["mediaType"] for layer in document["layers"]] == [
        "application/vnd.cncf.model.weight.v1.tar",
        "application/vnd.cncf.model.dataset.v1.tar",
        "application/vnd.cncf.model.doc.v1.tar",
    ]
    assert config["modelfs"]["diffIds"] == [digest for digest, _ in GOLDEN_LAYERS]
    assert json.loads(document["annotations"]["ml.kitops.modelkit.kitfile"])["model"]["name"] == "w"


async def test_styles_that_a_format_does_not_know_are_refused(packed):
    for style in (
        PackStyle("1.7", "raw"),
        PackStyle("1.7", "tar", "zstd"),
        PackStyle("modelpack", "raw", "gzip"),
    ):
        with pytest.raises(PackRefused):
            await packed("manifestVersion: 1.0.0", style=style)


async def test_an_mcp_bundle_is_verbatim_and_must_be_one(folder: Path, store: LayoutRegistry, packed):
    with zipfile.ZipFile(folder / "ok.mcpb", "w") as bundle:
        bundle.writestr("manifest.json", "{}")
    write(folder, {"bad.mcpb": b"no zip"})

    result = await packed("mcpServers: [{name: s, path: ok.mcpb}]", style=PackStyle(compression="gzip"))

    assert result.layers[0][0].media_type == "application/vnd.kitops.modelkit.mcpb.v1.raw"
    assert await blob(store, result.layers[0][0].digest) == (folder / "ok.mcpb").read_bytes()
    with pytest.raises(PackRefused, match="no MCP bundle"):
        await packed("mcpServers: [{name: s, path: bad.mcpb}]", style=PackStyle())


async def test_prompts_are_code_layers_with_a_subtype(folder: Path, packed):
    write(folder, {"p.md": b"1"})

    result = await packed("prompts: [{path: p.md}]", style=PackStyle())

    layer = result.layers[0][0]
    assert layer.media_type == "application/vnd.kitops.modelkit.code.v1.tar"
    assert layer.annotations["ml.kitops.modelkit.layer-subtype"] == "prompt"


async def test_a_layer_goes_straight_to_any_registry(folder: Path, tmp_path: Path, packed):
    """Through the interface alone: the digest is then computed here."""
    write_golden(folder)

    async with LayoutRegistry(tmp_path / "other") as inner:
        place = Place(_OnlyTheInterface(inner), RepositoryName("kit"))
        result = await pack(folder, Kitfile.from_yaml(GOLDEN_KITFILE), place, style=PackStyle(form="1.7"))

    assert result.manifest.digest == GOLDEN_MANIFEST[0]


class _OnlyTheInterface:
    def __init__(self, inner: LayoutRegistry) -> None:
        self._inner = inner

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    async def begin_upload(self, name: RepositoryName):
        return _Upload(await self._inner.begin_upload(name))


class _Upload:
    def __init__(self, inner) -> None:
        self.append, self.commit, self.cancel = inner.append, inner.commit, inner.cancel


def test_the_modes_of_files_go_into_the_tar(folder: Path):
    write(folder, {"w": b"1"})
    (folder / "w").chmod(0o4751)

    tree = source_tree.SourceTree(folder, ["w"], source_tree.ignore_rules(folder))

    assert [stat.S_IMODE(file.mode) for file in tree.files("w")] == [0o4751]

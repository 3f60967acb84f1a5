"""The extension's endpoints as a client sees them: lists of files, files, Kitfiles, archives, tensors, discovery.

For every form of a kit and of its layers, by tag, digest, slice; what is hostile or makes no sense is a 4xx that says so.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import itertools
import json
import random
import shutil
import struct
import tarfile
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.kitfile import Kitfile
from kitspec.media_types import MODELKIT_CONFIG, OCI_MANIFEST
from kitspec.path_glob import PathGlob
from registry import layout
from registry.member_index import KEPT_SIZE_MIN
from tests.registry.conftest import Serve, configured, served
from tests.registry.kits import FILES, Kit, compressed, tar_of, whole_kit
from tests.registry.test_member_index import WatchedBackend
from tests.registry.test_tar_indexer import HOSTILE
from tests.registry.wire import (
    Reply,
    Wire,
    assert_discreet,
    assert_refused,
    descriptor,
    encode,
    next_target,
    path_of,
)

NAME = "team/kit"
FOLDERS = {"code", "data", "docs", "model", "lora", "prompts"}


@pytest.fixture
def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


# ---- kits of every form


async def push_manifest(
    wire: Wire, manifest: Mapping[str, Any], blobs: Iterable[bytes], tag: str = "v1"
) -> Digest:
    for blob in blobs:
        await wire.push_blob(NAME, blob)
    return await wire.push_manifest(NAME, tag, manifest)


def mixed_kit() -> Kit:
    """Plain, gzip, zstd and raw layers in one kit."""
    kit = whole_kit()
    mixed = Kit()
    for (kind, entry, layer, _), compression in zip(
        kit.layers, itertools.cycle([None, "gzip", "zstd"]), strict=False
    ):
        mixed.add(kind, entry["path"], layer, name=entry.get("name", ""), compression=compression)
    for position, (kind, entry, _, _) in enumerate(mixed.layers):
        if entry["path"] == "data/valid.csv":
            raw = FILES["data/valid.csv"]
            entry |= {"digest": str(Digest.of(raw)), "diffId": str(Digest.of(raw))}
            mixed.layers[position] = (kind, entry, raw, "application/vnd.kitops.modelkit.dataset.v1.raw")
    return mixed


OLD_LAYERS = {
    "model": ("model", "./model", {"model/config.json": None, "model/weights.bin": None}),
    "datasets": ("dataset", "data/train.csv", {"data/train.csv": "train.csv"}),
    "code": (
        "code",
        "deep/er/code",
        {"deep/er/code/a.py": "code/a.py", "deep/er/code/b/c.py": "code/b/c.py"},
    ),
    "docs": ("docs", "docs/README.md", {"docs/README.md": "README.md"}),
}
OLD_FILES = {path: FILES.get(path, path.encode()) for _, _, paths in OLD_LAYERS.values() for path in paths}


async def push_old_kit(wire: Wire, tag: str = "v1") -> Digest:
    """As kit of before 0.5 made it: gzip, no digests in the config, names relative to the folder that a path is in."""
    config: dict[str, Any] = {"manifestVersion": "v1.0.0"}
    layers, blobs = [], []
    for section, (kind, entry_path, paths) in OLD_LAYERS.items():
        entry = {"path": entry_path}
        config[section] = entry if section == "model" else [entry]
        files = {name or path: OLD_FILES[path] for path, name in paths.items()}
        blobs.append(gzip.compress(tar_of(files), mtime=0))
        layers.append(descriptor(blobs[-1], f"application/vnd.kitops.modelkit.{kind}.v1.tar+gzip"))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(encode(config), MODELKIT_CONFIG),
        "layers": layers,
    }
    return await push_manifest(wire, manifest, [encode(config), *blobs], tag)


PACK_WORDS = {"model": "weight", "lora": "weight.config", "code": "code", "data": "dataset", "docs": "doc"}
PACK_FILES = {path: content for path, content in FILES.items() if path.split("/")[0] in PACK_WORDS}


async def push_pack(wire: Wire, *, packaging: str, vendor: str = "cncf", tag: str = "v1") -> Digest:
    """A ModelPack as modctl makes it: each file a layer, raw or in a tar."""
    layers, blobs = [], []
    suffix = packaging.partition("+")[2] or None
    for path, content in PACK_FILES.items():
        word = PACK_WORDS[path.split("/")[0]]
        inside = content if packaging.startswith("raw") else tar_of({path: content})
        blobs.append(compressed(inside, suffix))
        annotations = {
            f"org.{vendor}.model.filepath": path,
            f"org.{vendor}.model.file.metadata+json": '{"name": "x", "mode": 436}',
        }
        layers.append(
            descriptor(
                blobs[-1], f"application/vnd.{vendor}.model.{word}.v1.{packaging}", annotations=annotations
            )
        )
    config = encode({"descriptor": {"name": "m"}, "modelfs": {"type": "layers"}, "config": {}})
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": f"application/vnd.{vendor}.model.manifest.v1+json",
        "config": descriptor(config, f"application/vnd.{vendor}.model.config.v1+json"),
        "layers": layers,
    }
    return await push_manifest(wire, manifest, [config, *blobs], tag)


FORMS: Mapping[str, tuple[Callable[[Wire], Any], Mapping[str, bytes]]] = {
    "plain": (lambda wire: whole_kit().push(wire), FILES),
    "gzip": (lambda wire: whole_kit("gzip").push(wire), FILES),
    "zstd": (lambda wire: whole_kit("zstd").push(wire), FILES),
    "mixed": (lambda wire: mixed_kit().push(wire), FILES),
    "of before 0.5": (push_old_kit, OLD_FILES),
    "ModelPack, raw": (lambda wire: push_pack(wire, packaging="raw"), PACK_FILES),
    "ModelPack, raw+gzip": (lambda wire: push_pack(wire, packaging="raw+gzip"), PACK_FILES),
    "ModelPack, tar": (lambda wire: push_pack(wire, packaging="tar"), PACK_FILES),
    "ModelPack, tar+gzip": (lambda wire: push_pack(wire, packaging="tar+gzip"), PACK_FILES),
    "ModelPack of old": (lambda wire: push_pack(wire, packaging="raw", vendor="cnai"), PACK_FILES),
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def target_of(kind: str, reference: str = "v1", *, file: str = "", **query: str | list[str]) -> str:
    target = f"/v2/{NAME}/_modelkit/{kind}/{reference}"
    if file:
        target += f"/{quote(file)}"
    return f"{target}?{urlencode(query, doseq=True)}" if query else target


async def listed(wire: Wire, reference: str = "v1", **query: str | list[str]) -> list[dict[str, Any]]:
    """All pages of a list."""
    target: str | None = target_of("files", reference, **query)
    found: list[dict[str, Any]] = []
    while target is not None:
        reply = await wire("GET", target)
        assert reply.status == 200, reply.body
        found += reply.json()["files"]
        target = next_target(reply)
    return found


def files_in(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [row["path"] for row in rows if row["type"] == "file"]


async def got(wire: Wire, target: str, **headers: str) -> bytes:
    reply = await wire("GET", target, headers=headers)
    assert reply.status == 200, reply.body
    return reply.body


def unpacked(tar: bytes) -> dict[str, bytes]:
    """The files of a tar that ends as a tar ends."""
    assert tar.endswith(bytes(1024))
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            assert member.isfile() or member.isdir()
            if member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
        assert archive.offset == len(tar) - 1024
    return found


def refused(reply: Reply, status: int, code: str, said: str = "") -> None:
    """An error of this kind with a message that is of use, and gives nothing away but what the client has sent."""
    assert (reply.status, reply.codes) == (status, [code]), reply.body
    assert reply.header("Content-Type").startswith("application/json")
    message = reply.json()["errors"][0]["message"]
    assert said in message
    assert 10 < len(message) < 4000
    assert_discreet(replace(reply, status=400, body=reply.body.replace(b"/train.py'", b"'")))


# ---- lists of files


@EVERY_FORM
async def test_every_file_of_every_form_of_kit_is_listed_with_what_it_is(wire: Wire, form: str) -> None:
    push, files = FORMS[form]
    digest = await push(wire)

    rows = await listed(wire)

    paths = [row["path"] for row in rows]
    assert paths == sorted(paths, key=str.encode)
    assert {row["path"]: (row["size"], row["digest"]) for row in rows if row["type"] == "file"} == {
        path: (len(content), Digest.of(content)) for path, content in files.items()
    }
    manifest = (await wire("GET", f"/v2/{NAME}/manifests/v1")).json()
    layers = {layer["digest"]: layer["mediaType"] for layer in manifest["layers"]}
    for row in rows:
        assert row["type"] in {"file", "directory"}
        assert int(row["mode"], 8) in {0o644, 0o755, 0o664}
        assert row["layer"] in layers
        assert row["section"] in {"model", "modelpart", "code", "datasets", "docs", "prompts"}
        is_plain = "+" not in layers[row["layer"]]
        assert ("offset" in row) == (is_plain and row["type"] == "file")
        if "offset" in row:
            span = f"bytes={row['offset']}-{row['offset'] + row['size'] - 1}"
            part = await wire("GET", f"/v2/{NAME}/blobs/{row['layer']}", headers={"Range": span})
            assert part.body == files[row["path"]]
    assert (await wire("GET", target_of("files"))).json()["digest"] == digest


async def test_the_list_names_sections_entries_and_folders(wire: Wire) -> None:
    await whole_kit().push(wire)

    rows = {row["path"]: row for row in await listed(wire)}

    assert (rows["lora/adapter.bin"]["section"], rows["lora/adapter.bin"]["entry"]) == ("modelpart", "lora")
    assert (rows["data/train.csv"]["section"], rows["data/train.csv"]["entry"]) == ("datasets", "train set")
    assert (rows["prompts/system.md"]["section"], rows["prompts/system.md"]["entry"]) == (
        "prompts",
        "prompts",
    )
    assert {path for path, row in rows.items() if row["type"] == "directory"} == FOLDERS
    assert not {"size", "digest", "offset"} & set(rows["docs"])


async def references_of(wire: Wire) -> dict[str, tuple[str, set[str]]]:
    """References to the kit and to parts of it, with the files that each has."""
    digest = await whole_kit().push(wire)
    sliced = await wire("GET", f"/v2/{NAME}/manifests/v1.only.model.docs")
    docs = {"docs/README.md"}
    model = {"model/config.json", "model/weights.bin", "lora/adapter.bin"}
    return {
        "a tag": ("v1", set(FILES)),
        "a digest": (digest, set(FILES)),
        "an escaped digest": (quote(digest, safe=""), set(FILES)),
        "a slice's tag": ("v1.only.docs", docs),
        "a slice's digest": (sliced.header("Docker-Content-Digest"), model | docs),
        "an image's tag": ("v1.as.image", set(FILES)),
        "the tag of a slice as an image": ("v1.only.model_net.as.readable", model - {"lora/adapter.bin"}),
        "a ModelPack's tag": ("v1.only.docs.as.modelpack", docs),
    }


async def test_whatever_names_a_kit_or_a_part_of_it_names_its_files(wire: Wire) -> None:
    for reference, paths in (await references_of(wire)).values():
        assert set(files_in(await listed(wire, reference))) == paths
        assert set(unpacked(await got(wire, target_of("archive", reference)))) == paths
        for path, content in FILES.items():
            reply = await wire("GET", target_of("files", reference, file=path))
            if path in paths:
                assert (reply.status, reply.body) == (200, content)
            else:
                refused(reply, 404, "FILE_UNKNOWN", path)


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ({"filter": "docs"}, ["docs/README.md"]),
        ({"filter": "datasets:train set"}, ["data/train.csv"]),
        ({"filter": ["docs", "prompts"]}, ["docs/README.md", "prompts/system.md"]),
        ({"filter": "kitfile"}, []),
        ({"prefix": "data/t"}, ["data/train.csv"]),
        ({"prefix": "m"}, ["model/config.json", "model/weights.bin"]),
        ({"prefix": "nothing"}, []),
        ({"prefix": ""}, sorted(FILES)),
        ({"path": "**/*.csv"}, ["data/train.csv", "data/valid.csv"]),
        ({"path": ["model/*.json", "docs/**"]}, ["docs/README.md", "model/config.json"]),
        ({"path": "*.csv"}, []),
        (
            {"path": "[dm]*/[!v]*.*"},
            ["data/train.csv", "docs/README.md", "model/config.json", "model/weights.bin"],
        ),
        ({"filter": "datasets", "path": "**/*n.csv", "prefix": "data"}, ["data/train.csv"]),
        ({"last": "docs/README.md"}, [path for path in sorted(FILES) if path > "docs/README.md"]),
        ({"last": "model/weights.bin~"}, ["prompts/system.md"]),
        ({"last": "\U0010ffff"}, []),
    ],
)
async def test_a_list_is_narrowed_by_filters_prefix_and_patterns(
    wire: Wire, query: dict[str, str | list[str]], paths: list[str]
) -> None:
    await whole_kit().push(wire)

    assert files_in(await listed(wire, **query)) == paths


PAGED: list[dict[str, str | list[str]]] = [
    {}, {"prefix": "m"}, {"path": ["**/*.csv", "model/**"], "filter": ["model", "datasets"]},
]  # fmt: skip


@EVERY_FORM
async def test_pages_of_any_size_give_the_whole_list(wire: Wire, form: str) -> None:
    await FORMS[form][0](wire)

    for query in PAGED:
        whole = await listed(wire, **query)
        for size in (1, 2, 3, len(whole) - 1, len(whole), len(whole) + 1):
            target: str | None = target_of("files", **query, n=str(size))
            pages = []
            while target is not None:
                reply = await wire("GET", target)
                pages.append(reply.json()["files"])
                target = next_target(reply)
            assert [row for page in pages for row in page] == whole
            assert all(len(page) == size for page in pages[:-1])
            assert 0 < len(pages[-1]) <= size


async def test_U_32_a_page_of_nothing_has_no_next_and_a_page_too_large_is_cut(serve: Serve) -> None:
    async with serve(catalog={"maxentries": 3}) as url:
        wire = Wire(url)
        await whole_kit().push(wire)

        nothing = await wire("GET", target_of("files", n="0"))
        much = await wire("GET", target_of("files", n="999999999999"))

        assert nothing.json()["files"] == []
        assert "Link" not in nothing.headers
        assert len(much.json()["files"]) == 3
        assert next_target(much) is not None


async def test_the_next_page_is_below_the_prefix_of_the_registry(serve: Serve) -> None:
    async with serve(http={"prefix": "/models/"}) as url:
        wire = Wire(url)
        prefixed = Wire(url)
        kit = whole_kit()

        async def below(method: str, target: str, **rest: Any) -> Reply:
            return await wire(method, f"/models{target}", **rest)

        for blob in [kit.config, *(layer[2] for layer in kit.layers)]:
            reply = await below("POST", f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(blob)}", body=blob)
            assert reply.status == 201
        headers = {"Content-Type": OCI_MANIFEST}
        await below("PUT", f"/v2/{NAME}/manifests/v1", headers=headers, body=encode(kit.manifest))

        for list_of in ("/v2/_catalog", f"/v2/{NAME}/tags/list"):
            await below("PUT", f"/v2/{NAME}/manifests/v2", headers=headers, body=encode(kit.manifest))
            await below("POST", f"/v2/z/blobs/uploads/?digest={Digest.of(b'z')}", body=b"z")
            following = next_target(await below("GET", f"{list_of}?n=1"))
            assert following is not None
            assert following.startswith(f"/models{list_of}?")
            assert (await wire("GET", following)).status == 200

        reply = await below("GET", target_of("files", n="3", path="**"))
        target = next_target(reply)
        assert target is not None
        assert target.startswith(f"/models/v2/{NAME}/_modelkit/files/v1?")
        more = await prefixed("GET", target)
        assert files_in(reply.json()["files"] + more.json()["files"])[:2] == [
            "code/train.py",
            "data/train.csv",
        ]


async def test_what_two_layers_have_at_one_path_is_on_one_page_and_is_refused_as_a_file(wire: Wire) -> None:
    kit = Kit()
    for number in (1, 2):
        kit.add(
            "dataset", f"d{number}", tar_of({"d/same": b"same", "d/x": b"%d" % number, f"e{number}": b""})
        )
    await kit.push(wire)
    whole = await listed(wire)
    assert [row["path"] for row in whole] == ["d", "d/same", "d/x", "d/x", "e1", "e2"]

    for size in range(1, 7):
        assert await listed(wire, n=str(size)) == whole
    assert await got(wire, target_of("files", file="d/same")) == b"same"
    reply = await wire("GET", target_of("files", file="d/x"))
    refused(reply, 400, "MANIFEST_INVALID", "2 layers hold different files 'd/x'")
    assert await got(wire, target_of("files", file="d/x", filter="datasets:d2")) == b"2"


ODD_PATHS = {
    " ": b"a space",
    "a b/c d.txt": b"spaces",
    "é/ü\u0301/\U0001f600.bin": b"unicode",
    "100%.txt": b"percent",
    "%41.txt": b"an escape that is none",
    "what?.txt": b"question",
    "#1.txt": b"hash",
    "a+b.txt": b"plus",
    "a;b=c&d.txt": b"parameters",
    "\"'`$(x)\\.txt": b"quotes",
    "[a]*.txt": b"glob",
    "..hidden": b"dots",
    "_modelkit/files/v1": b"a path like ours",
    "n" * 255: b"a long name",
    "/".join(["é" * 50] * 8): b"a long path",
    "empty": b"",
    "~last and empty": b"",
}


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_paths_may_be_anything_that_a_file_may_be_called(wire: Wire, compression: str | None) -> None:
    kit = Kit()
    kit.add("model", ".", tar_of(ODD_PATHS), compression=compression)
    await kit.push(wire)

    rows = await listed(wire, n="3")
    tar = await got(wire, target_of("archive"))

    assert set(files_in(rows)) == set(ODD_PATHS)
    assert unpacked(tar) == ODD_PATHS
    for path, content in ODD_PATHS.items():
        assert await got(wire, target_of("files", file=path)) == content
        assert await got(wire, f"/v2/{NAME}/_modelkit/files/v1/{quote(path, safe='')}") == content
        assert files_in(await listed(wire, prefix=path)) == [path]
        pattern = "".join(f"[{character}]" if character in "[*?" else character for character in path)
        assert unpacked(await got(wire, target_of("archive", path=pattern))) == {path: content}


@pytest.mark.parametrize("files", [{}, {"only": None, "only/folders": None}, {"zero": b""}])
async def test_layers_without_a_byte_of_content_are_kits_too(
    wire: Wire, files: Mapping[str, bytes | None]
) -> None:
    kit = Kit()
    kit.add("model", "m", tar_of({path: content for path, content in files.items() if content is not None}))
    if "only" in files:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for path in files:
                folder = tarfile.TarInfo(path)
                folder.type = tarfile.DIRTYPE
                archive.addfile(folder)
        kit.layers.clear()
        kit.add("model", "m", stream.getvalue())
    await kit.push(wire)

    assert {row["path"] for row in await listed(wire)} == set(files)
    tar = await got(wire, target_of("archive"))
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert set(archive.getnames()) == set(files)
    if "zero" in files:
        reply = await wire("GET", target_of("files", file="zero"))
        assert (reply.status, reply.body, reply.header("Content-Length")) == (200, b"", "0")
        part = await wire("GET", target_of("files", file="zero"), headers={"Range": "bytes=0-0"})
        refused(part, 416, "RANGE_INVALID")


# ---- one file


@EVERY_FORM
async def test_a_file_is_its_bytes_whole_and_in_ranges(wire: Wire, form: str) -> None:
    push, files = FORMS[form]
    await push(wire)

    for path, content in files.items():
        target = target_of("files", file=path)
        reply = await wire("GET", target)
        head = await wire("HEAD", target)

        assert (reply.status, reply.body) == (200, content)
        assert (head.status, head.body) == (200, b"")
        for either in (reply, head):
            assert either.header("Content-Length") == str(len(content))
            assert either.header("ETag") == f'"{Digest.of(content)}"'
            assert either.header("Docker-Content-Digest") == Digest.of(content)
            assert either.header("Accept-Ranges") == "bytes"
            assert either.header("X-Content-Type-Options") == "nosniff"
            sha256 = base64.b64encode(hashlib.sha256(content).digest()).decode()
            assert either.header("Repr-Digest") == f"sha-256=:{sha256}:"
        size = len(content)
        for start, stop in [(0, 1), (0, size), (size // 2, size), (1, size - 1), (size - 1, size)]:
            if start < stop:
                part = await wire("GET", target, headers={"Range": f"bytes={start}-{stop - 1}"})
                assert (part.status, part.body) == (206, content[start:stop])
                assert part.header("Content-Range") == f"bytes {start}-{stop - 1}/{size}"
                assert part.header("ETag") == reply.header("ETag")


WEIGHTS = FILES["model/weights.bin"]
ETAG = f'"{Digest.of(WEIGHTS)}"'


@pytest.mark.parametrize(
    ("headers", "status", "body"),
    [
        ({"Range": "bytes=-5"}, 206, WEIGHTS[-5:]),
        ({"Range": "bytes=100-"}, 206, WEIGHTS[100:]),
        ({"Range": f"bytes=5-{10**15}"}, 206, WEIGHTS[5:]),
        ({"Range": "bytes=0-1,5-6"}, 200, WEIGHTS),
        ({"Range": "items=0-1"}, 200, WEIGHTS),
        ({"Range": "bytes=x"}, 200, WEIGHTS),
        ({"Range": "bytes=0-1", "If-Range": ETAG}, 206, WEIGHTS[:2]),
        ({"Range": "bytes=0-1", "If-Range": '"another"'}, 200, WEIGHTS),
        ({"Range": "bytes=0-1", "If-Range": "Wed, 21 Oct 2015 07:28:00 GMT"}, 200, WEIGHTS),
        ({"If-None-Match": ETAG}, 304, b""),
        ({"If-None-Match": f"W/{ETAG}, *"}, 304, b""),
        ({"If-None-Match": '"another"'}, 200, WEIGHTS),
        ({"If-None-Match": ETAG, "Range": "bytes=0-1"}, 304, b""),
        ({"If-Match": ETAG}, 200, WEIGHTS),
        ({"If-Match": "*"}, 200, WEIGHTS),
        ({"If-Match": '"another"'}, 412, b""),
        ({"If-Match": f"W/{ETAG}"}, 412, b""),
        ({"If-Modified-Since": "Wed, 21 Oct 2099 07:28:00 GMT"}, 200, WEIGHTS),
    ],
)
@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_file_heeds_conditions_and_ranges(
    wire: Wire, headers: dict[str, str], status: int, body: bytes, compression: str | None
) -> None:
    await whole_kit(compression).push(wire)

    reply = await wire("GET", target_of("files", file="model/weights.bin"), headers=headers)

    assert (reply.status, reply.body) == (status, body)
    assert reply.header("ETag") == ETAG


@pytest.mark.parametrize("span", ["bytes=-0", f"bytes={len(WEIGHTS)}-", "bytes=5-4", "bytes=99999999999-"])
async def test_a_range_that_lies_outside_is_416_and_says_the_size(wire: Wire, span: str) -> None:
    await whole_kit().push(wire)

    reply = await wire("GET", target_of("files", file="model/weights.bin"), headers={"Range": span})

    refused(reply, 416, "RANGE_INVALID")
    assert reply.header("Content-Range") == f"bytes */{len(WEIGHTS)}"


@pytest.mark.parametrize(
    ("path", "media_type", "kind"),
    [
        ("a.json", "application/json", "inline"),
        ("a.CSV", "text/csv; charset=utf-8", "inline"),
        ("README.md", "text/markdown; charset=utf-8", "inline"),
        ("a.parquet", "application/vnd.apache.parquet", "inline"),
        ("a.png", "image/png", "inline"),
        ("a.html", "application/octet-stream", "attachment"),
        ("a.svg", "application/octet-stream", "attachment"),
        ("a.js", "application/octet-stream", "attachment"),
        ("a.xml", "application/octet-stream", "attachment"),
        ("a.pdf", "application/octet-stream", "attachment"),
        ("a.safetensors", "application/octet-stream", "attachment"),
        ("json", "application/octet-stream", "attachment"),
        (".json", "application/octet-stream", "attachment"),
        ("a.json.html", "application/octet-stream", "attachment"),
    ],
)
async def test_U_20_nothing_that_a_browser_would_run_is_sent_as_what_it_is(
    wire: Wire, path: str, media_type: str, kind: str
) -> None:
    kit = Kit()
    kit.add("docs", ".", tar_of({f"d/{path}": b"<script>alert(1)</script>"}))
    await kit.push(wire)

    reply = await wire("GET", target_of("files", file=f"d/{path}"))

    assert reply.header("Content-Type") == media_type
    assert reply.header("Content-Disposition") == f"{kind}; filename*=UTF-8''{path}"
    assert reply.header("X-Content-Type-Options") == "nosniff"


async def test_a_name_in_content_disposition_is_escaped(wire: Wire) -> None:
    kit = Kit()
    kit.add("docs", ".", tar_of({'d/a"; b=é%.txt': b""}))
    await kit.push(wire)

    reply = await wire("GET", target_of("files", file='d/a"; b=é%.txt'))

    assert reply.header("Content-Disposition") == "inline; filename*=UTF-8''a%22%3B%20b%3D%C3%A9%25.txt"


NO_FILES = [
    "nope", "model/", "model//config.json", "./model/config.json", "model/../model/config.json", "../../../../etc/passwd",
    "/model/config.json", "model/config.json/x", "MODEL/config.json", "model/config.json\0", "model/config.json\n",
    "data", "é" * 500, "\ufffd", "/", " ",
]  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "of before 0.5", "ModelPack, raw"])
async def test_a_path_that_is_no_file_s_is_404(wire: Wire, form: str) -> None:
    await FORMS[form][0](wire)

    for path in NO_FILES:
        target = f"/v2/{NAME}/_modelkit/files/v1/{quote(path, safe='')}"
        is_folder = path == "data" and form == "plain"
        said = "'data' is a folder; its files are listed by ?prefix=" if is_folder else "no file "
        refused(await wire("GET", target), 404, "FILE_UNKNOWN", said)
        head = await wire("HEAD", target)
        assert (head.status, head.body) == (404, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_there_is_nothing_to_write(wire: Wire, method: str) -> None:
    await whole_kit().push(wire)

    for target in (
        target_of("files"),
        target_of("files", file="model/config.json"),
        target_of("kitfile"),
        target_of("archive"),
        target_of("tensors"),
        target_of("tensors", file="a"),
        "/v2/_oci/ext/discover",
    ):
        reply = await wire(method, target)
        assert_refused(reply, 405, code="UNSUPPORTED")
        assert reply.header("Allow") == "GET, HEAD"


# ---- Kitfiles


@pytest.mark.parametrize(
    ("reference", "query", "kept"),
    [
        ("v1", {}, {"model", "lora", "code", "data/train.csv", "data/valid.csv", "docs", "prompts"}),
        ("v1.only.docs", {}, {"docs"}),
        ("v1.only.model_lora", {}, {"lora"}),
        ("v1", {"filter": "datasets:train set"}, {"data/train.csv"}),
        ("v1.only.kitfile", {}, set()),
    ],
)
async def test_a_kitfile_comes_as_yaml_or_json_with_what_was_chosen(
    wire: Wire, reference: str, query: dict[str, str], kept: set[str]
) -> None:
    kit = whole_kit()
    await kit.push(wire)
    target = target_of("kitfile", reference, **query)

    yaml = await wire("GET", target)
    as_json = await wire("GET", target, headers={"Accept": "application/json"})
    asked = await wire("GET", f"{target}{'&' if query else '?'}format=json")

    assert yaml.header("Content-Type") == "application/yaml"
    assert as_json.header("Content-Type") == asked.header("Content-Type") == "application/json"
    assert yaml.header("Vary") == as_json.header("Vary") == "Accept"
    kitfile = Kitfile.from_json(as_json.body)
    assert as_json.body == asked.body == kitfile.to_json()
    assert yaml.body == kitfile.to_yaml()
    assert b"digest" not in yaml.body
    assert _entry_paths(kitfile) == kept
    if reference == "v1" and not query:
        assert kitfile == Kitfile.from_json(kit.config)
    elif reference == "v1.only.docs":
        sliced = await wire("GET", f"/v2/{NAME}/manifests/{reference}")
        config = await got(wire, f"/v2/{NAME}/blobs/{sliced.json()['config']['digest']}")
        assert kitfile == Kitfile.from_json(config)
    known = await wire("GET", target, headers={"If-None-Match": yaml.header("ETag")})
    assert (known.status, known.body) == (304, b"")
    assert (await wire("HEAD", target)).header("Content-Length") == str(len(yaml.body))


def _entry_paths(kitfile: Kitfile) -> set[str]:
    return {entry.path for _, _, entry in kitfile.entries()}


async def test_a_modelpack_has_a_kitfile_too(wire: Wire) -> None:
    await push_pack(wire, packaging="raw")

    kitfile = Kitfile.from_json(await got(wire, target_of("kitfile", format="json")))

    assert _entry_paths(kitfile) == set(PACK_FILES)


# ---- archives

CHOICES: list[tuple[dict[str, str | list[str]], Callable[[str], bool]]] = [
    ({}, lambda _: True),
    ({"filter": "model"}, lambda path: path.startswith(("model/", "lora/"))),
    ({"filter": ["docs", "code"]}, lambda path: path.startswith(("docs/", "code/", "deep/"))),
    ({"path": "**/*.json"}, lambda path: path.endswith(".json")),
    ({"path": ["**/*.md", "*/w*"]}, lambda path: path.endswith(".md") or path.startswith("model/w")),
    ({"path": "model/**", "filter": "model,docs"}, lambda path: path.startswith("model/")),
    ({"path": "**"}, lambda _: True),
]


@EVERY_FORM
async def test_an_archive_holds_the_chosen_files_and_no_others(wire: Wire, form: str) -> None:
    push, files = FORMS[form]
    await push(wire)

    for query, is_wanted in CHOICES:
        reply = await wire("GET", target_of("archive", **query))
        head = await wire("HEAD", target_of("archive", **query))

        wanted = {path: content for path, content in files.items() if is_wanted(path)}
        if not wanted:
            refused(reply, 404, "FILE_UNKNOWN", "no path")
            continue
        assert reply.status == 200, reply.body
        assert unpacked(reply.body) == wanted
        assert reply.header("Content-Type") == "application/x-tar"
        assert reply.header("Content-Disposition") == 'attachment; filename="kit.tar"'
        assert reply.header("Content-Length") == head.header("Content-Length") == str(len(reply.body))
        assert reply.header("ETag") == head.header("ETag")
        assert len(reply.body) <= sum(map(len, wanted.values())) * 1.01 + 64 * 1024


@pytest.mark.parametrize("form", ["plain", "mixed", "of before 0.5", "ModelPack, raw+gzip"])
async def test_an_archive_that_broke_off_anywhere_goes_on(wire: Wire, form: str) -> None:
    push, _ = FORMS[form]
    await push(wire)
    target = target_of("archive", path=["**/*.json", "**/*n*"])
    whole = await wire("GET", target)
    chance = random.Random(form)

    cuts = sorted({0, 1, 511, 512, 513, *chance.choices(range(len(whole.body)), k=12)})
    parts = []
    for start, stop in itertools.pairwise([*cuts, len(whole.body)]):
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": whole.header("ETag")}
        part = await wire("GET", target, headers=headers)
        assert part.status == 206
        assert part.header("Content-Range") == f"bytes {start}-{stop - 1}/{len(whole.body)}"
        parts.append(part.body)

    assert b"".join(parts) == whole.body


async def test_the_tag_of_an_archive_changes_with_the_kit_the_choice_and_the_patterns(wire: Wire) -> None:
    kit = whole_kit()
    await kit.push(wire)
    kit.annotations["more"] = "another manifest"
    await kit.push(wire, tag="v2")
    await whole_kit().push(wire, tag="same")

    async def etag(reference: str, **query: str | list[str]) -> str:
        return (await wire("HEAD", target_of("archive", reference, **query))).header("ETag")

    different = [
        await etag("v1"),
        await etag("v2"),
        await etag("v1", filter="model"),
        await etag("v1", filter="model:net"),
        await etag("v1", filter="docs"),
        await etag("v1", path="**/*.json"),
        await etag("v1", path="**/*.md"),
        await etag("v1", path=["**/*.json", "**/*.md"]),
        await etag("v1", filter="model", path="**/*.json"),
    ]
    assert len(set(different)) == len(different)
    assert await etag("same") == different[0]
    assert await etag("v1.only.model") == await etag("v1.only.model_lora.model_net") == different[2]
    assert await etag("v1", filter="model:net,lora") == different[2]
    reply = await wire("GET", target_of("archive"), headers={"If-None-Match": different[0]})
    assert (reply.status, reply.body) == (304, b"")
    reply = await wire("GET", target_of("archive", "v2"), headers={"If-Match": different[0]})
    assert reply.status == 412


async def test_an_archive_of_nothing_is_an_empty_tar(wire: Wire) -> None:
    await whole_kit().push(wire)

    assert await got(wire, target_of("archive", filter="kitfile")) == bytes(1024)


async def test_a_plain_layer_goes_into_an_archive_as_it_is(wire: Wire) -> None:
    """Headers of other writers and all: what comes out is what was packed."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in ("./", "m", "m/é", "m/" + "n" * 120, "m/x"):
            member = tarfile.TarInfo(path)
            member.type = tarfile.DIRTYPE if path in {"./", "m"} else tarfile.REGTYPE
            member.mtime, member.uname, member.size = 1.25, "someone", 0 if member.isdir() else 700
            archive.addfile(member, io.BytesIO(bytes(700)))
    kit = Kit()
    kit.add("model", ".", stream.getvalue())
    await kit.push(wire)

    whole = await got(wire, target_of("archive"))
    part = await got(wire, target_of("archive", path="m/é"))

    for tar in (whole, part):
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            assert {(member.mtime, member.uname) for member in archive} == {(1.25, "someone")}
    assert whole[:-1024] in stream.getvalue()
    assert unpacked(part) == {"m/é": bytes(700)}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    files=st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "c.json", "é"]), min_size=1, max_size=3).map("/".join),
        st.binary(max_size=700) | st.integers(0, 100_000).map(bytes),
        max_size=8,
    ),
    compressions=st.lists(st.sampled_from([None, "gzip", "zstd"]), min_size=1, max_size=3),
    patterns=st.lists(st.sampled_from(["**/*.json", "a/**", "*", "**/b", "[ab]/*", "**"]), max_size=2),
    data=st.data(),
)
async def test_archives_of_any_layers_hold_what_the_patterns_choose(
    files: dict[str, bytes],
    compressions: list[str | None],
    patterns: list[str],
    data: st.DataObject,
) -> None:
    kit = Kit()
    kept = {
        path: content
        for path, content in files.items()
        if not any(other.startswith(f"{path}/") for other in files)
    }
    shares: list[dict[str, bytes]] = [{} for _ in compressions]
    for path, content in kept.items():
        shares[data.draw(st.integers(0, len(shares) - 1))][path] = content
    for number, (share, compression) in enumerate(zip(shares, compressions, strict=True)):
        kit.add("dataset", f"d{number}", tar_of(share), compression=compression)
    globs = [PathGlob(pattern) for pattern in patterns]
    wanted = {path: c for path, c in kept.items() if not globs or any(glob.matches(path) for glob in globs)}
    folders = {path[:cut] for path in kept for cut, character in enumerate(path) if character == "/"}

    async with served(configured({"inmemory": {}})) as url:
        wire = Wire(url)
        await kit.push(wire)
        reply = await wire("GET", target_of("archive", **({"path": patterns} if patterns else {})))

        if globs and not any(glob.matches(path) for glob in globs for path in folders | set(kept)):
            refused(reply, 404, "FILE_UNKNOWN")
        else:
            assert unpacked(reply.body) == wanted


# ---- tensors


def safetensors(tensors: Mapping[str, bytes]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, content in tensors.items():
        span = [position, position := position + len(content)]
        header[name] = {"dtype": "U8", "shape": [1, len(content)], "data_offsets": span}
    text = encode(header)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


TENSORS = {"a.weight": bytes(range(200)), "b": b"\xff" * 50, "é ?#": b"odd"}


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_tensors_are_listed_and_read_by_name(wire: Wire, compression: str | None) -> None:
    content = safetensors(TENSORS)
    kit = Kit()
    kit.add("model", "m", tar_of({"m/x.safetensors": content, "m/y.txt": b"none"}), compression=compression)
    digest = await kit.push(wire)

    summary = json.loads(await got(wire, target_of("tensors")))
    header = json.loads(await got(wire, target_of("tensors", file="m/x.safetensors")))

    assert summary == {
        "digest": digest,
        "files": [
            {
                "path": "m/x.safetensors", "format": "safetensors", "size": len(content), "digest": Digest.of(content),
                "tensors": 3, "parameters": {"U8": 253}, "metadata": {"format": "pt"},
            }
        ],
    }  # fmt: skip
    assert {tensor["name"] for tensor in header["tensors"]} == set(TENSORS)
    for tensor in header["tensors"]:
        wanted = TENSORS[tensor["name"]]
        assert content[tensor["start"] : tensor["stop"]] == wanted
        target = target_of("tensors", file="m/x.safetensors", name=tensor["name"])
        reply = await wire("GET", target)
        assert (reply.status, reply.body) == (200, wanted)
        assert reply.header("X-Tensor-Dtype") == "U8"
        assert reply.header("X-Tensor-Shape") == f"1,{len(wanted)}"
        part = await wire("GET", target, headers={"Range": "bytes=1-2", "If-Range": reply.header("ETag")})
        assert (part.status, part.body) == (206, wanted[1:3])
        assert (await wire("HEAD", target)).header("Content-Length") == str(len(wanted))


@pytest.mark.parametrize(
    ("path", "query", "status", "code", "said"),
    [
        ("m/y.txt", {}, 404, "FILE_UNKNOWN", "holds no tensors; wanted a .safetensors or .gguf file"),
        ("m/nope.safetensors", {}, 404, "FILE_UNKNOWN", "no file"),
        ("m", {}, 404, "FILE_UNKNOWN", "folder"),
        ("m/x.safetensors", {"name": "nope"}, 404, "FILE_UNKNOWN", "no tensor 'nope'"),
        ("m/x.safetensors", {"name": ""}, 404, "FILE_UNKNOWN", "no tensor ''"),
        ("m/x.safetensors", {"name": ["a.weight", "b"]}, 400, "UNSUPPORTED", "given 2 times"),
        ("m/bad.safetensors", {}, 400, "MANIFEST_INVALID", "is no safetensors file"),
        ("m/bad.gguf", {}, 400, "MANIFEST_INVALID", "is no gguf file"),
        ("m/empty.gguf", {}, 400, "MANIFEST_INVALID", "is no gguf file"),
    ],
)
async def test_what_is_no_tensor_is_refused(
    wire: Wire, *, path: str, query: dict[str, str | list[str]], status: int, code: str, said: str
) -> None:
    files = {
        "m/x.safetensors": safetensors(TENSORS),
        "m/y.txt": b"text",
        "m/bad.safetensors": b"\xff" * 100,
        "m/bad.gguf": b"GGUFnope",
        "m/empty.gguf": b"",
    }
    kit = Kit()
    kit.add("model", "m", tar_of(files))
    await kit.push(wire)

    refused(await wire("GET", target_of("tensors", file=path, **query)), status, code, said)


# ---- discovery


async def test_the_extension_is_discovered_with_its_endpoints(wire: Wire) -> None:
    reply = await wire("GET", "/v2/_oci/ext/discover")

    assert reply.status == 200
    assert reply.header("Content-Type") == "application/json"
    (extension,) = reply.json()["extensions"]
    assert extension["name"] == "_modelkit"
    assert extension["endpoints"] == [
        f"_modelkit/{kind}" for kind in ("files", "kitfile", "archive", "tensors")
    ]
    assert set(extension) == {"name", "description", "url", "endpoints"}
    assert (await wire("HEAD", "/v2/_oci/ext/discover")).status == 200


# ---- what is refused

KINDS = ["files", "kitfile", "archive", "tensors"]


@pytest.mark.parametrize(
    ("reference", "status", "code", "said"),
    [
        ("nope", 404, "MANIFEST_UNKNOWN", "nope"),
        ("nope.only.model", 404, "MANIFEST_UNKNOWN", "nope"),
        ("v1.only.weights", 404, "MANIFEST_UNKNOWN", "'weights' is none"),
        ("v1.only.model_nope", 404, "MANIFEST_UNKNOWN", "the kit has model_net"),
        ("v1.as.oven", 404, "MANIFEST_UNKNOWN", "'oven' is none; wanted .as.image"),
        ("v1.only.model.as.oven", 404, "MANIFEST_UNKNOWN", "'oven' is none"),
        ("image", 404, "MANIFEST_UNKNOWN", "is not a ModelKit: its config is"),
        ("list", 404, "MANIFEST_UNKNOWN", "is an index, not a ModelKit"),
        ("sha256:" + "0" * 64, 404, "MANIFEST_UNKNOWN", "0000"),
        ("sha256:nope", 400, "DIGEST_INVALID", "not a digest"),
        ("%2e%2e", 404, "MANIFEST_UNKNOWN", "cannot be a tag"),
        ("a%2fb", 404, "MANIFEST_UNKNOWN", "cannot be a tag"),
        ("v1%00", 404, "MANIFEST_UNKNOWN", "cannot be a tag"),
        ("-" + "x" * 300, 404, "MANIFEST_UNKNOWN", "cannot be a tag"),
        ("%FF%FE", 404, "MANIFEST_UNKNOWN", "cannot be a tag"),
    ],
)
async def test_a_reference_that_names_no_kit_is_404_and_says_why(
    wire: Wire, reference: str, status: int, code: str, said: str
) -> None:
    await whole_kit().push(wire)
    _, digest = await wire.push_image(NAME, "image")
    manifest = await wire("GET", f"/v2/{NAME}/manifests/image")
    listing = {"mediaType": OCI_MANIFEST, "digest": digest, "size": len(manifest.body)}
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [listing],
    }
    await wire.push_manifest(NAME, "list", index)

    for kind in KINDS:
        refused(await wire("GET", target_of(kind, reference)), status, code, said)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_repository_that_is_none_is_refused(wire: Wire, kind: str) -> None:
    await whole_kit().push(wire)

    refused(await wire("GET", f"/v2/team/other/_modelkit/{kind}/v1"), 404, "NAME_UNKNOWN", "team/other")
    refused(await wire("GET", f"/v2/Team/_modelkit/{kind}/v1"), 400, "NAME_INVALID", "Team")


@pytest.mark.parametrize(
    ("kind", "query", "said"),
    [
        *((kind, "filter=weights", "invalid filter type weights") for kind in KINDS),
        *((kind, "filter=", "invalid filter type") for kind in KINDS),
        *((kind, "filter=docs:nope", "'docs:nope' chooses nothing; the kit has model_net") for kind in KINDS),
        *((kind, "filter=mcpservers", "chooses nothing") for kind in KINDS),
        *((kind, "filter=model:a:b", "should be in format") for kind in KINDS),
        ("files", "path=", "not a path pattern"),
        ("files", "path=../x", "not a path pattern"),
        ("archive", "path=" + "a" * 1025, "1025 characters"),
        ("archive", "&".join(["path=a"] * 33), "33 path= patterns; at most 32"),
        ("files", "n=x", "wanted a whole number"),
        ("files", "n=-1", "wanted a whole number"),
        ("files", "n=1&n=2", "given 2 times"),
        ("files", "prefix=a&prefix=b", "given 2 times"),
        ("files", "last=a&last=b", "given 2 times"),
        ("kitfile", "format=json&format=yaml", "given 2 times"),
        ("files", "&".join(["x=1"] * 129), "more than 128 query parameters"),
    ],
)
async def test_a_question_that_makes_no_sense_is_400_and_says_why(
    wire: Wire, kind: str, query: str, said: str
) -> None:
    await whole_kit().push(wire)

    refused(await wire("GET", f"{target_of(kind)}?{query}"), 400, "UNSUPPORTED", said)


async def test_filters_that_leave_nothing_of_a_slice_are_refused(wire: Wire) -> None:
    await whole_kit().push(wire)

    for target in (
        f"/v2/{NAME}/manifests/v1.only.model?filter=docs",
        target_of("files", "v1.only.model", filter="docs"),
        target_of("archive", "v1.only.kitfile", filter="model"),
    ):
        refused(
            await wire("GET", target), 400, "UNSUPPORTED", "choose nothing of what the tag's selectors leave"
        )
    assert files_in(await listed(wire, "v1.only.model", filter="model:lora")) == ["lora/adapter.bin"]


@pytest.mark.parametrize("pattern", ["nope", "*.csv", "model", "[", "**/*.CSV"])
async def test_patterns_that_fit_no_path_are_404_in_an_archive(wire: Wire, pattern: str) -> None:
    await push_pack(wire, packaging="raw")

    refused(await wire("GET", target_of("archive", path=pattern)), 404, "FILE_UNKNOWN", "no path")


@pytest.mark.parametrize(("layer", "said"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_hostile_layer_is_pushed_and_pulled_and_its_views_say_what_is_wrong(
    layer: bytes, said: str, compression: str | None
) -> None:
    kit = Kit()
    kit.add("model", "model", layer, compression=compression)
    kit.add("docs", "docs", tar_of({"docs/a": b"fine"}))
    if compression and said in {"gzip", "zstd"}:
        said = "before byte 512 of the layer" if said == "zstd" else "cut off"
    async with served(configured({"inmemory": {}})) as url:
        wire = Wire(url)
        await kit.push(wire)

        for _, _, blob, _ in kit.layers:
            assert await got(wire, f"/v2/{NAME}/blobs/{Digest.of(blob)}") == blob
        assert (await wire("GET", f"/v2/{NAME}/manifests/v1.only.model")).status == 200
        for target in (
            *(target_of(kind) for kind in ("files", "archive", "tensors")),
            target_of("files", file="model/f"),
            target_of("tensors", file="model/f.gguf"),
            *(f"/v2/{NAME}/manifests/v1.as.{form}" for form in ("image", "readable", "modelpack")),
            f"/v2/{NAME}/manifests/v1.only.model.as.image",
        ):
            refused(await wire("GET", target), 400, "MANIFEST_INVALID", said)
        assert (await wire("GET", target_of("kitfile"))).status == 200
        assert files_in(await listed(wire, "v1.only.docs")) == ["docs/a"]
        assert unpacked(await got(wire, target_of("archive", filter="docs"))) == {"docs/a": b"fine"}


async def test_L_21_a_layer_of_too_many_members_is_refused(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitspec.layer_tar.MEMBER_COUNT_MAX", 10)
    kit = Kit()
    kit.add("model", "m", tar_of({f"m/{number}": b"" for number in range(10)}))
    await kit.push(wire)

    refused(await wire("GET", target_of("files")), 400, "MANIFEST_INVALID", "more than 10 members")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"", "the config cannot be read"),
        (b"[]", "not an object"),
        (b'{"model": {"path": 1}}', "is not a string"),
        (b'{"model": {"path": "m"}}{', "the config cannot be read"),
        (b'{"docs": [{"path": "d"}]}', "and the manifest has"),
        (b'{"model": {"path": "m", "digest": "sha256:nope"}}', "not a digest"),
        (b'{"model": {"path": "m", "path": "n"}}', "stands twice"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested deeper"),
    ],
)
async def test_a_kit_whose_config_is_broken_says_so(wire: Wire, config: bytes, said: str) -> None:
    layer = tar_of({"m": b"1"})
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config, MODELKIT_CONFIG),
        "layers": [descriptor(layer, "application/vnd.kitops.modelkit.model.v1.tar")],
    }
    await push_manifest(wire, manifest, [config, layer])

    for kind in KINDS:
        refused(await wire("GET", target_of(kind)), 400, "MANIFEST_INVALID", said)
    assert (await wire("GET", f"/v2/{NAME}/manifests/v1")).status == 200


async def test_a_layer_type_that_nobody_knows_is_no_layer_of_an_entry(wire: Wire) -> None:
    kit = Kit()
    kit.add("model", "m", tar_of({"m": b"1"}))
    kind, entry, blob, media_type = kit.layers[0]
    kit.layers[0] = (kind, entry, blob, f"{media_type}+lz4")
    await kit.push(wire)

    refused(
        await wire("GET", target_of("files")),
        400,
        "MANIFEST_INVALID",
        "names 1 layers of kind model, and the manifest has 0",
    )


# ---- whose bytes they are


async def test_a_layer_that_the_repository_does_not_hold_is_not_read_for_it(serve: Serve) -> None:
    """Nor its table, which another repository has had made."""
    async with serve(manifests={"allowsparse": True}) as url:
        wire = Wire(url)
        kit = whole_kit()
        await kit.push(wire, "team/owner")
        await wire("GET", "/v2/team/owner/_modelkit/files/v1")
        await wire("GET", "/v2/team/owner/manifests/v1.as.modelpack")
        await wire.push_blob(NAME, kit.config)
        await wire.push_manifest(NAME, "v1", kit.manifest)

        for target in (
            *(target_of(kind) for kind in ("files", "archive", "tensors")),
            target_of("files", file="model/weights.bin"),
            *(f"/v2/{NAME}/manifests/v1.as.{form}" for form in ("image", "readable", "modelpack")),
            f"/v2/{NAME}/blobs/{Digest.of(WEIGHTS)}",
        ):
            refused(await wire("GET", target), 404, "BLOB_UNKNOWN")
        docs = next(layer for layer in kit.layers if layer[0] == "docs")[2]
        await wire.push_blob(NAME, docs)
        assert (
            await got(wire, target_of("files", "v1.only.docs", file="docs/README.md"))
            == FILES["docs/README.md"]
        )


async def test_a_config_that_a_sparse_manifest_says_nothing_true_of_is_not_read_whole(serve: Serve) -> None:
    async with serve(manifests={"allowsparse": True}) as url:
        wire = Wire(url)
        large = b" " * (17 * 1024 * 1024)
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(large, MODELKIT_CONFIG) | {"size": 2},
            "layers": [],
        }
        await wire.push_manifest(NAME, "v1", manifest)
        await wire.push_blob(NAME, large)

        refused(await wire("GET", target_of("kitfile")), 400, "MANIFEST_INVALID", "at most 16777216 are read")


async def test_files_go_with_their_kit(wire: Wire) -> None:
    digest = await whole_kit().push(wire)
    sliced = await wire("GET", f"/v2/{NAME}/manifests/v1.only.docs")
    assert (await wire("GET", target_of("files", sliced.header("Docker-Content-Digest")))).status == 200

    await wire("DELETE", f"/v2/{NAME}/manifests/{digest}")

    for reference in ("v1", digest, "v1.only.docs", sliced.header("Docker-Content-Digest")):
        for kind in KINDS:
            refused(await wire("GET", target_of(kind, reference)), 404, "MANIFEST_UNKNOWN")


# ---- slices of slices, and what was derived under other names


async def test_a_slice_of_a_slice_is_the_slice_of_its_source(wire: Wire) -> None:
    source = await whole_kit().push(wire)
    expected = await wire("GET", f"/v2/{NAME}/manifests/v1.only.docs")
    outer = await wire("GET", f"/v2/{NAME}/manifests/v1.only.docs.model.datasets_valid")
    digest = outer.header("Docker-Content-Digest")

    inner = await wire("GET", f"/v2/{NAME}/manifests/{digest}?filter=docs")
    for _ in range(3):
        digest = inner.header("Docker-Content-Digest")
        inner = await wire("GET", f"/v2/{NAME}/manifests/{digest}?filter=docs")

    assert inner.body == expected.body
    assert inner.header("Link") == f'</v2/{NAME}/manifests/{source}>; rel="canonical"'
    refused(
        await wire("GET", f"/v2/{NAME}/manifests/{digest}?filter=model"),
        400,
        "UNSUPPORTED",
        "chooses nothing",
    )


@pytest.mark.parametrize(
    "view", ["v1.as.image", "v1.as.readable", "v1.only.model.as.image", "v1.as.modelpack"]
)
async def test_whatever_is_derived_can_be_pushed_under_a_tag_of_its_own(wire: Wire, view: str) -> None:
    """As `crane tag` does: what it lists was said to be here."""
    source = await whole_kit("gzip").push(wire)
    reply = await wire("GET", f"/v2/{NAME}/manifests/{view}")

    pushed = await wire.put_manifest(NAME, "mine", reply.body, reply.header("Content-Type"))
    await wire("DELETE", f"/v2/{NAME}/manifests/{source}")

    assert pushed.status == 201, pushed.body
    found = await wire("GET", f"/v2/{NAME}/manifests/mine")
    assert found.body == reply.body
    manifests = [found.json()]
    for child in found.json().get("manifests", []):
        answer = await wire("GET", f"/v2/{NAME}/manifests/{child['digest']}")
        assert answer.status == 200
        assert "Link" not in answer.headers
        manifests.append(answer.json())
    for manifest in manifests:
        for blob in [*manifest.get("layers", []), *([manifest["config"]] if "config" in manifest else [])]:
            assert Digest.of(await got(wire, f"/v2/{NAME}/blobs/{blob['digest']}")) == blob["digest"]


# ---- caches, failures, many at once


def answers_of_views() -> list[str]:
    return [
        target_of("files"),
        target_of("files", n="2", prefix="m"),
        target_of("files", file="big/b.bin"),
        target_of("archive", path=["big/**", "**/*.json"]),
        target_of("archive", "v1.only.docs"),
        target_of("tensors"),
        *(
            f"/v2/{NAME}/manifests/v1.{view}"
            for view in ("only.docs", "as.image", "as.readable", "as.modelpack")
        ),
        f"/v2/{NAME}/blobs/{Digest.of(WEIGHTS)}",
    ]


def large_kit(compression: str | None = None) -> Kit:
    """With a layer whose table is kept."""
    kit = whole_kit(compression)
    chance = random.Random(3)
    big = tar_of({f"big/{letter}.bin": chance.randbytes(KEPT_SIZE_MIN) for letter in "ab"})
    kit.add("dataset", "big", big, name="big", compression=compression)
    return kit


@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_cache_that_is_deleted_at_any_moment_changes_no_answer(
    tmp_path: Path, compression: str | None
) -> None:
    async with served(configured({"filesystem": {"rootdirectory": str(tmp_path)}})) as url:
        wire = Wire(url)
        await large_kit(compression).push(wire)
        expected = [await got(wire, target) for target in answers_of_views()]
        cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert cached

        for target, body in zip(answers_of_views(), expected, strict=True):
            await asyncio.to_thread(shutil.rmtree, tmp_path / "cache", ignore_errors=True)
            assert await got(wire, target) == body

    for delete in (True, False):
        if delete:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        async with served(configured({"filesystem": {"rootdirectory": str(tmp_path)}})) as url:
            wire = Wire(url)
            for target, body in zip(answers_of_views(), expected, strict=True):
                assert await got(wire, target) == body


async def test_a_cache_that_is_deleted_again_and_again_under_many_questions_changes_no_answer(
    tmp_path: Path,
) -> None:
    storage = {"filesystem": {"rootdirectory": str(tmp_path)}}
    async with served(configured(storage)) as one, served(configured(storage)) as other:
        await large_kit().push(Wire(one))
        targets = answers_of_views()
        expected = [await got(Wire(one), target) for target in targets]
        is_over = asyncio.Event()

        async def delete() -> None:
            while not is_over.is_set():
                await asyncio.to_thread(shutil.rmtree, tmp_path / "cache", ignore_errors=True)
                await asyncio.sleep(0.001)

        deleting = asyncio.create_task(delete())
        try:
            for _ in range(3):
                found = await asyncio.gather(
                    *(got(Wire(url), target) for target in targets for url in (one, other))
                )
                assert found[::2] == found[1::2] == expected
        finally:
            is_over.set()
            await deleting


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"nope", b"x" * 5000, b'{"format": 1}\n'])
async def test_a_cache_that_is_damaged_changes_no_answer(tmp_path: Path, damage: bytes) -> None:
    storage = {"filesystem": {"rootdirectory": str(tmp_path)}}
    async with served(configured(storage)) as url:
        await large_kit("gzip").push(Wire(url))
        expected = [await got(Wire(url), target) for target in answers_of_views()]
    shutil.rmtree(tmp_path / "repositories" / "team" / "kit" / "_views")
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            path.write_bytes(damage)

    async with served(configured(storage)) as url:
        found = [await got(Wire(url), target) for target in answers_of_views()]

    assert found == expected


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Wire, WatchedBackend]]:
    """A registry over a store that is watched; it looks into layers only when it is asked."""
    backend = WatchedBackend()
    monkeypatch.setattr("registry.app.make_backend", lambda config: backend)
    monkeypatch.setattr("registry.kits.Kits.index_soon", lambda self, manifest: None)
    async with served(configured({"inmemory": {}})) as url:
        yield Wire(url), backend


@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_many_who_ask_at_once_have_a_layer_read_once(
    watched: tuple[Wire, WatchedBackend], compression: str | None
) -> None:
    wire, backend = watched
    kit = Kit()
    kit.add("model", "m", tar_of({"big": random.Random(4).randbytes(900_000)}), compression=compression)
    await kit.push(wire)
    blob = kit.layers[0][2]

    replies = await asyncio.gather(*(wire("GET", target_of("files")) for _ in range(20)))

    assert {reply.status for reply in replies} == {200}
    assert len({reply.body for reply in replies}) == 1
    assert backend.read_size <= len(blob) + 4 * 64 * 1024 + 20 * len(kit.config)


async def patched(wires: Iterable[Wire], blob: bytes, size: int) -> None:
    """Push a blob in chunks, each to the next of these workers."""
    wires = list(wires)
    target = await wires[0].begin_upload(NAME)
    for wire, start in zip(itertools.cycle(wires), range(0, len(blob), size), strict=False):
        chunk = blob[start : start + size]
        headers = {"Content-Range": f"{start}-{start + len(chunk) - 1}"}
        reply = await wire("PATCH", target, headers=headers, body=chunk)
        assert reply.status == 202, reply.body
        target = path_of(reply.header("Location"))
    assert (await wires[-1]("PUT", f"{target}?digest={Digest.of(blob)}")).status == 201


async def test_a_layer_that_came_in_many_requests_is_known_without_being_read(
    watched: tuple[Wire, WatchedBackend],
) -> None:
    wire, backend = watched
    kit = large_kit()
    layer = kit.layers[-1][2]
    await patched([wire], layer, 300_000)
    await kit.push(wire)

    head = await wire("HEAD", target_of("archive", filter="datasets:big"))

    assert head.header("Content-Length") == str(len(layer))
    assert backend.read_size == len(kit.config)


async def test_a_layer_that_several_workers_received_is_looked_into_afterwards(tmp_path: Path) -> None:
    storage = {"filesystem": {"rootdirectory": str(tmp_path)}}
    kit = large_kit()
    async with served(configured(storage)) as one, served(configured(storage)) as other:
        workers = [Wire(one), Wire(other)]
        await patched(workers, kit.layers[-1][2], 300_000)
        await kit.push(workers[0])

        for wire in workers:
            assert unpacked(await got(wire, target_of("archive", filter="datasets:big"))).keys() == {
                "big/a.bin", "big/b.bin",
            }  # fmt: skip


async def test_patterns_are_compared_where_they_keep_nobody_waiting(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    await whole_kit().push(wire)
    matches, threads = PathGlob.matches, set()

    def noted(glob: PathGlob, path: str) -> bool:
        threads.add(threading.current_thread())
        return matches(glob, path)

    monkeypatch.setattr(PathGlob, "matches", noted)
    for kind in ("files", "archive"):
        assert (await wire("GET", target_of(kind, path="**"))).status == 200

    assert threads
    assert threading.main_thread() not in threads


async def test_a_client_that_leaves_does_not_stop_the_others(watched: tuple[Wire, WatchedBackend]) -> None:
    wire, backend = watched
    await whole_kit("gzip").push(wire)
    backend.gate.clear()
    backend.is_waiting.clear()
    request = f"GET {target_of('archive')} HTTP/1.1\r\nHost: {wire.host}\r\n\r\n".encode()
    _, leaving = await asyncio.open_connection(wire.host, wire.port)
    leaving.write(request)
    await leaving.drain()
    staying = asyncio.create_task(wire("GET", target_of("archive")))
    await backend.is_waiting.wait()

    leaving.close()
    await asyncio.sleep(0)
    backend.gate.set()
    reply = await staying

    assert unpacked(reply.body) == FILES


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_a_store_that_fails_gives_503_and_is_not_remembered(
    watched: tuple[Wire, WatchedBackend], compression: str | None
) -> None:
    wire, backend = watched
    kit = whole_kit(compression)
    await kit.push(wire)
    config = layout.blob_key(Digest.of(kit.config))
    backend.is_failing = lambda action, key: action == "deliver" and key != config
    targets = [
        target_of("files"),
        target_of("files", file="docs/README.md"),
        *(f"/v2/{NAME}/manifests/v1.as.{form}" for form in ("image", "readable", "modelpack")),
        target_of("archive", path="**/*.json"),
    ]

    for target in targets:
        reply = await wire("GET", target)
        refused(reply, 503, "UNAVAILABLE", "try again later")
        assert reply.header("Retry-After")
    backend.is_failing = lambda action, key: False

    for target in targets:
        assert (await wire("GET", target)).status == 200


@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_store_that_fails_before_the_first_byte_of_a_known_file_gives_503(
    watched: tuple[Wire, WatchedBackend], compression: str | None
) -> None:
    wire, backend = watched
    await whole_kit(compression).push(wire)
    targets = [target_of("files", file="docs/README.md"), target_of("archive", path="docs/*")]
    expected = [await got(wire, target) for target in targets]
    backend.is_failing = lambda action, key: action == "deliver"

    for target in targets:
        refused(await wire("GET", target), 503, "UNAVAILABLE", "try again later")
    backend.is_failing = lambda action, key: False

    assert [await got(wire, target) for target in targets] == expected


async def test_a_store_that_fails_half_way_breaks_the_answer_off(
    watched: tuple[Wire, WatchedBackend],
) -> None:
    wire, backend = watched
    await large_kit().push(wire)
    whole = await got(wire, target_of("archive"))
    count = itertools.count()
    backend.is_failing = lambda action, key: action == "deliver" and next(count) == 3

    request = f"GET {target_of('archive')} HTTP/1.1\r\nHost: {wire.host}\r\n\r\n".encode()
    answer = await wire.converse([request])
    backend.is_failing = lambda action, key: False

    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(whole)}".encode() in head
    assert len(body) < len(whole)
    assert whole.startswith(body)
    rest = await wire("GET", target_of("archive"), headers={"Range": f"bytes={len(body)}-"})
    assert body + rest.body == whole


# ---- whatever a client sends

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "v1",
        "model",
        "docs",
        "datasets:train set",
        "..",
        "%2e",
        "**/*",
        "[",
        "0",
        "-1",
        "1" * 30,
        "sha256:" + "0" * 64,
        "\0",
        "a" * 300,
    ]
)
PAIRS = st.lists(
    st.tuples(st.sampled_from(["filter", "path", "prefix", "n", "last", "name", "format", "x"]), TEXTS),
    max_size=5,
)
REFERENCES = (
    st.sampled_from(["v1", "old", "pack", "hostile", "v1.only.docs", "v1.as.image", "nope"])
    | TEXTS
    | st.lists(st.sampled_from(["v1", "only", "as", "model", "model_net", "image", "modelpack", "", "_", "kitfile", "x"]), max_size=7).map(".".join)
)  # fmt: skip
ESCAPES = st.sampled_from(["", "/", " /()[]*~:;,=@&+$!'"])


@pytest.fixture
async def anything(registry_url: str) -> Wire:
    wire = Wire(registry_url)
    await whole_kit().push(wire)
    await push_old_kit(wire, "old")
    await push_pack(wire, packaging="raw+gzip", tag="pack")
    kit = Kit()
    kit.add("model", "m", HOSTILE["T_03_a_link_inside"][0])
    await kit.push(wire, tag="hostile")
    return wire


FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def answered(reply: Reply) -> None:
    """A client's mistake is told to the client; nothing that is sent makes us fail."""
    if reply.status >= 400:
        assert reply.status in {400, 404, 405, 414, 416}
        for code in reply.codes:
            refused(reply, reply.status, code)
    else:
        assert reply.status in {200, 206}


@FUZZED
@given(
    kind=st.sampled_from(KINDS),
    reference=REFERENCES,
    path=st.none() | TEXTS | st.sampled_from(sorted(FILES)),
    pairs=PAIRS,
    safe=ESCAPES,
)
async def test_no_question_to_the_extension_makes_us_fail(
    anything: Wire, *, kind: str, reference: str, path: str | None, pairs: list[tuple[str, str]], safe: str
) -> None:
    target = f"/v2/{NAME}/_modelkit/{kind}/{quote(reference, safe=safe)}"
    if path is not None:
        target += f"/{quote(path, safe=safe)}"

    answered(await anything("GET", f"{target}?{urlencode(pairs)}"))


@FUZZED
@given(reference=REFERENCES, filters=st.lists(TEXTS, max_size=3), safe=ESCAPES)
async def test_no_view_that_is_asked_for_makes_us_fail(
    anything: Wire, reference: str, filters: list[str], safe: str
) -> None:
    query = urlencode([("filter", text) for text in filters])

    answered(await anything("GET", f"/v2/{NAME}/manifests/{quote(reference, safe=safe)}?{query}"))


@FUZZED
@given(rest=st.text(st.sampled_from("/_modelkitfsarchv1.%2e0+?#&=;~\\\"'<>[]{}|^` "), max_size=40))
async def test_no_path_below_the_extension_makes_us_fail(anything: Wire, rest: str) -> None:
    target = f"/v2/{NAME}/_modelkit/{rest}"
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()

    answer = await anything.converse([request])

    assert answer.split(b" ", 2)[1][:1] in {b"2", b"4"}
    assert b"Traceback" not in answer


@FUZZED
@given(
    field=st.sampled_from(["Range", "If-Range", "If-Match", "If-None-Match", "Accept"]),
    value=st.text(st.sampled_from('bytes=0123456789-, "*W/;qapliton'), max_size=30),
    kind=st.sampled_from(["files", "kitfile", "archive"]),
)
async def test_no_header_makes_us_fail(anything: Wire, field: str, value: str, kind: str) -> None:
    path = "model/weights.bin" if kind == "files" else ""

    reply = await anything("GET", target_of(kind, file=path), headers={field: value.strip()})

    assert reply.status in {200, 206, 304, 412, 416}

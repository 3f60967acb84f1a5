"""The Hugging Face Hub's read API over ModelKits, as a client of it sees the registry.

What is asked and expected is what huggingface_hub 0.23 to 2.4 do; tests/end_to_end/test_hub_clients.py runs them.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.layer_tar import TRAILER
from registry import hub_info
from registry.api import hub
from tests.kitclient.tars import file_of, header
from tests.registry.conftest import Serve, configured, served
from tests.registry.kits import Kit, tar_of
from tests.registry.wire import (
    OCI_MANIFEST,
    Reply,
    Wire,
    assert_discreet,
    assert_refused,
    encode,
    index,
    path_of,
)

NAME = "team/llm"
CARD = b"---\npipeline_tag: text-generation\nlicense: mit\ntags: [tiny, test]\nlanguage: en\ndatasets:\n- wiki\n---\n# Tiny\n"


def safetensors(**shapes: tuple[str, list[int]]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = {"F32": 4, "BF16": 2}[dtype]
        for length in shape:
            size *= length
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + bytes(offset)


WEIGHTS = safetensors(a=("F32", [2, 3]), b=("BF16", [5]), c=("F32", []))
MODEL = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": WEIGHTS,
    "tokenizer/vocab.txt": b"a\nb\n",
}
BESIDE = {
    "README.md": CARD,
    "code/train.py": b"print()\n",
    "data/train.csv": b"a,b\n1,2\n",
    "docs/guide.md": b"# Guide\n",
}
SHOWN = {**MODEL, **BESIDE}
SECTIONS = {
    "README.md": "docs",
    "code/train.py": "code",
    "data/train.csv": "dataset",
    "docs/guide.md": "docs",
}


def kit_of(
    model: Mapping[str, bytes] = MODEL,
    beside: Mapping[str, bytes] = BESIDE,
    *,
    model_path: str = "./model/",
    compression: str | None = None,
    **annotations: str,
) -> Kit:
    """A kit with its model in the folder `model`."""
    kit = Kit()
    kit.annotations |= annotations
    kit.add(
        "model",
        model_path,
        tar_of({f"model/{path}": content for path, content in model.items()}),
        compression=compression,
    )
    for path, content in beside.items():
        kind = SECTIONS.get(path, "docs")
        kit.add(kind, path, tar_of({path: content}), name="train" if kind == "dataset" else "")
    return kit


def files_kit(files: Mapping[str, bytes], model_path: str) -> Kit:
    """A kit whose one layer is its model's, with files anywhere."""
    kit = Kit()
    kit.add("model", model_path, tar_of(files))
    return kit


def commit_of(digest: Digest) -> str:
    return digest.encoded[:40]


@pytest.fixture
def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


async def shown(
    wire: Wire, id_: str = NAME, revision: str = "main", kind: str = "models"
) -> dict[str, bytes]:
    """Every file of the tree, read."""
    entries = await tree(wire, f"/hf/api/{kind}/{id_}/tree/{quote(revision, safe='')}?recursive=true")
    below = "datasets/" if kind == "datasets" else ""
    found = {}
    for entry in entries:
        if entry["type"] == "file":
            reply = await wire(
                "GET", f"/hf/{below}{id_}/resolve/{quote(revision, safe='')}/{quote(entry['path'])}"
            )
            assert reply.status == 200, reply.body
            assert Digest.of(reply.body).encoded == entry["lfs"]["oid"]
            assert len(reply.body) == entry["size"]
            found[entry["path"]] = reply.body
    return found


async def tree(wire: Wire, target: str) -> list[dict[str, Any]]:
    """All pages of a tree or of a list."""
    entries: list[dict[str, Any]] = []
    following: str | None = target
    while following is not None:
        reply = await wire("GET", following)
        assert reply.status == 200, reply.body
        entries += reply.json()
        link = reply.headers.get("Link")
        if link is None:
            break
        match = re.fullmatch(r'<(http://[^<>]+)>; rel="next"', link)
        assert match is not None, link
        following = path_of(match[1])
    return entries


async def info(wire: Wire, id_: str = NAME, query: str = "", kind: str = "models") -> dict[str, Any]:
    reply = await wire("GET", f"/hf/api/{kind}/{id_}{query}")
    assert reply.status == 200, reply.body
    document = reply.json()
    assert isinstance(document, dict)
    return document


async def resolved(
    wire: Wire, path: str, revision: str = "main", method: str = "GET", **headers: str
) -> Reply:
    return await wire(method, f"/hf/{NAME}/resolve/{revision}/{path}", headers=headers)


def assert_hub_error(reply: Reply, code: str | None, status: int = 404, said: str = "") -> None:
    """An error that clients make the right exception of."""
    assert reply.status == status, reply.body
    assert_discreet(reply)
    assert reply.headers.get("X-Error-Code") == code, reply.body
    message = reply.header("X-Error-Message")
    assert said in message, message
    assert message.isascii()
    assert message == reply.json()["errors"][0]["message"][:1024]


# --- files and where they are shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_files_of_the_model_are_at_the_root_and_others_at_their_paths(
    wire: Wire, compression: str | None
) -> None:
    await kit_of(compression=compression).push(wire, NAME)

    assert await shown(wire) == SHOWN
    assert await shown(wire, kind="datasets") == SHOWN


@pytest.mark.parametrize(
    "model_path", ["model", "./model", "./model/", "model/model.safetensors", "./model/config.json"]
)
async def test_the_models_folder_is_its_path_or_the_folder_of_its_file(wire: Wire, model_path: str) -> None:
    await kit_of(model_path=model_path).push(wire, NAME)

    assert await shown(wire) == SHOWN


@pytest.mark.parametrize("model_path", [".", "./", "config.json", "./config.json"])
async def test_a_model_at_the_kits_root_moves_nothing(wire: Wire, model_path: str) -> None:
    files = {"config.json": b"{}", "sub/x.bin": b"x", "docs/a.md": b"a"}
    await files_kit(files, model_path).push(wire, NAME)

    assert await shown(wire) == files


async def test_a_kit_without_a_model_is_shown_as_it_is(wire: Wire) -> None:
    kit = Kit()
    kit.add("dataset", "data", tar_of({"data/a.csv": b"a", "data/b.csv": b"b"}), name="d")
    await kit.push(wire, NAME)

    assert await shown(wire, kind="datasets") == {"data/a.csv": b"a", "data/b.csv": b"b"}


async def test_a_path_that_is_nowhere_in_the_model_layer_moves_nothing(wire: Wire) -> None:
    await files_kit({"other/a": b"a"}, "../model").push(wire, NAME)

    assert await shown(wire) == {"other/a": b"a"}


async def test_a_file_is_shown_at_one_path_only(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    assert (await resolved(wire, "config.json")).status == 200
    assert_hub_error(await resolved(wire, "model/config.json"), "EntryNotFound")


async def test_of_two_files_at_one_path_the_models_is_shown(wire: Wire) -> None:
    model = {
        "README.md": b"the model's",
        "data": b"a file",
        "docs/guide.md": b"the model's",
        "lib/x": b"x",
        "x/y/z": b"z",
    }
    beside = {**BESIDE, "lib": b"beside", "x/y": b"beside", "x/other": b"beside"}
    await kit_of(model, beside).push(wire, NAME)

    found = await shown(wire)

    # What the model has as a file is no folder, and the other way round.
    assert found == {**model, "code/train.py": BESIDE["code/train.py"], "x/other": b"beside"}
    for hidden in ("data/train.csv", "lib", "x/y"):
        assert_hub_error(await resolved(wire, hidden), "EntryNotFound")
    assert (await resolved(wire, "README.md", "v1.only.docs")).body == CARD


async def test_with_the_root_of_the_kit_every_file_is_at_its_path_in_the_kit(serve: Serve) -> None:
    async with serve(hub={"root": "kit"}) as url:
        wire = Wire(url)
        await kit_of().push(wire, NAME)

        assert await shown(wire) == {
            **{f"model/{path}": content for path, content in MODEL.items()},
            **BESIDE,
        }


async def test_a_modelpack_is_shown_like_a_kit(wire: Wire) -> None:
    await kit_of().push(wire, NAME)
    pack = await wire("GET", f"/v2/{NAME}/manifests/v1.as.modelpack")
    await wire.put_manifest(NAME, "pack", pack.body, OCI_MANIFEST)

    found = await shown(wire, revision="pack")

    assert set(found.values()) == set(SHOWN.values())
    assert found["config.json"] == MODEL["config.json"]


async def test_a_file_of_two_layers_that_differ_is_listed_once_and_refused(wire: Wire) -> None:
    kit = kit_of(beside={})
    for section, content in (("code", b"one"), ("docs", b"other")):
        kit.add(section, "both.txt", tar_of({"both.txt": content}))
    await kit.push(wire, NAME)

    listed = await tree(wire, f"/hf/api/models/{NAME}/tree/main")

    assert [entry["path"] for entry in listed].count("both.txt") == 1
    assert_hub_error(await resolved(wire, "both.txt"), None, 400, "different files")
    assert (await resolved(wire, "both.txt", "v1.only.code")).body == b"one"


# --- resolve ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["resolve", "raw"])
async def test_a_file_comes_with_what_clients_keep_it_by(wire: Wire, word: str) -> None:
    digest = await kit_of().push(wire, NAME)
    etag = Digest.of(WEIGHTS).encoded

    head = await wire(
        "HEAD", f"/hf/{NAME}/{word}/v1/model.safetensors", headers={"Accept-Encoding": "identity"}
    )
    got = await wire("GET", f"/hf/{NAME}/{word}/v1/model.safetensors")

    assert (head.body, got.body) == (b"", WEIGHTS)
    for reply in (head, got):
        assert reply.status == 200
        assert reply.header("X-Repo-Commit") == commit_of(digest)
        assert reply.header("ETag") == reply.header("X-Linked-ETag") == f'"{etag}"'
        assert reply.header("Content-Length") == reply.header("X-Linked-Size") == str(len(WEIGHTS))
        assert reply.header("Accept-Ranges") == "bytes"
        assert reply.header("Content-Disposition") == "attachment; filename*=UTF-8''model.safetensors"
        assert reply.header("X-Content-Type-Options") == "nosniff"
        assert "X-Xet-Hash" not in reply.headers
        assert "Location" not in reply.headers


async def test_a_range_of_a_file_is_that_part(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    part = await resolved(wire, "model.safetensors", Range="bytes=8-15")
    size = await resolved(wire, "model.safetensors", Range="bytes=0-0")
    beyond = await resolved(wire, "model.safetensors", Range=f"bytes={len(WEIGHTS)}-")

    assert (part.status, part.body) == (206, WEIGHTS[8:16])
    assert part.header("Content-Range") == f"bytes 8-15/{len(WEIGHTS)}"
    assert size.header("Content-Range") == f"bytes 0-0/{len(WEIGHTS)}"
    assert_refused(beyond, 416)
    assert beyond.header("Content-Range") == f"bytes */{len(WEIGHTS)}"


async def test_a_file_that_is_known_is_not_sent_again(wire: Wire) -> None:
    digest = await kit_of().push(wire, NAME)
    etag = f'"{Digest.of(WEIGHTS).encoded}"'

    reply = await resolved(wire, "model.safetensors", **{"If-None-Match": etag})

    assert (reply.status, reply.body) == (304, b"")
    assert reply.header("X-Repo-Commit") == commit_of(digest)


async def test_head_reads_no_layer_whose_table_is_there(tmp_path: Path) -> None:
    kit = kit_of(beside={})
    blob = Digest.of(kit.layers[0][2])
    async with served(configured({"filesystem": {"rootdirectory": str(tmp_path)}})) as url:
        wire = Wire(url)
        await kit.push(wire, NAME)
        before = await resolved(wire, "model.safetensors")
        stored = tmp_path / "blobs" / "sha256" / blob.encoded[:2] / blob.encoded
        stored.chmod(0o600)
        stored.write_bytes(bytes(stored.stat().st_size))

        after = await resolved(wire, "model.safetensors", method="HEAD")

        assert after.header("ETag") == before.header("ETag")


async def test_an_empty_file_is_a_file(wire: Wire) -> None:
    await kit_of({"empty.txt": b"", "config.json": b"{}"}).push(wire, NAME)

    reply = await resolved(wire, "empty.txt")

    assert (reply.status, reply.body) == (200, b"")


async def test_a_name_with_any_character_is_found_by_its_escapes(wire: Wire) -> None:
    names = [
        "a b.txt",
        "ü/ö.txt",
        "100%.txt",
        "q?.txt",
        "#.txt",
        "a+b.txt",
        "c%2Fd.txt",
        "日本.md",
        "'\".txt",
    ]
    await kit_of({name: name.encode() for name in names}, {}).push(wire, NAME)

    assert await shown(wire) == {name: name.encode() for name in names}
    reply = await resolved(wire, quote("ü/ö.txt", safe=""))
    assert reply.body == "ü/ö.txt".encode()
    assert reply.header("Content-Disposition") == "attachment; filename*=UTF-8''%C3%B6.txt"


@pytest.mark.parametrize(
    "path",
    ["absent", "tokenizer", "tokenizer/", "config.json/", "/config.json", "./config.json", "../model/config.json",
     "tokenizer/../config.json", "%2e%2e/config.json", "%00", "config.json%00", "%ff", "config%0a.json", "%5c", "a" * 5000,
     "/".join("a" * 300), "Kitfile", "CONFIG.JSON"],
)  # fmt: skip
async def test_a_file_that_is_not_there_is_not_found(wire: Wire, path: str) -> None:
    digest = await kit_of().push(wire, NAME)

    for method in ("GET", "HEAD"):
        reply = await resolved(wire, path, method=method)
        assert reply.status == 404
        assert reply.header("X-Error-Code") == "EntryNotFound"
        # Clients remember for this commit that there is no such file.
        assert reply.header("X-Repo-Commit") == commit_of(digest)
        assert len(reply.header("X-Error-Message")) <= 1024


# --- revisions --------------------------------------------------------------------------------------------------------


async def commit_at(wire: Wire, revision: str, name: str = NAME) -> str:
    reply = await wire("HEAD", f"/hf/{name}/resolve/{quote(revision, safe='')}/config.json")
    assert reply.status == 200, reply.headers.get("X-Error-Message")
    commit = reply.header("X-Repo-Commit")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert (await info(wire, name, f"/revision/{quote(revision, safe='')}"))["sha"] == commit
    return commit


async def test_main_is_latest_then_main_then_what_was_tagged_last(wire: Wire) -> None:
    digests = [
        await kit_of(n=str(n)).push(wire, NAME, tag) for n, tag in enumerate(["v1", "v2", "main", "latest"])
    ]

    assert await commit_at(wire, "main") == commit_of(digests[3])
    await wire("DELETE", f"/v2/{NAME}/manifests/latest")
    await kit_of(n="later").push(wire, NAME, "v3")
    assert await commit_at(wire, "main") == commit_of(digests[2])
    await wire("DELETE", f"/v2/{NAME}/manifests/main")
    last = await kit_of(n="last").push(wire, NAME, "v1")
    assert await commit_at(wire, "main") == commit_of(last)
    assert (await info(wire))["sha"] == commit_of(last)


def set_times(folder: Path, **times: int) -> None:
    for tag, seconds in times.items():
        os.utime(folder / "repositories" / NAME / "_tags" / tag, (seconds, seconds))


async def test_what_was_tagged_last_at_the_same_moment_is_no_main_unless_it_is_the_same(
    tmp_path: Path,
) -> None:
    async with served(configured({"filesystem": {"rootdirectory": str(tmp_path)}})) as url:
        wire = Wire(url)
        one = await kit_of(n="1").push(wire, NAME, "v1")
        await kit_of(n="2").push(wire, NAME, "v2")

        set_times(tmp_path, v1=2000, v2=2000)
        assert_hub_error(await wire("GET", f"/hf/api/models/{NAME}"), "RevisionNotFound", said="v1, v2")
        set_times(tmp_path, v1=2000, v2=1000)
        assert await commit_at(wire, "main") == commit_of(one)
        await kit_of(n="1").push(wire, NAME, "also-v1")
        set_times(tmp_path, v1=2000, **{"also-v1": 2000})
        assert await commit_at(wire, "main") == commit_of(one)


async def test_signatures_and_images_are_no_main(wire: Wire) -> None:
    digest = await kit_of().push(wire, NAME)
    await wire.push_image(NAME, "image")
    await kit_of(n="signature").push(wire, NAME, f"sha256-{digest.encoded}.sig")

    assert await commit_at(wire, "main") == commit_of(digest)


async def test_every_form_of_a_revision_finds_its_kit(wire: Wire) -> None:
    digest = await kit_of().push(wire, NAME, "v1.0_rc-1")
    await kit_of(n="other").push(wire, NAME, "latest")

    for revision in (
        "v1.0_rc-1",
        "refs/tags/v1.0_rc-1",
        commit_of(digest),
        digest.encoded,
        f"sha256-{digest.encoded}",
        str(digest),
        "v1.0_rc-1.as.image",
    ):
        assert await commit_at(wire, revision) == commit_of(digest)
    assert await commit_at(wire, "refs/heads/main") == await commit_at(wire, "latest")


async def test_a_commit_stays_what_it_was_when_its_tag_moves_or_goes(wire: Wire) -> None:
    await kit_of().push(wire, NAME)
    commit = await commit_at(wire, "main")
    await kit_of({"config.json": b"another"}, {}).push(wire, NAME)

    assert (await resolved(wire, "config.json")).body == b"another"
    assert await shown(wire, revision=commit) == SHOWN
    await wire("DELETE", f"/v2/{NAME}/manifests/v1")
    assert await shown(wire, revision=commit) == SHOWN


async def test_a_slice_is_a_revision_with_a_commit_of_its_own(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    commit = await commit_at(wire, "v1.only.model")

    assert commit != await commit_at(wire, "v1")
    assert commit == await commit_at(wire, "main.only.model")
    for revision in ("v1.only.model", commit):
        assert await shown(wire, revision=revision) == MODEL
    assert await shown(wire, revision="v1.only.datasets_train.code") == {
        path: BESIDE[path] for path in ("data/train.csv", "code/train.py")
    }
    assert_hub_error(await resolved(wire, "config.json", "v1.only.docs"), "EntryNotFound")


async def test_a_slices_commit_is_known_after_a_restart(tmp_path: Path) -> None:
    config = configured({"filesystem": {"rootdirectory": str(tmp_path)}})
    async with served(config) as url:
        await kit_of().push(Wire(url), NAME)
        commit = await commit_at(Wire(url), "v1.only.model")

    async with served(config) as url:
        assert await shown(Wire(url), revision=commit) == MODEL


async def test_a_manifest_under_sha512_has_a_commit_too(wire: Wire) -> None:
    kit = kit_of()
    await kit.push(wire, NAME)
    content = encode(kit.manifest)
    digest = Digest.of(content, "sha512")
    await wire.put_manifest(NAME, f"{digest}?tag=long", content, OCI_MANIFEST)

    assert await commit_at(wire, "long") == digest.encoded[:40]
    assert await commit_at(wire, digest.encoded[:40]) == digest.encoded[:40]


HOSTILE_REVISIONS = [
    "v99", "0" * 40, "0" * 64, "f" * 39, "sha256-", "sha256:" + "0" * 63, "sha512:" + "0" * 128, "refs/pr/1", "refs/heads/dev",
    "refs/tags/", "refs/tags/refs/tags/v1", "HEAD", "V1", "v1.only.nothing", "v1.only.", "v1.as.", "v1.as.nothing", "v1.only.model_x",
    ".", "..", "../v1", "a" * 129, "a" * 4000, "\0", "v1\n", "v1\r\nX-A: b", "\u212a", "ü", "%", "%2e", " ", "*", "main.only.model" * 20,
]  # fmt: skip


@pytest.mark.parametrize("revision", HOSTILE_REVISIONS, ids=range(len(HOSTILE_REVISIONS)))
async def test_a_revision_that_is_not_there_is_not_found(wire: Wire, revision: str) -> None:
    await kit_of().push(wire, NAME)
    escaped = quote(revision, safe="")

    for target in (
        f"/hf/{NAME}/resolve/{escaped}/config.json",
        f"/hf/api/models/{NAME}/revision/{escaped}",
        f"/hf/api/models/{NAME}/tree/{escaped}",
        f"/hf/api/models/{NAME}/commits/{escaped}",
    ):
        reply = await wire("GET", target)
        assert_hub_error(reply, "RevisionNotFound")
    assert_hub_error(await paths_info(wire, {"paths": "x"}, revision=escaped), "RevisionNotFound")


async def test_a_revision_that_is_not_there_is_answered_by_those_that_are(wire: Wire) -> None:
    for tag in ("v1", "v2"):
        await kit_of().push(wire, NAME, tag)

    assert_hub_error(await resolved(wire, "config.json", "v3"), "RevisionNotFound", said="tags v1, v2")


async def test_what_is_no_kit_is_no_revision(wire: Wire) -> None:
    _, digest = await wire.push_image(NAME, "v1")
    await wire.push_manifest(NAME, "all", index())

    for revision in ("v1", "all", "main", commit_of(digest), str(digest)):
        assert_hub_error(await resolved(wire, "config.json", revision), "RevisionNotFound")
    refs = await wire("GET", f"/hf/api/models/{NAME}/refs")
    assert refs.json() == {"branches": [], "tags": [], "converts": []}


async def test_a_repository_with_blobs_only_has_no_revision(wire: Wire) -> None:
    await wire.push_blob(NAME, b"x")

    assert_hub_error(await wire("GET", f"/hf/api/models/{NAME}"), "RevisionNotFound", said="it has no tags")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "endpoint", "id_"),
    [
        ("gpt2", "", "gpt2"),
        ("ns/name", "", "ns/name"),
        ("a/b/c/d", "/a/b", "c/d"),
        ("a/b/c/d", "/a/b/c", "d"),
        ("qwen/qwen3-8b", "", "Qwen/Qwen3-8B"),
        ("a/datasets/x/y", "", "a/datasets/x/y"),
    ],
)
async def test_endpoint_and_id_together_are_the_repository(
    wire: Wire, name: str, endpoint: str, id_: str
) -> None:
    await kit_of().push(wire, name)

    for below, kind in (("", "models"), ("datasets/", "datasets")):
        file = await wire("GET", f"/hf{endpoint}/{below}{id_}/resolve/main/config.json")
        if id_.count("/") > 1:  # no client has such an id: what is before the last two is the endpoint
            assert_hub_error(file, "RepoNotFound")
            continue
        reply = await wire("GET", f"/hf{endpoint}/api/{kind}/{id_}")
        assert file.body == MODEL["config.json"]
        assert reply.json()["id"] == id_.lower()
        assert [entry["id"] for entry in await tree(wire, f"/hf{endpoint}/api/{kind}")] == [id_.lower()]


@pytest.mark.parametrize(
    "name",
    [
        "nobody/nothing",
        "nobody",
        "a..b/c",
        "-a/b",
        "a%2Fb",
        "%2e%2e/a",
        "../a",
        "a/b%00",
        "a" * 300,
        "a/" * 200 + "b",
        "_a/b",
    ],
)
async def test_a_repository_that_is_not_there_is_not_found(wire: Wire, name: str) -> None:
    await kit_of().push(wire, NAME)

    for method in ("GET", "HEAD"):
        reply = await wire(method, f"/hf/{name}/resolve/main/config.json")
        assert (reply.status, reply.header("X-Error-Code")) == (404, "RepoNotFound")
    if name.count("/") < 2:
        for rest in ("", "/refs", "/tree/main", "/revision/v1", "/commits/v1", "/auth-check"):
            assert_hub_error(await wire("GET", f"/hf/api/models/{name}{rest}"), "RepoNotFound")


# --- about a kit ------------------------------------------------------------------------------------------------------


async def test_information_is_complete(wire: Wire) -> None:
    kit = kit_of(**{"org.opencontainers.image.created": "2026-01-02T03:04:05+02:00"})
    digest = await kit.push(wire, NAME)

    document = await info(wire)

    size = sum(len(blob) for _, _, blob, _ in kit.layers)
    assert document == {
        "_id": digest.encoded[:24],
        "id": NAME,
        "modelId": NAME,
        "author": "team",
        "sha": commit_of(digest),
        "lastModified": "2026-01-02T01:04:05.000Z",
        "createdAt": "2026-01-02T01:04:05.000Z",
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "usedStorage": size,
        "tags": [
            "transformers",
            "text-generation",
            "tiny",
            "test",
            "en",
            "dataset:wiki",
            "license:mit",
            "safetensors",
        ],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "cardData": {
            "pipeline_tag": "text-generation",
            "license": "mit",
            "tags": ["tiny", "test"],
            "language": "en",
            "datasets": ["wiki"],
        },
        "siblings": [{"rfilename": path} for path in sorted(SHOWN)],
    }


async def test_a_datasets_information_has_nothing_of_a_model(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    document = await info(wire, kind="datasets")

    assert document["id"] == NAME
    assert document["cardData"]["license"] == "mit"
    assert not {"modelId", "pipeline_tag", "library_name", "safetensors"} & set(document)


async def test_information_with_blobs_has_the_size_and_the_digest_of_each_file(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    document = await info(wire, query="?blobs=true")

    for sibling in document["siblings"]:
        content = SHOWN[sibling["rfilename"]]
        assert sibling["size"] == sibling["lfs"]["size"] == len(content)
        assert sibling["lfs"]["sha256"] == Digest.of(content).encoded
        assert re.fullmatch("[0-9a-f]{40}", sibling["blobId"])


async def test_expanded_information_has_the_fields_that_were_asked_for(wire: Wire) -> None:
    digest = await kit_of().push(wire, NAME)

    document = await info(wire, query="?expand=safetensors&expand=sha&expand[]=tags&expand=unheardOf")

    assert set(document) == {"_id", "id", "safetensors", "sha", "tags"}
    assert document["sha"] == commit_of(digest)
    assert document["safetensors"] == {"parameters": {"F32": 7, "BF16": 5}, "total": 12}


async def test_parameters_that_cannot_be_counted_are_left_out(wire: Wire) -> None:
    await kit_of({**MODEL, "broken.safetensors": b"\xff" * 64}).push(wire, NAME)

    assert set(await info(wire, query="?expand=safetensors")) == {"_id", "id"}


async def test_more_files_than_may_be_listed_are_not_listed_in_part(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_info, "SIBLINGS_MAX", len(SHOWN) - 1)
    await kit_of().push(wire, NAME)

    document = await info(wire)

    # Without the field clients ask for the tree, or fail; half of the files they would take for all.
    assert "siblings" not in document
    assert "safetensors" not in await info(wire, query="?expand=safetensors")
    assert await shown(wire) == SHOWN


async def test_without_a_date_in_the_manifest_the_tags_counts(tmp_path: Path) -> None:
    async with served(configured({"filesystem": {"rootdirectory": str(tmp_path)}})) as url:
        wire = Wire(url)
        for n, stated in enumerate(["", "yesterday", "2026-01-02T03:04:05", "0001-01-01T00:00:00+23:00"]):
            await kit_of(**{"org.opencontainers.image.created": stated, "n": str(n)}).push(wire, NAME)
            set_times(tmp_path, v1=1_700_000_000)

            assert (await info(wire))["lastModified"] == "2023-11-14T22:13:20.000Z"


@pytest.mark.parametrize(
    "card",
    [b"", b"---", b"---\n", b"---\n---\n", b"# no metadata", b"---\n- a\n- b\n---\n", b"---\na: [\n---\n", b"---\n\xff: a\n---\n",
     b"---\na: &a [*a]\n---\n", b"---\na: 1\na: 2\n---\n", b"---\n!!python/object/apply:os.system [id]\n---\n", b"---\na: " + b"[" * 10_000 + b"\n---\n",
     b"---\n" + b"a" * 300_000, b"---\n" + b"".join(b"k%d: &k%d [%s]\n" % (i, i, b",".join([b"*k%d" % (i - 1) if i else b"x"] * 9)) for i in range(8)) + b"---\n"],
    ids=range(14),
)  # fmt: skip
async def test_a_card_that_cannot_be_read_is_no_card(wire: Wire, card: bytes) -> None:
    await kit_of(beside={"README.md": card}).push(wire, NAME)

    document = await info(wire)

    assert "cardData" not in document
    assert document["tags"] == ["transformers", "safetensors"]


async def test_whatever_a_card_holds_is_json(wire: Wire) -> None:
    card = (
        b"---\ntags: [1, null, true, {a: b}, [c], '', "
        + b"x" * 500
        + b", ok]\nlicense: {a: 1}\npipeline_tag: [a]\nn: .nan\ni: -.inf\n---\n"
    )
    await kit_of(beside={"README.md": card}).push(wire, NAME)

    document = await info(wire)

    assert document["cardData"]["n"] == ".nan"
    assert document["cardData"]["i"] == "-.inf"
    assert document["tags"] == ["transformers", "a", "ok", "safetensors"]
    assert "pipeline_tag" not in document


# --- trees ------------------------------------------------------------------------------------------------------------

# Names that sort otherwise than their folders do.
TRICKY = {
    "a-b": b"1", "a.txt": b"2", "a/x": b"3", "a/y/z": b"4", "a/y-z": b"5", "a0": b"6", "ab/c": b"7", "b/c/d/e": b"8", "b/c/f": b"9",
    "ü/\U0010ffff/x": b"10", "\U0010ffff": b"11", "z/\U0010ffff1/x": b"12", "z/\U0010ffff2": b"13",
}  # fmt: skip
TRICKY_BESIDE = {"a/w": b"14", "a1/x": b"15", "0": b"16", "b/c/d0": b"17", "zz/top": b"18"}


def expected_entries(files: Iterator[str], folder: str, *, recursive: bool) -> set[tuple[str, str]]:
    found = set()
    prefix = f"{folder}/" if folder else ""
    for path in files:
        if not path.startswith(prefix):
            continue
        *folders, _ = path.removeprefix(prefix).split("/")
        for depth in range(1, len(folders) + 1):
            if recursive or depth == 1:
                found.add(("directory", prefix + "/".join(folders[:depth])))
        if recursive or not folders:
            found.add(("file", path))
    return found


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("folder", ["", "a", "b/c", "ü", "z"])
async def test_pages_of_any_size_together_are_the_tree(wire: Wire, folder: str, recursive: bool) -> None:
    await kit_of(TRICKY, TRICKY_BESIDE).push(wire, NAME)
    expected = expected_entries(iter({**TRICKY, **TRICKY_BESIDE}), folder, recursive=recursive)

    for size in (1, 2, 3, 7, 1000):
        query = urlencode({"recursive": recursive, "limit": size})
        entries = await tree(wire, f"/hf/api/models/{NAME}/tree/main/{quote(folder, safe='')}?{query}")
        found = [(entry["type"], entry["path"]) for entry in entries]
        assert len(found) == len(set(found))
        assert set(found) == expected


async def test_an_expanded_tree_says_the_last_commit(wire: Wire) -> None:
    digest = await kit_of().push(wire, NAME)

    entries = await tree(wire, f"/hf/api/models/{NAME}/tree/v1?expand=True")

    assert {entry["lastCommit"]["id"] for entry in entries} == {commit_of(digest)}
    assert all(re.fullmatch("[0-9a-f]{40}", entry["oid"]) for entry in entries)


@pytest.mark.parametrize(
    "folder",
    [
        "absent",
        "config.json",
        "tokenizer/absent",
        "..",
        ".",
        "tokenizer/.",
        "%00",
        "%ff",
        "model",
        "a" * 4000,
    ],
)
async def test_a_folder_that_is_not_there_is_not_found(wire: Wire, folder: str) -> None:
    await kit_of().push(wire, NAME)

    assert_hub_error(await wire("GET", f"/hf/api/models/{NAME}/tree/main/{folder}"), "EntryNotFound")


@pytest.mark.parametrize("cursor", ["", "zzzz", "/", "../..", "\0", "\ufffd", "a" * 4000, "tokenizer/"])
async def test_any_cursor_is_taken(wire: Wire, cursor: str) -> None:
    await kit_of().push(wire, NAME)

    for target in (f"/hf/api/models/{NAME}/tree/main", "/hf/api/models"):
        reply = await wire("GET", f"{target}?{urlencode({'cursor': cursor, 'recursive': 1})}")
        assert reply.status == 200
    beyond = await wire("GET", f"/hf/api/models/{NAME}/tree/main?cursor=%ff%ed%a0%80")
    assert beyond.status == 200


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1e3", "", "%00", "٣", "9" * 10])
async def test_a_limit_that_is_none_is_refused(wire: Wire, limit: str) -> None:
    await kit_of().push(wire, NAME)

    for target in (f"/hf/api/models/{NAME}/tree/main", "/hf/api/models"):
        reply = await wire("GET", f"{target}?limit={quote(limit, safe='%')}")
        assert_hub_error(reply, None, 400, "limit")


async def test_a_link_is_absolute_at_the_public_address_or_where_the_client_is(serve: Serve) -> None:
    target = f"/hf/api/models/{NAME}/tree/main?limit=1&recursive=true"
    async with serve() as url:
        wire = Wire(url)
        await kit_of().push(wire, NAME)
        here = (await wire("GET", target)).header("Link")
        hostile = (await wire("GET", target, headers={"Host": 'x"><y'})).header("Link")
    async with serve(http={"host": "https://hub.example", "prefix": "/reg/", "relativeurls": True}) as url:
        wire = Wire(url)
        await kit_of().push(PrefixedWire(url), NAME)
        public = (await wire("GET", f"/reg{target}")).header("Link")

    assert here.startswith(f"<{url_of(here)}/hf/api/models/{NAME}/tree/main?limit=1&recursive=true&cursor=")
    assert hostile.startswith(f"</hf/api/models/{NAME}/tree/main?")
    assert public.startswith(f"<https://hub.example/reg/hf/api/models/{NAME}/tree/main?")


def url_of(link: str) -> str:
    match = re.match(r"<(http://127\.0\.0\.1:[0-9]+)/", link)
    assert match is not None, link
    return match[1]


class PrefixedWire(Wire):
    """Below a path."""

    async def __call__(self, method: str, target: str, **more: Any) -> Reply:  # type: ignore[override]
        return await super().__call__(method, f"/reg{target}", **more)


# --- paths-info -------------------------------------------------------------------------------------------------------


async def paths_info(
    wire: Wire, form: Mapping[str, Any] | bytes, revision: str = "main", media_type: str = ""
) -> Reply:
    body = form if isinstance(form, bytes) else urlencode(form, doseq=True).encode()
    headers = {"Content-Type": media_type or "application/x-www-form-urlencoded"}
    return await wire("POST", f"/hf/api/models/{NAME}/paths-info/{revision}", headers=headers, body=body)


@pytest.mark.parametrize("form", ["form", "json"])
async def test_paths_that_are_there_are_described(wire: Wire, form: str) -> None:
    digest = await kit_of().push(wire, NAME)
    asked = {
        "paths": ["config.json", "tokenizer", "docs/", "absent", "config.json", "", "model/config.json"],
        "expand": True,
    }

    if form == "form":
        reply = await paths_info(wire, asked)
    else:
        reply = await paths_info(wire, encode(asked), media_type="application/json; charset=utf-8")

    assert reply.status == 200, reply.body
    assert [(entry["type"], entry["path"]) for entry in reply.json()] == [
        ("file", "config.json"),
        ("directory", "tokenizer"),
        ("directory", "docs"),
    ]
    assert all(entry["lastCommit"]["id"] == commit_of(digest) for entry in reply.json())
    assert reply.json()[0]["lfs"]["oid"] == Digest.of(MODEL["config.json"]).encoded


async def test_one_path_is_enough(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    for reply in (
        await paths_info(wire, {"paths": "config.json", "expand": False}),
        await paths_info(wire, encode({"paths": "config.json"}), media_type="application/json"),
        await paths_info(wire, b"paths[]=config.json"),
    ):
        assert [entry["path"] for entry in reply.json()] == ["config.json"]
        assert "lastCommit" not in reply.json()[0]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"a"', b"{}", b'{"paths": 1}', b'{"paths": [1]}', b'{"paths": [null]}', b'{"paths": {}}', b"\xff", b"[" * 100_000,
     b'{"paths": ["\\ud800"]}', b'{"paths": [], "paths": []}', encode({"paths": [str(n) for n in range(10_000)]})],
    ids=range(15),
)  # fmt: skip
async def test_json_that_asks_nothing_is_refused(wire: Wire, body: bytes) -> None:
    await kit_of().push(wire, NAME)

    assert_refused(await paths_info(wire, body, media_type="application/json"), 400)


async def test_too_many_paths_are_refused(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    assert_refused(await paths_info(wire, {"paths": [str(n) for n in range(10_000)]}), 400)
    assert_refused(await paths_info(wire, b"paths=" + b"a" * 1024 * 1024), 400)
    assert_refused(await paths_info(wire, b"&" * 100_000 + b"paths=a" * 2000), 400)
    assert (await paths_info(wire, {"paths": [str(n) for n in range(1_000)]})).json() == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"paths",
        b"paths=%ff&paths=%00",
        b"a=b",
        b"paths=../../etc/passwd",
        b"=&=&=",
        b"\0" * 100,
    ],
)
async def test_a_form_that_names_nothing_finds_nothing(wire: Wire, body: bytes) -> None:
    await kit_of().push(wire, NAME)

    assert (await paths_info(wire, body)).json() == []


async def test_paths_are_not_asked_for_by_get(wire: Wire) -> None:
    reply = await wire("GET", f"/hf/api/models/{NAME}/paths-info/main")

    assert_refused(reply, 405)
    assert reply.header("Allow") == "POST"


# --- refs, commits, lists ---------------------------------------------------------------------------------------------


async def test_refs_are_main_and_the_tags(wire: Wire) -> None:
    one = await kit_of().push(wire, NAME, "v1")
    two = await kit_of(n="2").push(wire, NAME, "v2")
    await kit_of(n="3").push(wire, NAME, f"sha256-{one.encoded}.sig")
    await wire.push_image(NAME, "image")

    plain = (await wire("GET", f"/hf/api/models/{NAME}/refs")).json()
    with_pulls = (await wire("GET", f"/hf/api/models/{NAME}/refs?include_prs=1")).json()

    assert plain == {
        "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit_of(two)}],
        "tags": [
            {"name": "v1", "ref": "refs/tags/v1", "targetCommit": commit_of(one)},
            {"name": "v2", "ref": "refs/tags/v2", "targetCommit": commit_of(two)},
        ],
        "converts": [],
    }
    assert with_pulls == {**plain, "pullRequests": []}


async def test_commits_are_what_was_tagged_from_the_revision_back(wire: Wire) -> None:
    digests = [await kit_of(n=str(n)).push(wire, NAME, f"v{n}") for n in range(3)]
    await kit_of(n="0").push(wire, NAME, "v0-again")

    async def commits(revision: str) -> list[str]:
        reply = await wire("GET", f"/hf/api/models/{NAME}/commits/{revision}")
        assert reply.status == 200, reply.body
        assert all(
            re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", commit["date"]) for commit in reply.json()
        )
        return [commit["id"] for commit in reply.json()]

    assert await commits("main") == [commit_of(digests[n]) for n in (0, 2, 1)]
    assert await commits("v1") == [commit_of(digests[1])]
    assert await commits("v1.only.model") == [await commit_at(wire, "v1.only.model")]


async def test_a_repository_that_is_there_may_be_read(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    assert (await wire("GET", f"/hf/api/models/{NAME}/auth-check")).json() == {}


@pytest.mark.parametrize("token", [None, "Bearer hf_x", "Bearer", "Basic \xff", "a" * 4000])
async def test_whoever_asks_is_nobody_in_particular(wire: Wire, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": token}

    reply = await wire("GET", "/hf/api/whoami-v2", headers=headers)

    assert reply.json()["name"] == "anonymous"
    assert reply.json()["auth"]["accessToken"]["role"] == "read"


async def test_kits_are_listed_as_what_they_are(wire: Wire) -> None:
    data = Kit()
    data.add("dataset", "d.csv", tar_of({"d.csv": b"a"}), name="d")
    only_code = Kit()
    only_code.add("code", "x.py", tar_of({"x.py": b""}))
    await data.push(wire, "team/data")
    await only_code.push(wire, "team/code")
    await kit_of().push(wire, "team/both")
    await kit_of(beside={}).push(wire, "solo")
    await kit_of(beside={}).push(wire, "a/b/c")
    await wire.push_image("team/image", "latest")
    await wire.push_blob("team/empty", b"x")

    async def ids(target: str) -> list[str]:
        return [entry["id"] for entry in await tree(wire, target)]

    assert await ids("/hf/api/models") == ["solo", "team/both", "team/code"]
    assert await ids("/hf/api/datasets") == ["team/both", "team/data"]
    assert await ids("/hf/team/api/models") == ["both", "code"]
    assert await ids("/hf/a/b/api/models") == ["c"]
    assert await ids("/hf/nobody/api/models") == []
    assert await ids("/hf/api/models?limit=1") == ["solo", "team/both", "team/code"]
    assert await ids("/hf/api/models?search=BOTH") == ["team/both"]
    assert await ids("/hf/api/models?author=Team") == ["team/both", "team/code"]
    assert await ids("/hf/api/models?filter=nothing") == []
    assert await ids("/hf/api/models?full=True&cardData=True&config=True&direction=-1") == [
        "solo",
        "team/both",
        "team/code",
    ]


async def test_a_list_is_sorted_by_date_the_newest_first(wire: Wire) -> None:
    for name, created in (("a", "2026-01-01"), ("b", "2026-03-01"), ("c", "2026-02-01")):
        await kit_of(**{"org.opencontainers.image.created": f"{created}T00:00:00Z"}).push(wire, name)

    newest = (await wire("GET", "/hf/api/models?sort=lastModified&direction=-1&limit=2")).json()
    by_likes = (await wire("GET", "/hf/api/models?sort=likes")).json()

    assert [entry["id"] for entry in newest] == ["b", "c"]
    assert [entry["id"] for entry in by_likes] == ["a", "b", "c"]


async def test_one_answer_looks_into_so_many_repositories_and_no_more(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_LOOKED_UP_MAX", 2)
    for name in ("a", "b", "c", "d", "e"):
        await kit_of(beside={}).push(wire, name)

    first = await wire("GET", "/hf/api/models?search=e")
    found = await tree(wire, "/hf/api/models?search=e")
    sorted_ = await wire("GET", "/hf/api/models?sort=createdAt")

    assert first.json() == []
    assert [entry["id"] for entry in found] == ["e"]
    assert_hub_error(sorted_, None, 400, "leave sort out")


async def test_a_list_is_filtered_by_what_the_kitfile_says(wire: Wire) -> None:
    kit = kit_of()
    kit.layers[0][1].update({"framework": "PyTorch", "license": "Apache-2.0"})
    await kit.push(wire, NAME)

    for query, count in (
        ("filter=pytorch", 1),
        ("filter=pytorch&filter=license:apache-2.0", 1),
        ("filter=pytorch&filter=gguf", 0),
    ):
        assert len((await wire("GET", f"/hf/api/models?{query}")).json()) == count


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/hf/api/repos/create"),
        ("DELETE", "/hf/api/repos/delete"),
        ("POST", f"/hf/api/models/{NAME}/commit/main"),
        ("POST", f"/hf/api/models/{NAME}/preupload/main"),
        ("POST", f"/hf/api/models/{NAME}/tag/main"),
        ("PUT", f"/hf/api/models/{NAME}/settings"),
        ("PATCH", f"/hf/api/models/{NAME}"),
        ("POST", "/hf/api/validate-yaml"),
        ("POST", f"/hf/{NAME}.git/info/lfs/objects/batch"),
        ("PUT", f"/hf/{NAME}/resolve/main/config.json"),
        ("POST", f"/hf/api/models/{NAME}"),
        ("DELETE", f"/hf/api/models/{NAME}/paths-info/main"),
        ("POST", "/hf/"),
        ("POST", "/hf/%00"),
    ],
)
async def test_a_write_is_refused_by_words_that_say_so(wire: Wire, method: str, target: str) -> None:
    await kit_of().push(wire, NAME)

    for body in (b"{}", b"x" * 600_000):
        reply = await wire(method, target, body=body)
        assert_refused(reply, 405, code="UNSUPPORTED")
        assert "read-only" in reply.json()["errors"][0]["message"]
        assert reply.header("Allow") == "GET, HEAD"
    assert await shown(wire) == SHOWN


@pytest.mark.parametrize(
    "target",
    ["/hf/", "/hf/api", "/hf/api/", "/hf/x", f"/hf/api/models/{NAME}/discussions", f"/hf/{NAME}/blob/main/x", "/hf/api/trending", "/hf/%2e%2e/v2/",
     "/hf/../v2/", "/hf/" + "a/" * 3000],
)  # fmt: skip
async def test_what_the_hub_does_not_answer_is_not_found(wire: Wire, target: str) -> None:
    assert_hub_error(await wire("GET", target), None, 404, "nothing at this path")


async def test_a_space_is_not_found_as_a_repository(wire: Wire) -> None:
    await kit_of().push(wire, NAME)

    assert_hub_error(await wire("GET", f"/hf/api/spaces/{NAME}"), "RepoNotFound", said="no spaces")
    assert_hub_error(await wire("GET", f"/hf/spaces/{NAME}/resolve/main/x"), "RepoNotFound")


@pytest.mark.parametrize("query", ["blobs=1&blobs=2", "&".join(f"a{n}=1" for n in range(200))])
async def test_a_query_that_is_ambiguous_or_too_long_is_refused(wire: Wire, query: str) -> None:
    await kit_of().push(wire, NAME)

    assert_hub_error(await wire("GET", f"/hf/api/models/{NAME}?{query}"), None, 400)


async def test_a_hub_that_is_switched_off_says_so(serve: Serve) -> None:
    async with serve(hub={"enabled": False}) as url:
        wire = Wire(url)
        await kit_of().push(wire, NAME)

        for target in (f"/hf/api/models/{NAME}", f"/hf/{NAME}/resolve/main/config.json"):
            assert_hub_error(await wire("GET", target), "RepoNotFound", said="hub.enabled")
        assert_hub_error(await paths_info(wire, {"paths": "a"}), "RepoNotFound", said="hub.enabled")


async def test_a_layer_that_nobody_can_look_into_is_said(wire: Wire) -> None:
    kit = Kit()
    kit.add("model", "model", file_of("model/a", b"a") + header(b"../evil") + TRAILER)
    await kit.push(wire, NAME)

    for target in (
        f"/hf/api/models/{NAME}",
        f"/hf/api/models/{NAME}/tree/main",
        f"/hf/{NAME}/resolve/main/a",
    ):
        assert_hub_error(await wire("GET", target), None, 400, "cannot be looked into")
    assert (await wire("GET", f"/hf/api/models/{NAME}/refs")).status == 200
    assert (await wire("GET", f"/v2/{NAME}/manifests/v1")).status == 200


async def test_a_layer_that_is_not_here_is_said(serve: Serve) -> None:
    async with serve(manifests={"allowsparse": True}) as url:
        wire = Wire(url)
        kit = kit_of()
        await wire.push_blob(NAME, kit.config)
        await wire.push_manifest(NAME, "v1", kit.manifest)

        for target in (
            f"/hf/api/models/{NAME}",
            f"/hf/api/models/{NAME}/tree/main",
            f"/hf/{NAME}/resolve/main/a",
        ):
            assert_hub_error(await wire("GET", target), "EntryNotFound", said="no blob sha256:")


async def test_a_kit_whose_documents_disagree_is_said(wire: Wire) -> None:
    kit = kit_of()
    manifest = {**kit.manifest, "layers": kit.manifest["layers"][:1]}
    await kit.push(wire, NAME, "good")
    await wire.push_manifest(NAME, "bad", manifest)

    assert_hub_error(await resolved(wire, "config.json", "bad"), None, 400, "is broken")


PIECES = st.sampled_from(
    ["api", "models", "datasets", "spaces", "team", "llm", "resolve", "raw", "tree", "revision", "refs", "commits", "paths-info", "main", "v1", "whoami-v2",
     "v1.only.model", "config.json", "%2F", "%00", "%ff", "..", ".", "", "%25", "a" * 200, "tokenizer", "?", "?cursor=%ff", "?limit=1", "?recursive=true", "&expand=1"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=9), method=st.sampled_from(["GET", "HEAD", "POST", "PUT"]))
async def test_no_path_makes_the_hub_fail(wire: Wire, pieces: list[str], method: str) -> None:
    if (await wire("HEAD", f"/v2/{NAME}/manifests/v1")).status == 404:
        await kit_of().push(wire, NAME)

    reply = await wire(method, "/hf/" + "/".join(pieces), body=b"paths=a" if method == "POST" else b"")

    assert reply.status < 500
    assert_discreet(reply)

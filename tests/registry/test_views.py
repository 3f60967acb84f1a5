"""Slices, images and ModelPacks as a client sees them: by tag, by digest, after a restart, on another worker."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kitspec.digest import Digest
from kitspec.kitfile import Kitfile
from kitspec.manifest import Manifest, parse_manifest
from kitspec.selection import pair_layers
from tests.registry.conftest import Serve, configured, served
from tests.registry.kits import FILES, Kit, tar_of, whole_kit
from tests.registry.wire import OCI_INDEX, OCI_MANIFEST, Wire, assert_refused

NAME = "team/kit"


@pytest.fixture
def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


async def pulled(wire: Wire, reference: str, query: str = "") -> tuple[dict[str, Any], Digest]:
    reply = await wire("GET", f"/v2/{NAME}/manifests/{reference}{query}")
    assert reply.status == 200, reply.body
    assert reply.header("Docker-Content-Digest") == Digest.of(reply.body)
    return reply.json(), Digest(reply.header("Docker-Content-Digest"))


async def blob(wire: Wire, digest: str) -> bytes:
    reply = await wire("GET", f"/v2/{NAME}/blobs/{digest}")
    assert reply.status == 200, reply.body
    assert Digest.of(reply.body) == digest
    head = await wire("HEAD", f"/v2/{NAME}/blobs/{digest}")
    assert head.header("Content-Length") == str(len(reply.body))
    return reply.body


def files_of(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]


SELECTIONS = [
    ("only.model", "model", {"model", "lora"}),
    ("only.model_net", "model:net", {"model"}),
    ("only.model_lora", "model:lora", {"lora"}),
    ("only.datasets", "datasets", {"data/train.csv", "data/valid.csv"}),
    ("only.datasets_train-set", "datasets:train set", {"data/train.csv"}),
    ("only.code", "code", {"code"}),
    ("only.code_code", "code:code", {"code"}),
    ("only.docs", "docs", {"docs"}),
    ("only.prompts", "prompts", {"prompts"}),
    ("only.model.docs.datasets_valid", "model,docs", {"model", "lora", "docs", "data/valid.csv"}),
    ("only.kitfile", "kitfile", set()),
]


@pytest.mark.parametrize(("tag", "_", "paths"), SELECTIONS, ids=[row[0] for row in SELECTIONS])
async def test_a_slice_is_a_kit_of_the_chosen_entries(wire: Wire, tag: str, _: str, paths: set[str]) -> None:
    kit = whole_kit()
    source = await kit.push(wire)

    document, digest = await pulled(wire, f"v1.{tag}")

    manifest = parse_manifest(json.dumps(document).encode(), OCI_MANIFEST)
    assert isinstance(manifest, Manifest)
    config = await blob(wire, manifest.config.digest)
    pairs = pair_layers(manifest, Kitfile.from_json(config))
    assert {pair.entry.path for pair in pairs} == paths
    assert document["annotations"]["ml.modelkit-registry.view.of"] == source
    assert document["artifactType"] == kit.manifest["artifactType"]
    for layer in manifest.layers:
        assert await blob(wire, layer.digest)
    again, same = await pulled(wire, digest)
    assert (again, same) == (document, digest)


@pytest.mark.parametrize(
    ("tag", "filters", "_"), [row for row in SELECTIONS if "datasets_valid" not in row[0]]
)
async def test_a_filter_gives_the_slice_that_a_tag_gives(
    wire: Wire, tag: str, filters: str, _: object
) -> None:
    digest = await whole_kit().push(wire)
    query = f"?filter={filters.replace(' ', '%20')}"

    of_tag = await pulled(wire, f"v1.{tag}")

    assert await pulled(wire, "v1", query) == of_tag
    assert await pulled(wire, digest, query) == of_tag


async def test_text_and_order_of_what_is_kept_stay_as_they_are(wire: Wire) -> None:
    kit = whole_kit()
    config = kit.config.replace(b'"lr":1e-05', b'"lr":1.50,"odd":1E+2').replace(
        b'"package":{', b'"newer":{"x":[1.0,-0]},"package":{'
    )
    assert config != kit.config
    manifest = kit.manifest
    manifest["config"] |= {"digest": str(Digest.of(config)), "size": len(config)}
    manifest["layers"][0]["newer"] = 1.0
    await kit.push(wire)
    await wire.push_blob(NAME, config)
    await wire.push_manifest(NAME, "v2", manifest)

    document, _ = await pulled(wire, "v2.only.model")

    kept = await blob(wire, document["config"]["digest"])
    assert kept.startswith(
        b'{"manifestVersion":"1.0.0","newer":{"x":[1.0,-0]},"package":{"name":"kit"},"model":'
    )
    assert b'"parameters":{"lr":1.50,"odd":1E+2}' in kept
    assert b"datasets" not in kept
    assert document["layers"][0]["newer"] == 1.0


async def test_a_view_says_where_it_comes_from(wire: Wire) -> None:
    source = await whole_kit().push(wire)

    reply = await wire("GET", f"/v2/{NAME}/manifests/v1.only.model")
    by_digest = await wire("HEAD", f"/v2/{NAME}/manifests/{reply.header('Docker-Content-Digest')}")

    canonical = f'</v2/{NAME}/manifests/{source}>; rel="canonical"'
    assert reply.header("Link") == canonical
    assert by_digest.header("Link") == canonical
    assert "Link" not in (await wire("GET", f"/v2/{NAME}/manifests/v1")).headers


async def test_a_view_is_not_listed_and_cannot_be_pushed(wire: Wire) -> None:
    kit = whole_kit()
    await kit.push(wire)
    await pulled(wire, "v1.only.model")

    tags = await wire("GET", f"/v2/{NAME}/tags/list")
    pushed = await wire.put_manifest(NAME, "v1.only.model", kit.manifest)

    assert tags.json()["tags"] == ["v1"]
    assert_refused(pushed, 400, code="TAG_INVALID")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("v1.only.weights", "weights"),
        ("v1.only.model_nope", "model_net"),
        ("v1.only.datasets_", "datasets_"),
        ("v1.only.mcpservers", "model_net"),
        ("v1.only._model", "_model"),
        ("v1.as.oven", "oven"),
        ("v1.only.model.as.oven", "oven"),
        ("v2.only.model", "v2"),
        ("image.only.model", "not a ModelKit"),
        ("image.as.image", "not a ModelKit"),
        ("list.as.image", "index"),
    ],
)
async def test_a_view_that_is_none_is_404_and_says_what_was_wrong(
    wire: Wire, reference: str, said: str
) -> None:
    await whole_kit().push(wire)
    manifest, digest = await wire.push_image(NAME, "image")
    listed = {
        "mediaType": OCI_MANIFEST,
        "digest": digest,
        "size": len(json.dumps(manifest, separators=(",", ":"))),
    }
    await wire.push_manifest(
        NAME, "list", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed]}
    )

    reply = await wire("GET", f"/v2/{NAME}/manifests/{reference}")

    assert_refused(reply, 404, code="MANIFEST_UNKNOWN")
    assert said in reply.json()["errors"][0]["message"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("filter=weights", "weights"),
        ("filter=", "filter"),
        ("filter=model:a:b", "format"),
        ("filter=datasets:nope", "nope"),
        ("filter=model&filter=docs:x", "docs:x"),
        ("filter=mcpservers", "mcpservers"),
    ],
)
async def test_a_filter_that_chooses_nothing_is_400_and_says_so(wire: Wire, query: str, said: str) -> None:
    await whole_kit().push(wire)

    reply = await wire("GET", f"/v2/{NAME}/manifests/v1?{query}")

    assert_refused(reply, 400, code="UNSUPPORTED")
    assert said in reply.json()["errors"][0]["message"]


async def test_two_entries_of_one_name_are_refused_by_both_names(wire: Wire) -> None:
    kit = Kit()
    for path, name in (("a.csv", "set 1"), ("b.csv", "set.1")):
        kit.add("dataset", path, tar_of({path: b"1"}), name=name)
    await kit.push(wire)

    reply = await wire("GET", f"/v2/{NAME}/manifests/v1.only.datasets_set-1")

    assert_refused(reply, 404, code="MANIFEST_UNKNOWN")
    assert "'set 1' and 'set.1'" in reply.json()["errors"][0]["message"]


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_an_image_view_is_an_image_over_the_same_blobs(wire: Wire, compression: str | None) -> None:
    kit = whole_kit(compression)
    await kit.push(wire)

    index, _ = await pulled(wire, "v1.as.image")

    assert [one["platform"]["architecture"] for one in index["manifests"]] == ["amd64", "arm64"]
    for listed in index["manifests"]:
        manifest, _ = await pulled(wire, listed["digest"])
        config = json.loads(await blob(wire, manifest["config"]["digest"]))
        assert config["architecture"] == listed["platform"]["architecture"]
        assert [layer["digest"] for layer in manifest["layers"]] == [
            str(Digest.of(layer)) for _, _, layer, _ in kit.layers
        ]
        suffix = f"+{compression}" if compression else ""
        assert {layer["mediaType"] for layer in manifest["layers"]} == {
            f"application/vnd.oci.image.layer.v1.tar{suffix}"
        }
        assert config["rootfs"]["diff_ids"] == [entry["diffId"] for _, entry, _, _ in kit.layers]
        assert len(config["history"]) == len(kit.layers)


async def test_a_slice_has_an_image_too(wire: Wire) -> None:
    kit = whole_kit()
    await kit.push(wire)

    index, _ = await pulled(wire, "v1.only.docs.as.image")

    manifest, _ = await pulled(wire, index["manifests"][0]["digest"])
    (layer,) = manifest["layers"]
    assert files_of(await blob(wire, layer["digest"])) == {"docs/README.md": FILES["docs/README.md"]}


async def test_nothing_chosen_is_no_image(wire: Wire) -> None:
    await whole_kit().push(wire)

    for form in ("image", "readable", "modelpack"):
        reply = await wire("GET", f"/v2/{NAME}/manifests/v1.only.kitfile.as.{form}")
        assert_refused(reply, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_readable_image_lets_everybody_read(wire: Wire, compression: str | None) -> None:
    kit = Kit()
    kit.add(
        "model",
        "secret",
        tar_of({"secret/w": b"weights", "secret/run": b"#!"}, mode=0o600),
        compression=compression,
    )
    await kit.push(wire)

    index, _ = await pulled(wire, "v1.as.readable")

    manifest, _ = await pulled(wire, index["manifests"][0]["digest"])
    (layer,) = manifest["layers"]
    tar = await blob(wire, layer["digest"])
    config = json.loads(await blob(wire, manifest["config"]["digest"]))
    assert config["rootfs"]["diff_ids"] == [layer["digest"]]
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert {member.name: oct(member.mode) for member in archive} == {
            "secret": "0o755",
            "secret/run": "0o644",
            "secret/w": "0o644",
        }
    assert files_of(tar) == {"secret/w": b"weights", "secret/run": b"#!"}


def raw_kit(content: bytes, path: str = "models/w.bin") -> Kit:
    kit = Kit()
    kit.add("model", path, content)
    kind, entry, blob_, _ = kit.layers[0]
    kit.layers[0] = (kind, entry, blob_, "application/vnd.kitops.modelkit.model.v1.raw")
    return kit


async def test_a_raw_layer_is_a_tar_in_an_image(wire: Wire) -> None:
    content = bytes(range(256)) * 1000
    await raw_kit(content).push(wire)

    index, _ = await pulled(wire, "v1.as.image")

    manifest, _ = await pulled(wire, index["manifests"][0]["digest"])
    (layer,) = manifest["layers"]
    tar = await blob(wire, layer["digest"])
    assert len(tar) == layer["size"]
    assert files_of(tar) == {"models/w.bin": content}
    part = await wire(
        "GET", f"/v2/{NAME}/blobs/{layer['digest']}", headers={"Range": f"bytes=500-{len(tar) - 900}"}
    )
    assert (part.status, part.body) == (206, tar[500 : len(tar) - 899])


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_a_modelpack_view_has_every_file_as_a_layer(wire: Wire, compression: str | None) -> None:
    await whole_kit(compression).push(wire)

    document, _ = await pulled(wire, "v1.as.modelpack")

    assert document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    found = {}
    for layer in document["layers"]:
        path = layer["annotations"]["org.cncf.model.filepath"]
        assert layer["annotations"]["org.cnai.model.filepath"] == path
        assert layer["annotations"]["org.opencontainers.image.title"] == path
        found[path] = (layer["mediaType"], await blob(wire, layer["digest"]))
    assert {path: content for path, (_, content) in found.items()} == FILES
    assert found["model/config.json"][0] == "application/vnd.cncf.model.weight.v1.raw"
    assert found["lora/adapter.bin"][0] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert found["data/train.csv"][0] == "application/vnd.cncf.model.dataset.v1.raw"
    config = json.loads(await blob(wire, document["config"]["digest"]))
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in document["layers"]]


@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_a_file_of_a_modelpack_is_a_blob_with_ranges(wire: Wire, compression: str | None) -> None:
    await whole_kit(compression).push(wire)
    await pulled(wire, "v1.as.modelpack")
    content = FILES["model/weights.bin"]
    target = f"/v2/{NAME}/blobs/{Digest.of(content)}"

    part = await wire("GET", target, headers={"Range": "bytes=100-299"})
    tail = await wire("GET", target, headers={"Range": "bytes=-1"})
    outside = await wire("GET", target, headers={"Range": f"bytes={len(content)}-"})
    known = await wire("GET", target, headers={"If-None-Match": f'"{Digest.of(content)}"'})

    assert (part.status, part.body) == (206, content[100:300])
    assert part.header("Content-Range") == f"bytes 100-299/{len(content)}"
    assert tail.body == content[-1:]
    assert_refused(outside, 416, code="RANGE_INVALID")
    assert (known.status, known.body) == (304, b"")


async def test_a_file_is_no_blob_before_a_modelpack_was_asked_for_nor_elsewhere(wire: Wire) -> None:
    await whole_kit().push(wire)
    await whole_kit().push(wire, "team/other")
    digest = Digest.of(FILES["model/weights.bin"])

    before = await wire("GET", f"/v2/{NAME}/blobs/{digest}")
    await pulled(wire, "v1.only.docs.as.modelpack")
    of_a_part = await wire("GET", f"/v2/{NAME}/blobs/{digest}")
    await pulled(wire, "v1.as.modelpack")
    elsewhere = await wire("GET", f"/v2/team/other/blobs/{digest}")

    for reply in (before, of_a_part, elsewhere):
        assert_refused(reply, 404, code="BLOB_UNKNOWN")


async def test_a_modelpack_that_was_pushed_can_be_sliced_and_seen(wire: Wire) -> None:
    await whole_kit().push(wire)
    pack, _ = await pulled(wire, "v1.as.modelpack")
    for layer in [pack["config"], *pack["layers"]]:
        await wire.push_blob("team/pack", await blob(wire, layer["digest"]))
    content = json.dumps(pack, separators=(",", ":")).encode()
    await wire.put_manifest("team/pack", "v1", content, OCI_MANIFEST)

    reply = await wire("GET", "/v2/team/pack/manifests/v1.only.docs")

    assert reply.status == 200, reply.body
    (layer,) = reply.json()["layers"]
    assert layer["annotations"]["org.cncf.model.filepath"] == "docs/README.md"
    config = await wire("GET", f"/v2/team/pack/blobs/{reply.json()['config']['digest']}")
    assert config.json()["modelfs"]["diffIds"] == [layer["digest"]]
    image_view = await wire("GET", "/v2/team/pack/manifests/v1.only.docs.as.image")
    assert image_view.status == 200, image_view.body


async def test_what_a_view_was_said_to_have_can_be_pushed_under_another_name(wire: Wire) -> None:
    await whole_kit().push(wire)
    for tag in ("v1.only.model", "v1.as.modelpack"):
        reply = await wire("GET", f"/v2/{NAME}/manifests/{tag}")

        pushed = await wire.put_manifest(NAME, "copy", reply.body, OCI_MANIFEST)

        assert pushed.status == 201, pushed.body
        assert (await pulled(wire, "copy"))[1] == Digest.of(reply.body)
    await wire("DELETE", f"/v2/{NAME}/manifests/v1")
    for layer in reply.json()["layers"]:
        await blob(wire, layer["digest"])


async def test_views_go_with_their_source(wire: Wire) -> None:
    source = await whole_kit().push(wire)
    _, sliced = await pulled(wire, "v1.only.model")
    pack, packed = await pulled(wire, "v1.as.modelpack")

    await wire("DELETE", f"/v2/{NAME}/manifests/{source}")

    for digest in (sliced, packed):
        assert_refused(await wire("GET", f"/v2/{NAME}/manifests/{digest}"), 404)
    assert_refused(await wire("GET", f"/v2/{NAME}/blobs/{pack['config']['digest']}"), 404)
    file = next(
        layer
        for layer in pack["layers"]
        if layer["annotations"]["org.cncf.model.filepath"] == "docs/README.md"
    )
    assert_refused(await wire("GET", f"/v2/{NAME}/blobs/{file['digest']}"), 404)


async def test_a_part_that_two_kits_share_outlives_the_first_of_them(wire: Wire) -> None:
    kit = whole_kit()
    first = await kit.push(wire)
    kit.annotations["second"] = "yes"
    await kit.push(wire, tag="v2")
    one, _ = await pulled(wire, "v1.only.model")
    two, _ = await pulled(wire, "v2.only.model")
    assert one["config"] == two["config"]

    await wire("DELETE", f"/v2/{NAME}/manifests/{first}")

    assert await blob(wire, two["config"]["digest"])


VIEWS = ("v1.only.model", "v1.only.datasets_valid.docs", "v1.as.image", "v1.as.readable", "v1.as.modelpack")


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_digests_are_the_same_after_a_restart_without_caches_and_elsewhere(
    tmp_path: Path, compression: str | None
) -> None:
    digests: list[set[Digest]] = []
    for folder in ("one", "one", "other"):
        root = tmp_path / folder
        async with served(configured({"filesystem": {"rootdirectory": str(root)}})) as url:
            wire = Wire(url)
            await whole_kit(compression).push(wire)
            digests.append({(await pulled(wire, tag))[1] for tag in VIEWS})
        shutil.rmtree(root / "cache", ignore_errors=True)
    assert digests[0] == digests[1] == digests[2]

    async with served(configured({"filesystem": {"rootdirectory": str(tmp_path / "one")}})) as url:
        wire = Wire(url)
        for digest in digests[0]:
            await pulled(wire, digest)
        for content in FILES.values():
            assert await blob(wire, Digest.of(content)) == content


async def test_INV_22_a_read_only_registry_gives_views_and_changes_nothing(tmp_path: Path) -> None:
    storage = {"filesystem": {"rootdirectory": str(tmp_path)}}
    async with served(configured(storage)) as url:
        await whole_kit().push(Wire(url))
    readonly = {"maintenance": {"readonly": {"enabled": True}}}
    before = tree_of(tmp_path)

    async with served(configured({**storage, **readonly})) as url:
        wire = Wire(url)
        for tag in VIEWS:
            document, digest = await pulled(wire, tag)
            assert (await pulled(wire, digest))[0] == document
        _, sliced = await pulled(wire, "v1.only.docs")
        info = await wire("GET", f"/hf/api/models/{NAME}/revision/{sliced.encoded[:40]}")
        assert [file["rfilename"] for file in info.json()["siblings"]] == ["docs/README.md"]
        assert await blob(wire, Digest.of(FILES["docs/README.md"]))
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_damaged_checkpoints_are_made_again(tmp_path: Path, compression: str) -> None:
    storage = {"filesystem": {"rootdirectory": str(tmp_path)}}
    content = random.Random(1).randbytes(20 << 20)
    kit = Kit()
    kit.add("model", "model", tar_of({"model/w": content}), compression=compression)
    async with served(configured(storage)) as url:
        await kit.push(Wire(url))
        await pulled(Wire(url), "v1.as.image")
    (table,) = (path for path in (tmp_path / "cache" / "members").rglob("*") if path.is_file())
    record = bytearray(table.read_bytes())
    record[-8] ^= 1
    table.chmod(0o644)
    table.write_bytes(record)

    async with served(configured(storage)) as url:
        reply = await Wire(url)(
            "GET", f"/v2/{NAME}/_modelkit/files/v1/model/w", headers={"Range": "bytes=-1000"}
        )

    assert reply.body == content[-1000:]
    assert table.read_bytes() != record


def tree_of(root: Path) -> dict[str, bytes]:
    """What is stored; without the backend's own folder, where its probe comes and goes."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "_store" not in path.parts
    }


async def test_a_moved_tag_moves_its_views(wire: Wire) -> None:
    kit = whole_kit()
    await kit.push(wire)
    _, before = await pulled(wire, "v1.only.docs")
    kit.layers = [layer for layer in kit.layers if layer[0] != "docs"]
    kit.add("docs", "docs", tar_of({"docs/README.md": b"# Another\n"}))
    await kit.push(wire)

    document, after = await pulled(wire, "v1.only.docs")

    assert before != after
    assert document["layers"][0]["digest"] == str(Digest.of(kit.layers[-1][2]))


def hostile(layer: bytes) -> Kit:
    kit = Kit()
    kit.add("model", "model", layer)
    return kit


def link_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("model/link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    return stream.getvalue()


HOSTILE = {
    "T_03_a_link": (link_tar(), "a symbolic link"),
    "T_12_an_escape": (tar_of({"../x": b"1"}), "leads out"),
    "T_20_no_tar": (b"no tar at all" * 100, "checksum"),
    "T_20_cut_off": (tar_of({"model/w": bytes(5000)})[:3000], "cut off"),
    "T_34_gzip_as_tar": (gzip.compress(b"x" * 5000, mtime=0), "gzip"),
    "twice": (tar_of({"model/w": b"1"})[:-1024] + tar_of({"model/w": b"2"}), "model/w"),
}


@pytest.mark.parametrize(("layer", "said"), HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_layer_is_pushed_and_pulled_and_has_no_views(
    wire: Wire, layer: bytes, said: str
) -> None:
    kit = hostile(layer)
    await kit.push(wire)

    assert await blob(wire, Digest.of(layer)) == layer
    sliced, _ = await pulled(wire, "v1.only.model")
    assert sliced["layers"] == kit.manifest["layers"]
    for target in (
        "manifests/v1.as.modelpack",
        "manifests/v1.as.readable",
        "_modelkit/files/v1",
        "_modelkit/files/v1/model/w",
        "_modelkit/archive/v1",
        "_modelkit/tensors/v1",
    ):
        reply = await wire("GET", f"/v2/{NAME}/{target}")
        assert_refused(reply, 400, code="MANIFEST_INVALID")
        assert said in reply.json()["errors"][0]["message"]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_T_34_a_plain_tar_that_is_called_compressed_is_said_to_be(wire: Wire, compression: str) -> None:
    kit = whole_kit()
    kit.layers = [
        (kind, entry, layer, f"{media_type}+{compression}") for kind, entry, layer, media_type in kit.layers
    ]
    await kit.push(wire)

    for tag in ("v1.as.image", "v1.as.modelpack"):
        reply = await wire("GET", f"/v2/{NAME}/manifests/{tag}")
        assert_refused(reply, 400, code="MANIFEST_INVALID")
        assert compression in reply.json()["errors"][0]["message"]


async def test_T_30_a_bomb_is_stored_and_not_opened(wire: Wire) -> None:
    kit = Kit()
    kit.add("model", "model", tar_of({"model/zeros": bytes(100 << 20)}), compression="gzip")
    await kit.push(wire)

    reply = await wire("GET", f"/v2/{NAME}/manifests/v1.as.image")

    assert_refused(reply, 400, code="MANIFEST_INVALID")
    assert "200" in reply.json()["errors"][0]["message"]


async def test_a_broken_config_is_refused_and_the_manifest_still_pulled(wire: Wire) -> None:
    manifest = whole_kit().manifest
    await whole_kit().push(wire)
    await wire.push_blob(NAME, b"[]")
    manifest["config"] |= {"digest": str(Digest.of(b"[]")), "size": 2}
    await wire.push_manifest(NAME, "broken", manifest)

    reply = await wire("GET", f"/v2/{NAME}/manifests/broken.only.model")

    assert_refused(reply, 400, code="MANIFEST_INVALID")
    assert (await wire("GET", f"/v2/{NAME}/manifests/broken")).status == 200


async def test_a_sparse_kit_whose_layer_is_not_here_says_which(serve: Serve) -> None:
    async with serve(manifests={"allowsparse": True}) as url:
        wire = Wire(url)
        kit = whole_kit()
        await wire.push_blob(NAME, kit.config)
        await wire.push_manifest(NAME, "v1", kit.manifest)

        reply = await wire("GET", f"/v2/{NAME}/manifests/v1.as.modelpack")

        assert_refused(reply, 404, code="BLOB_UNKNOWN")
        assert kit.manifest["layers"][0]["digest"] in reply.json()["errors"][0]["message"]

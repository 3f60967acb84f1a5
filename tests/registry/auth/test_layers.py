"""Who may read some layers of a kit reads those, by every door and under every name, and not a byte of the others."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kitspec.digest import Digest
from kitspec.kitfile import Kitfile, Section
from kitspec.names import RepositoryName
from registry import layout
from registry.derived import Derived, DerivedRecords
from registry.freshness import Freshness
from storage_backends.memory import MemoryBackend
from tests.registry.auth.world import World, message_of, world
from tests.registry.kits import FILES, Kit, tar_of, whole_kit
from tests.registry.wire import OCI_MANIFEST, Reply, assert_refused, encode, index

NAME = "team/kit"
BASE = f"/v2/{NAME}"
# What `serving` has: layers: [model, docs].
SLICE = "v1.only.model.docs"
READABLE = {path for path in FILES if path.startswith(("model/", "lora/", "docs/"))}
SELECTORS = ("model", "code", "datasets", "docs", "prompts", "datasets_train-set")
FORMS = ("", ".as.image", ".as.readable", ".as.modelpack")


@pytest.fixture
async def registry(storage: dict[str, Any], tmp_path: Path) -> AsyncIterator[World]:
    async with world(storage, tmp_path) as registry:
        await whole_kit().push(registry.as_user("admin"), NAME)
        yield registry


async def served(registry: World, path: str, user: str = "serving", method: str = "GET") -> Reply:
    return await registry.ask(user, method, f"{BASE}/{path}")


def layer_of(kind: str, kit: Kit | None = None) -> Digest:
    return next(Digest.of(blob) for found, _, blob, _ in (kit or whole_kit()).layers if found == kind)


def assert_names_the_slice(reply: Reply, name: str) -> None:
    assert_refused(reply, 403, code="DENIED")
    assert f"pull {NAME}:{name}" in message_of(reply)
    assert reply.json()["errors"][0]["detail"] == {"tag": name}


# ---- manifests and slices


@pytest.mark.parametrize(
    ("tag", "slice_"),
    [
        ("v1", SLICE),
        ("v1.only.datasets", SLICE),
        ("v1.only.docs.datasets", SLICE),
        ("v1.as.image", f"{SLICE}.as.image"),
        ("v1.as.modelpack", f"{SLICE}.as.modelpack"),
        ("v1.only.code.as.readable", f"{SLICE}.as.readable"),
    ],
)
async def test_the_refusal_of_a_tag_names_the_slice_that_is_not_refused(
    registry: World, tag: str, slice_: str
) -> None:
    assert_names_the_slice(await served(registry, f"manifests/{tag}"), slice_)
    assert (await served(registry, f"manifests/{slice_}")).status == 200


async def test_the_refusal_of_a_digest_names_the_filter_that_is_not_refused(registry: World) -> None:
    whole = Digest.of(encode(whole_kit().manifest))

    reply = await served(registry, f"manifests/{whole}")

    assert_refused(reply, 403, code="DENIED")
    assert f"{BASE}/manifests/{whole}?filter=model,docs" in message_of(reply)
    assert (await served(registry, f"manifests/{whole}?filter=model,docs")).status == 200
    assert (await served(registry, f"manifests/{whole}", method="HEAD")).status == 403


@pytest.mark.parametrize("form", FORMS)
async def test_a_readable_slice_can_be_pulled_whole_in_every_form(registry: World, form: str) -> None:
    async def pull(reference: str) -> list[bytes]:
        reply = await served(registry, f"manifests/{reference}")
        assert reply.status == 200, reply.body
        document = reply.json()
        if "manifests" in document:
            return [blob for child in document["manifests"] for blob in await pull(child["digest"])]
        blobs = []
        for descriptor in (document["config"], *document["layers"]):
            head = await served(registry, f"blobs/{descriptor['digest']}", method="HEAD")
            blob = await served(registry, f"blobs/{descriptor['digest']}")
            assert (head.status, blob.status) == (200, 200)
            assert Digest.of(blob.body) == descriptor["digest"]
            blobs.append(blob.body)
        return blobs

    blobs = await pull(f"{SLICE}{form}")

    assert all(any(FILES[path] in blob for blob in blobs) for path in READABLE)


async def test_a_kit_that_has_nothing_else_is_readable_whole(registry: World) -> None:
    kit = Kit()
    kit.add("docs", "docs", tar_of({"docs/README.md": b"# Only\n"}))
    digest = await kit.push(registry.as_user("admin"), NAME, "docs-only")

    assert (await served(registry, "manifests/docs-only")).body == encode(kit.manifest)
    assert (await served(registry, f"manifests/{digest}")).status == 200
    assert (await served(registry, f"blobs/{Digest.of(kit.config)}")).body == kit.config


async def test_of_a_kit_with_nothing_readable_there_is_nothing_to_pull_and_that_is_said(
    registry: World,
) -> None:
    kit = Kit()
    kit.add("dataset", "data", tar_of({"data/x.csv": b"secret"}))
    await kit.push(registry.as_user("admin"), NAME, "data-only")

    for path in (
        "manifests/data-only",
        "_modelkit/files/data-only",
        "_modelkit/archive/data-only",
        "_modelkit/kitfile/data-only",
    ):
        reply = await served(registry, path)
        assert_refused(reply, 403, code="DENIED")
        assert "none of that" in message_of(reply)


async def test_what_is_no_kit_is_for_those_who_may_read_all(registry: World) -> None:
    admin = registry.as_user("admin")
    await admin.push_image(NAME, "an-image")
    kit = Digest.of(encode(whole_kit().manifest))
    child = {"mediaType": OCI_MANIFEST, "digest": kit, "size": len(encode(whole_kit().manifest))}
    listed = index([child])
    await admin.push_manifest(NAME, "an-index", listed)

    for reference in ("an-image", "an-index", str(Digest.of(encode(listed)))):
        reply = await served(registry, f"manifests/{reference}")
        assert_refused(reply, 403, code="DENIED")
        assert "no ModelKit" in message_of(reply)


async def test_a_tag_that_is_not_there_is_not_there(registry: World) -> None:
    for path in ("manifests/v9", f"manifests/{Digest.of(b'')}", "manifests/v9.only.docs"):
        assert_refused(await served(registry, path), 404, code="MANIFEST_UNKNOWN")


async def test_a_wrong_selector_names_no_entry_to_who_may_not_read_the_kitfile(registry: World) -> None:
    for path in ("manifests/v1.only.datasets_nothing", "manifests/v1?filter=datasets:nothing"):
        reply = await served(registry, path)
        assert_refused(reply, 403, code="DENIED")
        assert b"train" not in reply.body
        assert b"train-set" in (await served(registry, path, "documenter")).body


# ---- blobs


async def test_blobs_of_readable_layers_are_read_and_others_are_as_if_they_were_not_there(
    registry: World,
) -> None:
    for kind in ("model", "modelpart", "docs"):
        for method in ("GET", "HEAD"):
            assert (await served(registry, f"blobs/{layer_of(kind)}", method=method)).status == 200
    for digest in (
        layer_of("dataset"),
        layer_of("code"),
        layer_of("prompt"),
        Digest.of(whole_kit().config),
        Digest.of(b"absent"),
    ):
        reply = await served(registry, f"blobs/{digest}")
        assert_refused(reply, 403, code="DENIED")
        assert message_of(reply).replace(digest, "") == (
            f"no blob  among what you may read in {NAME}, which is model, docs of ModelKits; "
            "pull a slice such as <tag>.only.model.docs"
        )


async def test_a_range_of_what_may_not_be_read_is_not_read_either(registry: World) -> None:
    headers = {"Range": "bytes=0-3"}

    refused = await registry.ask("serving", "GET", f"{BASE}/blobs/{layer_of('dataset')}", headers=headers)
    given = await registry.ask("serving", "GET", f"{BASE}/blobs/{layer_of('docs')}", headers=headers)

    assert_refused(refused, 403)
    assert given.status == 206


async def test_bytes_that_stand_in_a_readable_section_too_are_readable(registry: World) -> None:
    kit = Kit()
    kit.add("docs", "data/train.csv", tar_of({"data/train.csv": FILES["data/train.csv"]}))
    assert layer_of("docs", kit) == layer_of("dataset")
    assert (await served(registry, f"blobs/{layer_of('dataset')}")).status == 403

    digest = await kit.push(registry.as_user("admin"), NAME, "published")

    assert (await served(registry, f"blobs/{layer_of('dataset')}")).status == 200
    # And no longer, once the kit that showed them is gone.
    await registry.ask("admin", "DELETE", f"{BASE}/manifests/{digest}")
    assert (await served(registry, f"blobs/{layer_of('dataset')}")).status == 403


async def test_another_repositorys_kit_makes_nothing_readable_here(registry: World) -> None:
    kit = Kit()
    kit.add("docs", "data/train.csv", tar_of({"data/train.csv": FILES["data/train.csv"]}))
    await kit.push(registry.as_user("admin"), "team/other")

    assert (await served(registry, f"blobs/{layer_of('dataset')}")).status == 403


async def test_the_config_of_whole_kits_is_for_who_may_read_kitfiles(registry: World) -> None:
    config = Digest.of(whole_kit().config)

    assert (await served(registry, f"blobs/{config}", "documenter")).body == whole_kit().config
    assert (await served(registry, f"blobs/{config}")).status == 403


async def test_what_is_readable_is_so_in_a_worker_that_has_never_seen_it(tmp_path: Path) -> None:
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    async with world(storage, tmp_path) as registry:
        await whole_kit().push(registry.as_user("admin"), NAME)
        sliced = (await served(registry, f"manifests/{SLICE}")).json()
        pack = (await served(registry, f"manifests/{SLICE}.as.modelpack")).json()
        private = (await served(registry, "manifests/v1.only.datasets", "admin")).json()
        data = (await served(registry, "manifests/v1.only.datasets.as.modelpack", "admin")).json()
    async with world(storage, tmp_path) as registry:
        for document in (sliced, pack):
            assert (await served(registry, f"manifests/{Digest.of(encode(document))}")).status == 200
            for descriptor in (document["config"], *document["layers"]):
                assert (await served(registry, f"blobs/{descriptor['digest']}")).status == 200
        for document in (private, data):
            assert (await served(registry, f"manifests/{Digest.of(encode(document))}")).status == 403
            for descriptor in (document["config"], *document["layers"]):
                assert (await served(registry, f"blobs/{descriptor['digest']}")).status == 403


# ---- everything that there is, walked


async def digests_of_everything(registry: World) -> set[str]:
    """Of each manifest, config, layer and file of every view that can be asked for, and of what was pushed."""
    kit = whole_kit()
    found = {str(Digest.of(kit.config)), str(Digest.of(encode(kit.manifest)))}
    found |= {str(Digest.of(blob)) for _, _, blob, _ in kit.layers}
    references = [f"v1{only}{form}" for only in ("", *(f".only.{s}" for s in SELECTORS)) for form in FORMS]
    waiting = list(references)
    while waiting:
        reply = await served(registry, f"manifests/{waiting.pop()}", "admin")
        assert reply.status == 200, reply.body
        document = reply.json()
        found.add(reply.header("Docker-Content-Digest"))
        waiting += [child["digest"] for child in document.get("manifests", ())]
        found |= {item["digest"] for item in (document.get("config"), *document.get("layers", ())) if item}
    return found


@pytest.mark.parametrize(
    ("user", "prefixes"), [("serving", ("model/", "lora/", "docs/")), ("documenter", ("docs/",))]
)
async def test_whatever_digest_one_has_learned_it_opens_nothing_unreadable(
    registry: World, user: str, prefixes: tuple[str, ...]
) -> None:
    hidden = [content for path, content in FILES.items() if not path.startswith(prefixes)]
    shown = [content for path, content in FILES.items() if path.startswith(prefixes)]
    opened = []

    for digest in await digests_of_everything(registry):
        for kind in ("blobs", "manifests"):
            reply = await served(registry, f"{kind}/{digest}", user)
            assert reply.status in (200, 403, 404)
            if reply.status == 200:
                opened.append(reply.body)

    assert not [body for body in opened if any(content in body for content in hidden)]
    assert all(any(content in body for body in opened) for content in shown)


# ---- files, archives, Kitfiles


def members(reply: Reply) -> set[str]:
    assert reply.status == 200, reply.body
    with tarfile.open(fileobj=io.BytesIO(reply.body)) as archive:
        return {member.name for member in archive if member.isfile()}


async def test_files_are_listed_and_read_as_far_as_they_are_readable(registry: World) -> None:
    listing = (await served(registry, "_modelkit/files/v1")).json()

    assert {file["path"] for file in listing["files"] if file["type"] == "file"} == READABLE
    for path, content in FILES.items():
        reply = await served(registry, f"_modelkit/files/v1/{path}")
        if path in READABLE:
            assert reply.body == content
        else:
            assert (reply.status, reply.codes) == (404, ["FILE_UNKNOWN"])
            assert message_of(reply).endswith("of which you may read model, docs")
    assert_names_the_slice(await served(registry, "_modelkit/files/v1.only.datasets"), SLICE)
    refused = await served(registry, "_modelkit/files/v1.only.datasets/data/train.csv")
    assert_names_the_slice(refused, SLICE)


async def test_an_archive_leaves_nothing_away_in_silence(registry: World) -> None:
    assert members(await served(registry, f"_modelkit/archive/{SLICE}")) == READABLE
    assert members(await served(registry, "_modelkit/archive/v1?filter=model,docs")) == READABLE
    for query in ("v1", "v1?path=docs/**", "v1?filter=docs,datasets"):
        assert_names_the_slice(await served(registry, f"_modelkit/archive/{query}"), SLICE)


async def test_a_kitfile_is_read_as_far_as_it_is_of_what_is_readable(registry: World) -> None:
    whole = await served(registry, "_modelkit/kitfile/v1", "documenter")
    assert b"train set" in whole.body
    assert_names_the_slice(await served(registry, "_modelkit/kitfile/v1"), SLICE)

    part = await served(registry, f"_modelkit/kitfile/{SLICE}")

    kitfile = Kitfile.from_yaml(part.body)
    assert not kitfile.datasets
    assert not kitfile.code
    assert [entry.path for entry in kitfile.docs] == ["docs"]


async def test_tensors_of_unreadable_layers_are_not_listed(registry: World) -> None:
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    weights = len(header).to_bytes(8, "little") + header + b"\0"
    kit = Kit()
    kit.add("model", "model", tar_of({"model/a.safetensors": weights}), name="net")
    kit.add("dataset", "data", tar_of({"data/b.safetensors": weights}))
    await kit.push(registry.as_user("admin"), NAME, "t")

    listed = (await served(registry, "_modelkit/tensors/t")).json()["files"]

    assert [file["path"] for file in listed] == ["model/a.safetensors"]
    assert (await served(registry, "_modelkit/tensors/t/model/a.safetensors?name=a")).status == 200
    refused = await served(registry, "_modelkit/tensors/t/data/b.safetensors?name=a")
    assert_refused(refused, 404, code="FILE_UNKNOWN")


# ---- the hub


async def hub(registry: World, path: str, user: str = "serving") -> Reply:
    return await registry.ask(user, "GET", f"/hf/{path}")


async def test_the_hub_shows_the_readable_part_under_a_commit_of_its_own(registry: World) -> None:
    info = (await hub(registry, f"api/models/{NAME}")).json()
    whole = (await hub(registry, f"api/models/{NAME}", "admin")).json()
    slice_digest = (await served(registry, f"manifests/{SLICE}")).header("Docker-Content-Digest")

    assert info["sha"] == Digest(slice_digest).encoded[:40]
    assert info["sha"] != whole["sha"]
    names = {file["rfilename"] for file in info["siblings"]}
    assert "README.md" in {name.rpartition("/")[2] for name in names}
    assert not [name for name in names if name.startswith(("data", "code", "prompts"))]
    for name in names:
        assert (await hub(registry, f"{NAME}/resolve/{info['sha']}/{name}")).status == 200
    refs = (await hub(registry, f"api/models/{NAME}/refs")).json()
    assert {ref["targetCommit"] for ref in (*refs["branches"], *refs["tags"])} == {info["sha"]}
    tree = await hub(registry, f"api/models/{NAME}/tree/main?recursive=true")
    assert b"train" not in tree.body
    assert (await hub(registry, f"api/models/{NAME}/commits/main")).json()[0]["id"] == info["sha"]


async def test_the_hub_refuses_the_commit_of_the_whole_in_its_clients_words(registry: World) -> None:
    commit = (await hub(registry, f"api/models/{NAME}", "admin")).json()["sha"]
    digest = Digest.of(encode(whole_kit().manifest))

    for path in (
        f"api/models/{NAME}/revision/{commit}",
        f"{NAME}/resolve/{commit}/data/train.csv",
        f"{NAME}/resolve/{digest.replace(':', '-')}/data/train.csv",
        f"{NAME}/resolve/v1.only.datasets/data/train.csv",
        f"api/models/{NAME}/tree/v1.only.datasets",
    ):
        reply = await hub(registry, path)
        assert_refused(reply, 403, code="DENIED")
        assert reply.header("X-Error-Code") == "GatedRepo"
        assert "only.model.docs" in message_of(reply) or "filter=model,docs" in message_of(reply)
    missing = await hub(registry, f"{NAME}/resolve/main/data/train.csv")
    assert (missing.status, missing.header("X-Error-Code")) == (404, "EntryNotFound")


async def test_the_hub_lists_the_readable_part(registry: World) -> None:
    kit = Kit()
    kit.add("dataset", "data", tar_of({"data/x.csv": b"secret"}))
    await kit.push(registry.as_user("admin"), "team/data")

    listed = (await hub(registry, "api/models")).json()
    datasets = (await hub(registry, "api/datasets")).json()

    assert [entry["id"] for entry in listed] == [NAME]
    assert datasets == []
    assert [entry["id"] for entry in (await hub(registry, "api/datasets", "admin")).json()] == [
        "team/data",
        NAME,
    ]


# ---- mounts, referrers, pushes


async def test_a_layer_is_mounted_elsewhere_only_if_it_may_be_read_here(registry: World) -> None:
    uploads = "/v2/own/kit/blobs/uploads/"
    for kind, status in (("docs", 201), ("dataset", 202), ("code", 202)):
        reply = await registry.ask("serving", "POST", f"{uploads}?mount={layer_of(kind)}&from={NAME}")
        assert reply.status == status
    for kind, status in (("model", 201), ("prompt", 202)):
        assert (await registry.ask("serving", "POST", f"{uploads}?mount={layer_of(kind)}")).status == status
    for kind, status in (("docs", 200), ("model", 200), ("dataset", 404), ("code", 404), ("prompt", 404)):
        reply = await registry.ask("serving", "GET", f"/v2/own/kit/blobs/{layer_of(kind)}")
        assert reply.status == status


async def test_referrers_are_listed_as_far_as_they_are_readable(registry: World) -> None:
    admin = registry.as_user("admin")
    subject = Digest.of(encode(whole_kit().manifest))
    descriptor = {"mediaType": OCI_MANIFEST, "digest": subject, "size": len(encode(whole_kit().manifest))}
    await admin.push_image(NAME, "signature", subject=descriptor)
    kit = Kit()
    kit.add("docs", "docs", tar_of({"docs/README.md": b"# More\n"}))
    await admin.push_blob(NAME, kit.config)
    await admin.push_blob(NAME, kit.layers[0][2])
    readable = await admin.push_manifest(NAME, "more", {**kit.manifest, "subject": descriptor})

    async def listed(user: str) -> Iterable[str]:
        document = (await served(registry, f"referrers/{subject}", user)).json()
        return [found["digest"] for found in document["manifests"]]

    assert len(list(await listed("reader"))) == 2
    assert await listed("serving") == [readable]


async def test_who_reads_some_layers_only_pushes_no_kit_that_names_the_others(
    storage: dict[str, Any], tmp_path: Path
) -> None:
    """By two policies that add up: one alone is refused with the file."""
    access = {
        "repositories": {
            "team/**": {
                "policies": [
                    {"users": ["serving"], "actions": ["read"], "layers": ["docs"]},
                    {"users": ["serving"], "actions": ["create", "update"]},
                ]
            }
        },
        "adminPolicy": {"users": ["admin"], "actions": ["read", "create", "update"]},
    }
    async with world(storage, tmp_path, access=access) as registry:
        await whole_kit().push(registry.as_user("admin"), NAME)
        thief = Kit()
        thief.add("docs", "data/train.csv", tar_of({"data/train.csv": FILES["data/train.csv"]}))

        for method, target, body in (
            ("PUT", f"{BASE}/manifests/mine", encode(thief.manifest)),
            ("POST", f"{BASE}/blobs/uploads/", b""),
        ):
            headers = {"Content-Type": OCI_MANIFEST}
            reply = await registry.ask("serving", method, target, headers=headers, body=body)
            assert_refused(reply, 403, code="DENIED")


# ---- many kits


async def test_a_layer_of_an_old_kit_is_found_among_many(registry: World) -> None:
    admin = registry.as_user("admin")
    for number in range(40):
        await admin.push_image(NAME, f"image-{number}", annotations={"n": str(number)})

    replies = await asyncio.gather(*(served(registry, f"blobs/{layer_of('docs')}") for _ in range(8)))

    assert {reply.status for reply in replies} == {200}


async def test_a_kit_whose_parts_disagree_makes_nothing_readable(registry: World) -> None:
    admin = registry.as_user("admin")
    kit = whole_kit()
    broken = json.loads(encode(kit.manifest))
    dataset = next(layer for layer in broken["layers"] if layer["digest"] == layer_of("dataset"))
    # The config still says dataset; the manifest says docs.
    dataset["mediaType"] = dataset["mediaType"].replace("dataset", "docs")
    await admin.push_manifest(NAME, "broken", broken)

    assert (await served(registry, f"blobs/{layer_of('dataset')}")).status == 403
    assert (await served(registry, "manifests/broken")).status in (400, 403)


async def test_a_record_of_before_that_says_no_sections_is_for_readers_of_all_until_it_is_derived_anew() -> (
    None
):
    backend = MemoryBackend()
    records = DerivedRecords(backend, Freshness(backend, grace_s=None))
    name, source = RepositoryName(NAME), Digest.of(b"source")
    await backend.write(layout.manifest_key(name, source), b"")
    document = Derived(source, OCI_MANIFEST, b"{}")
    digest = Digest.of(document.content)

    await records.put(name, digest, document)
    assert [found.sections async for found in records.each(name, digest)] == [None]

    await records.put(name, digest, replace(document, sections=frozenset((Section.DOCS,))))
    assert [found.sections async for found in records.each(name, digest)] == [{Section.DOCS}]

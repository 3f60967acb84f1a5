"""A kit becomes files: the chosen ones, whole and verified; or nothing at all."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitclient.compression import LayerBroken
from kitclient.errors import ClientError
from kitclient.folders import PathRefused
from kitclient.image_layout import LayoutRegistry
from kitclient.modelkit import NotAModelKit, read_modelkit
from kitclient.packing import PackStyle, pack
from kitclient.references import ReferenceChainInvalid
from kitclient.staging import Existing
from kitclient.transfer import Place
from kitclient.unpacking import UnpackRefused, unpack
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, DigestInvalid, OciError
from kitspec.kitfile import Kitfile
from kitspec.names import Reference, RepositoryName, Tag
from kitspec.selection import parse_filter
from tests.kitclient.tars import layer_tar

KIT = RepositoryName("kit")
V1 = Tag("v1")
KITFILE = """
manifestVersion: 1.0.0
package: {name: k}
model: {name: m, path: ./m, parts: [{name: p, path: parts/p.bin}]}
code: [{path: src}]
datasets: [{name: train, path: data/train.csv}, {name: test, path: data/test.csv}]
docs: [{path: README.md}]
"""
FILES = {
    "m/w.bin": b"weights" * 1000,
    "parts/p.bin": b"part",
    "src/a.py": b"print()",
    "data/train.csv": b"1,2",
    "data/test.csv": b"3,4",
    "README.md": b"# k",
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LayoutRegistry]:
    async with LayoutRegistry(tmp_path / "store") as registry:
        yield registry


@pytest.fixture
async def place(tmp_path: Path, store: LayoutRegistry) -> Place:
    """A kit with everything in it."""
    folder = tmp_path / "context"
    write(folder, FILES)
    place = Place(store, KIT)
    await pack(folder, Kitfile.from_yaml(KITFILE.encode()), place, tags=(V1,))
    return place


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "here" / "target"


@pytest.fixture(autouse=True)
def nothing_is_left_beside_the_target(target: Path):
    yield
    if target.parent.exists():
        assert [path.name for path in target.parent.iterdir() if path != target] == []


async def push(
    place: Place, kitfile: dict, layers: list[tuple[str, bytes]], *, tag: Tag = V1, manifest=None, config=None
):
    """A kit as nobody packs it."""
    descriptors = []
    content = config if config is not None else json.dumps(kitfile).encode()
    for media_type, blob in (("application/vnd.kitops.modelkit.config.v1+json", content), *layers):
        upload = await place.registry.begin_upload(place.name)
        await upload.append(_once(blob))
        await upload.commit(Digest.of(blob))
        descriptors.append(Descriptor(media_type, Digest.of(blob), len(blob)).to_json())
    document = {"schemaVersion": 2, "config": descriptors[0], "layers": descriptors[1:]} | (manifest or {})
    media_type = "application/vnd.oci.image.manifest.v1+json"
    await place.registry.put_manifest(place.name, json.dumps(document).encode(), media_type, tags=(tag,))


async def _once(blob: bytes) -> AsyncIterator[bytes]:
    yield blob


@pytest.mark.parametrize("form", ["current", "1.7", "modelpack"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
async def test_everything_comes_out_as_it_went_in(tmp_path: Path, store, target: Path, form, compression):
    if (form, compression) == ("1.7", "zstd"):
        compression = "gzip-fastest"
    write(tmp_path / "context", FILES)
    place = Place(store, KIT)
    style = PackStyle(form, "tar", compression)
    packed = await pack(tmp_path / "context", Kitfile.from_yaml(KITFILE.encode()), place, style=style)

    await unpack(place, packed.manifest.digest, target)

    unpacked = contents(target)
    assert Kitfile.from_yaml(unpacked.pop("Kitfile")) == Kitfile.from_yaml(KITFILE.encode())
    assert unpacked == FILES


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (["model"], {"m/w.bin", "parts/p.bin"}),
        (["model:p"], {"parts/p.bin"}),
        (["model:./m"], {"m/w.bin"}),
        (["datasets:train"], {"data/train.csv"}),
        (["datasets:train", "docs"], {"data/train.csv", "README.md"}),
        (["code,docs"], {"src/a.py", "README.md"}),
        (["kitfile"], {"Kitfile"}),
        (["datasets:nope"], set()),
        ([], {*FILES, "Kitfile"}),
    ],
)
async def test_a_filter_gives_what_it_chooses_and_reads_nothing_else(
    place: Place, target: Path, filters, wanted
):
    watched = _Watched(place.registry)

    await unpack(Place(watched, KIT), V1, target, filters=[parse_filter(text) for text in filters])

    assert set(contents(target)) == wanted
    # The config, and each chosen layer once.
    assert len(watched.opened) == 1 + len(wanted - {"Kitfile"})


class _Watched:
    def __init__(self, inner) -> None:
        self._inner = inner
        self.opened: list[Digest] = []

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def open_blob(self, name, digest, span=None):
        self.opened.append(digest)
        return self._inner.open_blob(name, digest, span)


class _Changed(_Watched):
    """A registry that sends other bytes of the same length for large blobs, or too few."""

    def __init__(self, inner, *, change) -> None:
        super().__init__(inner)
        self._change = change

    @asynccontextmanager
    async def open_blob(self, name, digest, span=None):
        async with self._inner.open_blob(name, digest, span) as body:
            content = b"".join([chunk async for chunk in body])
        if len(content) > 5000:
            content = self._change(content)
        yield _Body(content)


class _Body:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


def _flip(content: bytes) -> bytes:
    return content.replace(b"weights", b"WEIGHTS", 1)


def _break(_: bytes) -> bytes:
    raise OciError("the connection broke")


def _shorten(content: bytes) -> bytes:
    return content[:-1]


def _lengthen(content: bytes) -> bytes:
    return content + b"x"


@pytest.mark.parametrize("change", [_flip, _shorten, _lengthen, _break])
async def test_C_12_INV_C1_a_wrong_layer_leaves_nothing_of_any_layer(place: Place, target: Path, change):
    with pytest.raises((OciError, ClientError, ContentInvalid)):
        await unpack(Place(_Changed(place.registry, change=change), KIT), V1, target)

    assert not target.exists()


async def test_C_12_a_flipped_byte_in_the_local_store_is_found(place: Place, target: Path, tmp_path: Path):
    kit = await read_modelkit(place, V1)
    (path,) = (tmp_path / "store/blobs/sha256").glob(kit.manifest.layers[0].digest.encoded)
    path.chmod(0o600)
    path.write_bytes(_flip(path.read_bytes()))

    with pytest.raises(DigestInvalid):
        await unpack(place, V1, target)

    assert not target.exists()


async def test_INV_C1_an_unpack_that_is_cancelled_leaves_nothing(place: Place, target: Path):
    (target).mkdir(parents=True)
    waiting = asyncio.Event()

    class Slow(_Watched):
        @asynccontextmanager
        async def open_blob(self, name, digest, span=None):
            async with self._inner.open_blob(name, digest, span) as body:
                if len(self.opened) > 2:
                    waiting.set()
                    await asyncio.Event().wait()
                self.opened.append(digest)
                yield body

    task = asyncio.create_task(unpack(Place(Slow(place.registry), KIT), V1, target))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert list(target.iterdir()) == []


async def test_T_15_what_exists_is_an_error_before_anything_is_written(place: Place, target: Path):
    write(target, {"src/a.py": b"mine"})

    with pytest.raises(PathRefused, match=r"failed to unpack: path 'src/a.py' already exists"):
        await unpack(place, V1, target)

    assert contents(target) == {"src/a.py": b"mine"}


async def test_T_15_a_file_entry_that_exists_is_refused_without_being_fetched(place: Place, target: Path):
    write(target, {"README.md": b"mine"})
    watched = _Watched(place.registry)

    with pytest.raises(PathRefused, match="already exists"):
        await unpack(Place(watched, KIT), V1, target, filters=[parse_filter("docs")])

    assert len(watched.opened) == 1


async def test_T_15_existing_files_are_left_or_replaced_as_asked(place: Place, target: Path):
    write(target, {"src/a.py": b"mine"})

    unpacked = await unpack(place, V1, target, existing=Existing.SKIP)
    assert unpacked.kept == ("src/a.py",)
    assert contents(target)["src/a.py"] == b"mine"
    assert contents(target)["m/w.bin"] == FILES["m/w.bin"]

    await unpack(place, V1, target, existing=Existing.REPLACE)
    assert contents(target)["src/a.py"] == FILES["src/a.py"]


async def test_an_existing_kitfile_may_be_the_same_and_is_replaced_only_by_overwrite(
    place: Place, target: Path
):
    await unpack(place, V1, target, filters=[parse_filter("kitfile")])
    await unpack(place, V1, target, filters=[parse_filter("kitfile,docs")])
    (target / "Kitfile").write_bytes(b"mine")

    for existing in (Existing.REFUSE, Existing.SKIP):
        with pytest.raises(UnpackRefused, match="already exists"):
            await unpack(place, V1, target, filters=[parse_filter("kitfile")], existing=existing)
    await unpack(place, V1, target, filters=[parse_filter("kitfile")], existing=Existing.REPLACE)

    assert Kitfile.from_yaml((target / "Kitfile").read_bytes()).package.name == "k"


async def test_T_14_a_target_that_is_a_link_is_its_folder(place: Place, target: Path, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    await unpack(place, V1, tmp_path / "link", filters=[parse_filter("docs")])

    assert contents(tmp_path / "real") == {"README.md": b"# k"}
    assert (tmp_path / "link").is_symlink()


async def test_two_unpacks_to_one_folder_do_not_disturb_each_other(place: Place, target: Path):
    await asyncio.gather(
        unpack(place, V1, target, filters=[parse_filter("model")]),
        unpack(place, V1, target, filters=[parse_filter("datasets")]),
    )

    assert set(contents(target)) == {"m/w.bin", "parts/p.bin", "data/train.csv", "data/test.csv"}


BROKEN: dict[str, tuple[dict, list, dict]] = {
    "more layers than entries": ({"model": {"path": "a"}}, ["model", "model"], {}),
    "no model": ({}, ["model"], {}),
    "no layer": ({"model": {"path": "a"}}, [], {}),
    "unknown compression": ({"model": {"path": "a"}}, ["model.v1.tar+br"], {}),
    "null entries": ({"model": None, "code": [None]}, [], {}),
    "wrong digest": ({"model": {"path": "a", "digest": "sha256:" + 64 * "0"}}, ["model"], {}),
    "numbers": ({"model": {"path": 7}}, ["model"], {}),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_C_17_a_kitfile_that_disagrees_with_the_manifest_is_an_error(store, target: Path, case: str):
    kitfile, kinds, manifest = BROKEN[case]
    place = Place(store, KIT)
    layers = [
        (
            f"application/vnd.kitops.modelkit.{kind if '.' in kind else kind + '.v1.tar'}",
            layer_tar([(f"a{number}", b"")]),
        )
        for number, kind in enumerate(kinds)
    ]
    await push(place, kitfile, layers, manifest=manifest)

    with pytest.raises((ContentInvalid, ClientError, OciError)):
        await unpack(place, V1, target)

    assert not target.exists()


@pytest.mark.parametrize(
    "config", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model": {"parts": 1}}']
)
async def test_C_17_a_config_that_is_no_kitfile_is_an_error(store, target: Path, config: bytes):
    place = Place(store, KIT)
    await push(place, {}, [], config=config)

    with pytest.raises((ContentInvalid, ClientError, OciError)):
        await unpack(place, V1, target)


async def test_images_and_indexes_are_no_modelkits(store, target: Path):
    place = Place(store, KIT)
    config = {"mediaType": "application/vnd.oci.image.config.v1+json"}
    upload = await store.begin_upload(KIT)
    await upload.append(_once(b"{}"))
    await upload.commit(Digest.of(b"{}"))
    document = {"schemaVersion": 2, "config": config | {"digest": Digest.of(b"{}"), "size": 2}, "layers": []}
    await store.put_manifest(
        KIT, json.dumps(document).encode(), "application/vnd.oci.image.manifest.v1+json", tags=(V1,)
    )

    with pytest.raises(NotAModelKit, match="is not a modelkit"):
        await unpack(place, V1, target)


def finder(store: LayoutRegistry):
    @asynccontextmanager
    async def find(reference: Reference):
        assert reference.repository is not None
        yield Place(store, reference.repository), reference.tag or V1

    return find


async def test_the_model_of_another_kit_is_unpacked_and_nothing_else_of_it(store, place: Place, target: Path):
    child = Place(store, RepositoryName("child"))
    await push(
        child,
        {"model": {"path": "kit:v1"}, "docs": [{"path": "NEWS"}]},
        [("application/vnd.kitops.modelkit.docs.v1.tar", layer_tar([("NEWS", b"new")]))],
    )

    await unpack(child, V1, target, find=finder(store))
    assert set(contents(target)) == {"m/w.bin", "parts/p.bin", "NEWS", "Kitfile"}

    await unpack(child, V1, target / "docs", find=finder(store), filters=[parse_filter("docs")])
    assert set(contents(target / "docs")) == {"NEWS"}
    await unpack(child, V1, target / "part", find=finder(store), filters=[parse_filter("model,docs:p")])
    assert set(contents(target / "part")) == {"parts/p.bin"}


async def test_C_18_kits_in_a_circle_and_chains_without_end_are_refused(store, target: Path):
    for name, parent in (("a", "b:v1"), ("b", "a:v1")):
        await push(Place(store, RepositoryName(name)), {"model": {"path": parent}}, [])
    for number in range(101):
        await push(Place(store, RepositoryName(f"c{number}")), {"model": {"path": f"c{number + 1}:v1"}}, [])

    for name, words in (("a", "cycle"), ("c0", "maximum number")):
        with pytest.raises(ReferenceChainInvalid, match=words):
            await unpack(Place(store, RepositoryName(name)), V1, target, find=finder(store))
    assert not target.exists()


async def test_a_kit_of_before_0_5_lands_below_the_folder_of_its_paths(store, target: Path):
    place = Place(store, KIT)
    tar = gzip.compress(layer_tar([("w.bin", b"1")]))
    await push(
        place,
        {"model": {"path": "models/w.bin"}},
        [("application/vnd.kitops.modelkit.model.v1.tar+gzip", tar)],
    )

    await unpack(place, V1, target, filters=[parse_filter("model")])

    assert contents(target) == {"models/w.bin": b"1"}


async def test_a_legacy_modelpack_is_read_by_its_annotations(store, target: Path):
    place = Place(store, KIT)
    layers = [
        ("application/vnd.cnai.model.weight.v1.tar", layer_tar([("w.bin", b"1")])),
        ("application/vnd.cnai.model.doc.v1.raw", b"doc"),
    ]
    diff_ids = [Digest.of(blob) for _, blob in layers]
    config = json.dumps({"modelfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
    descriptors = [
        Descriptor(
            media_type, Digest.of(blob), len(blob), annotations={"org.cnai.model.filepath": path}
        ).to_json()
        for (media_type, blob), path in zip(layers, ("w.bin", "docs/README.md"), strict=True)
    ]
    config_descriptor = Descriptor(
        "application/vnd.cnai.model.config.v1+json", Digest.of(config), len(config)
    ).to_json()
    await push(
        place, {}, layers, config=config, manifest={"config": config_descriptor, "layers": descriptors}
    )

    await unpack(place, V1, target, filters=[parse_filter("model,docs")])

    assert contents(target) == {"w.bin": b"1", "docs/README.md": b"doc"}


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\x1bb", ".", "a//b/"])
async def test_T_12_a_raw_layer_cannot_choose_a_place_outside(store, target: Path, path: str):
    place = Place(store, KIT)
    layer = ("application/vnd.kitops.modelkit.model.v1.raw", b"raw")
    descriptor = Descriptor(
        layer[0], Digest.of(b"raw"), 3, annotations={"org.cncf.model.filepath": path}
    ).to_json()
    await push(place, {"model": {"path": "w"}}, [layer], manifest={"layers": [descriptor]})

    with pytest.raises(ContentInvalid, match="no path in the target"):
        await unpack(place, V1, target)


async def test_two_layers_that_hold_one_file_are_refused(store, target: Path):
    place = Place(store, KIT)
    kinds = [("model", b"1"), ("code", b"2")]
    layers = [
        (f"application/vnd.kitops.modelkit.{kind}.v1.tar", layer_tar([("same", content)]))
        for kind, content in kinds
    ]
    await push(place, {"model": {"path": "same"}, "code": [{"path": "."}]}, layers)

    with pytest.raises(PathRefused, match="two layers hold the file 'same'"):
        await unpack(place, V1, target, existing=Existing.REPLACE)

    assert not target.exists()


async def test_L_22_more_than_may_be_written_is_refused(place: Place, target: Path):
    with pytest.raises(LayerBroken, match="more than 3000 bytes"):
        await unpack(place, V1, target, max_unpacked=3000)

    assert not target.exists()


async def test_L_22_a_kit_for_which_there_is_no_room_is_refused_before_anything_is_fetched(
    place, target, monkeypatch
):
    monkeypatch.setattr("kitclient.staging.Staging.free_bytes", 1000)
    watched = _Watched(place.registry)

    with pytest.raises(UnpackRefused, match="are free"):
        await unpack(Place(watched, KIT), V1, target)

    assert len(watched.opened) == 1


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="/."),
    min_size=1,
    max_size=40,
)
TREES = st.recursive(
    st.binary(max_size=2000), lambda children: st.dictionaries(NAMES, children, max_size=4), max_leaves=12
)


@given(
    tree=st.dictionaries(NAMES, TREES, max_size=4),
    executable=st.booleans(),
    compression=st.sampled_from(["none", "gzip", "zstd"]),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_tree_survives_pack_and_unpack(tmp_path_factory, tree, executable, compression):
    folder = tmp_path_factory.mktemp("tree")
    _make(folder / "context" / "m", tree, 0o755 if executable else 0o644)

    async def round_trip() -> None:
        async with LayoutRegistry(folder / "store") as store:
            place = Place(store, KIT)
            style = PackStyle(compression=compression)
            packed = await pack(
                folder / "context", Kitfile.from_yaml(b"model: {path: m}"), place, style=style
            )
            await unpack(place, packed.manifest.digest, folder / "out", filters=[parse_filter("model")])

    asyncio.run(round_trip())

    assert _read(folder / "out" / "m") == _read(folder / "context" / "m")


def _make(path: Path, tree, mode: int) -> None:
    path.mkdir(parents=True)
    for name, child in tree.items():
        if isinstance(child, dict):
            _make(path / name, child, mode)
        else:
            (path / name).write_bytes(child)
            (path / name).chmod(mode)


def _read(path: Path):
    return {
        str(child.relative_to(path)): None
        if child.is_dir()
        else (child.read_bytes(), os.access(child, os.X_OK), child.stat().st_mode & 0o100)
        for child in path.rglob("*")
    }

"""Single files of a kit: listed, written to stdout, unpacked; from a registry that can cut them out, and from any other."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from kitclient.compression import LayerBroken
from kitclient.errors import ClientError, RegistryUnreachable, ServerMisbehaved
from kitclient.fetches import runs_of
from kitclient.folders import PathRefused
from kitclient.image_layout import LayoutRegistry
from kitclient.kit_files import (
    KitFile,
    PathAmbiguous,
    PathChoice,
    PathIsFolder,
    PathMissing,
    parse_file_reference,
)
from kitclient.layer_reading import FileRun, read_run
from kitclient.modelkit import read_modelkit
from kitclient.packing import PackStyle, pack
from kitclient.progress import Silence
from kitclient.remote import RemoteRegistry
from kitclient.single_files import HELD_SIZE_MAX, OutputSpoiled, cat, list_files
from kitclient.staging import Existing
from kitclient.transfer import Place, copy
from kitclient.unpacking import unpack
from kitspec.digest import Digest
from kitspec.errors import DigestInvalid, FilterInvalid, OciError, ReferenceInvalid, SizeInvalid
from kitspec.kitfile import Kitfile, Section
from kitspec.names import Reference, RepositoryName, Tag
from kitspec.selection import parse_filter, select_layers
from tests.kitclient.kit_server import KitServer, serving_kits
from tests.kitclient.peer import Peer, client
from tests.kitclient.tars import layer_tar
from tests.kitclient.test_unpacking import contents, push, write
from tests.registry.conftest import configured, served

KIT = RepositoryName("team/kit")
V1 = Tag("v1")
MIB = 1024 * 1024
KITFILE = """
manifestVersion: 1.0.0
package: {name: k}
model: {name: m, path: ./model, parts: [{name: p, path: parts/p.bin}]}
code: [{path: src}]
datasets: [{name: train, path: data/train.csv}, {name: test, path: data/test.csv}]
docs: [{path: README.md}]
"""
FILES = {
    "model/a.safetensors": os.urandom(300_000),
    "model/config.json": b'{"a": 1}',
    "model/empty": b"",
    "model/m.bin": bytes(800_000),
    "model/sub/[x] 100%?#ä.json": b"[]",
    "model/tokenizer.json": b"tokens" * 1000,
    "model/z.safetensors": os.urandom(200_000),
    "parts/p.bin": b"part" * 5000,
    "src/a.py": b"print()",
    "src/deep/b.py": b"pass",
    "data/train.csv": b"1,2\n" * 10_000,
    "data/test.csv": b"3,4",
    "README.md": b"# k",
}
FOLDERS = {"data", "model", "model/none", "model/sub", "parts", "src", "src/deep"}
STYLES = {
    "tar": PackStyle(),
    "tar+gzip": PackStyle(compression="gzip"),
    "tar+zstd": PackStyle(compression="zstd"),
    "modelpack": PackStyle("modelpack"),
}
SOURCES = ["local store", "our registry", "stand-in", "whole layers", "any registry"]
LISTING = ["our registry", "stand-in"]
READING = ["local store", "whole layers", "any registry"]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LayoutRegistry]:
    async with LayoutRegistry(tmp_path / "store") as registry:
        yield registry


@pytest.fixture
def pack_kit(tmp_path: Path, store: LayoutRegistry):
    async def run(
        files: dict[str, bytes] = FILES,
        kitfile: str = KITFILE,
        *,
        style: PackStyle = STYLES["tar"],
        tag: Tag = V1,
        name: RepositoryName = KIT,
    ) -> Digest:
        folder = tmp_path / f"context-{name.replace('/', '-')}-{tag}"
        write(folder, files)
        if files is FILES:
            (folder / "model/none").mkdir()
            (folder / "src/a.py").chmod(0o755)
        packed = await pack(
            folder, Kitfile.from_yaml(kitfile.encode()), Place(store, name), tags=(tag,), style=style
        )
        return packed.manifest.digest

    return run


@pytest.fixture
async def server(tmp_path: Path, store: LayoutRegistry) -> AsyncIterator[tuple[KitServer, Peer]]:
    async with serving_kits(store, tmp_path / "store") as served:
        yield served


@pytest.fixture
async def ours(server: tuple[KitServer, Peer]) -> AsyncIterator[Place]:
    """The kit in a registry that has the extension."""
    async with client(server[1]) as registry:
        yield Place(registry, KIT)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "here" / "target"


@pytest.fixture(autouse=True)
def nothing_is_left_beside_the_target(target: Path):
    yield
    if target.parent.exists():
        assert [path.name for path in target.parent.iterdir() if path != target] == []


@pytest.fixture
def anywhere(store: LayoutRegistry, server: tuple[KitServer, Peer], tmp_path: Path):
    """`async with anywhere(source) as (place, options)`: where the kit is, and what that source asks of our functions."""

    @asynccontextmanager
    async def opened(source: str) -> AsyncIterator[tuple[Place, dict[str, bool]]]:
        if source == "local store":
            yield Place(store, KIT), {}
        elif source == "our registry":
            storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
            async with served(configured(storage)) as url, _remote(url) as registry:
                await copy(Place(store, KIT), V1, Place(registry, KIT), tags=(V1,))
                yield Place(registry, KIT), {}
        else:
            if source == "any registry":
                server[0].discovery = (404, "")
            async with client(server[1]) as registry:
                yield Place(registry, KIT), {"verify_layers": source == "whole layers"}

    return opened


def _remote(url: str) -> RemoteRegistry:
    return RemoteRegistry(url.removeprefix("http://"), plain_http=True)


async def read(place: Place, path: str, **options) -> bytes:
    pieces: list[bytes] = []
    await cat(place, V1, path, lambda piece: pieces.append(bytes(piece)), **options)
    return b"".join(pieces)


# ---- REFERENCE:PATH


@pytest.mark.parametrize(
    ("text", "reference", "path"),
    [
        ("host:5000/team/llm:v1:model/a.bin", "host:5000/team/llm:v1", "model/a.bin"),
        (f"team/llm@sha256:{64 * 'a'}:README.md", f"team/llm@sha256:{64 * 'a'}", "README.md"),
        (f"h.io/llm:v1@sha256:{64 * 'a'}:x", f"h.io/llm@sha256:{64 * 'a'}", "x"),
        (f"sha256:{64 * 'a'}:x", f"sha256:{64 * 'a'}", "x"),
        ("llm:v1:a:b", "llm:v1", "a:b"),
        ("llm:v1:a:v2:b", "llm:v1", "a:v2:b"),
        ("llm:v1:sha256:b", "llm:v1", "sha256:b"),
        ("llm:v1:./a//b/", "llm:v1", "a/b"),
        ("llm:v1: a b", "llm:v1", " a b"),
        ("[::1]:5000/llm:v1:x", "[::1]:5000/llm:v1", "x"),
    ],
)
def test_a_file_is_what_stands_behind_a_reference_with_a_tag_or_a_digest(text, reference, path):
    parsed, named = parse_file_reference(text)

    assert (parsed, named) == (Reference.parse(reference), path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "llm",
        "llm:v1",
        "host:5000/llm",
        "host:5000/llm:v1",
        "host:5000/team/llm:model/a.bin",
        "llm:v1:",
        "llm:v1:.",
        "llm:v1:../x",
        "llm:v1:/etc/passwd",
        "llm:v1:a\x1bb",
        "llm:v1:\udcff",
        "UPPER:v1:x",
        "llm@sha256:abc:x",
    ],
)
def test_what_names_no_file_of_a_kit_is_refused(text: str):
    with pytest.raises(ReferenceInvalid):
        parse_file_reference(text)


@given(
    path=st.lists(
        st.text("ab:.@, ä-", min_size=1, max_size=6).filter(lambda part: part not in (".", "..")), min_size=1
    )
)
def test_any_path_survives_behind_a_reference(path: list[str]):
    reference, parsed = parse_file_reference(f"host:5000/team/llm:v1:{'/'.join(path)}")

    assert (str(reference), parsed) == ("host:5000/team/llm:v1", "/".join(path))


# ---- which layers may hold what


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("README.md", {"README.md"}),
        ("*.md", {"README.md"}),
        ("model/**", {"model"}),
        ("model/sub/x", {"model"}),
        ("model", {"model"}),
        # Of an entry nobody knows whether it is a file or a folder.
        ("*/a.py", {"model", "src", "README.md"}),
        ("data/*.csv", {"data/train.csv", "data/test.csv"}),
        ("data/train.csv/x", {"data/train.csv"}),
        ("**/*.csv", {"model", "parts/p.bin", "src", "data/train.csv", "data/test.csv", "README.md"}),
        ("src/**/b.py", {"src"}),
        ("nope/*", set()),
    ],
)
async def test_only_layers_whose_entry_can_hold_a_match_may_hold_one(
    pack_kit, store, pattern: str, wanted: set[str]
):
    await pack_kit()
    kit = await read_modelkit(Place(store, KIT), V1)
    choice = PathChoice([pattern])

    pairs = [pair for pair in select_layers(kit.manifest, kit.kitfile) if choice.may_hold(pair)]

    assert {pair.entry.path.removeprefix("./") for pair in pairs} == wanted


# ---- runs


def file_at(offset: int, size: int, *, layer: bytes = b"layer", name: str = "") -> KitFile:
    return KitFile(
        name or f"f{offset}", size, 0o644, Digest.of(b""), Digest.of(layer), offset, Section.MODEL, "m"
    )


def sizes_of(runs: list[FileRun]) -> list[list[int]]:
    return [[file.offset or 0 for file in run.files] for run in runs]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        pytest.param([(512, 10), (1536, 10)], [[512, 1536]], id="neighbours in a tar"),
        pytest.param([(512, 10), (40_000, 10)], [[512], [40_000]], id="dearer than a request"),
        pytest.param([(512, 5 * MIB), (6 * MIB, 10)], [[512], [6 * MIB]], id="further than 64 KiB"),
        pytest.param([(0, 5 * MIB), (5 * MIB + 60_000, 10)], [[0, 5 * MIB + 60_000]], id="little beside it"),
        pytest.param([(0, 5 * MIB), (5 * MIB, 5 * MIB)], [[0], [5 * MIB]], id="a run has a largest size"),
        pytest.param([(0, 100), (50, 100)], [[0], [50]], id="overlapping ones are apart"),
        pytest.param([(1024, 1), (0, 1)], [[0, 1024]], id="in order"),
        pytest.param([(512, 0)], [[512]], id="empty"),
        pytest.param([], [], id="none"),
    ],
)
def test_neighbours_come_together_where_that_is_cheaper(files, wanted):
    assert sizes_of(runs_of(file_at(*file) for file in files)) == wanted


def test_files_of_two_layers_never_come_together():
    runs = runs_of([file_at(0, 1, layer=b"one"), file_at(1, 1, layer=b"other")])

    assert len(runs) == 2


@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 5_000)), max_size=60),
    st.integers(1, 50),
)
def test_runs_hold_each_file_once_and_little_else(pieces: list[tuple[int, int]], scale: int):
    files, position = [], 0
    for gap, size in pieces:
        files.append(file_at(position + gap, size * scale))
        position = files[-1].offset + size * scale

    runs = runs_of(files)

    assert sorted((file for run in runs for file in run.files), key=lambda file: file.offset) == files
    wanted = sum(file.size for file in files)
    fetched = sum(run.span.size for run in runs)
    cheap = 1024 * sum(len(run.files) - 1 for run in runs)
    assert fetched <= wanted * 1.01 + 64 * 1024 + cheap


class _Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.is_closed = False
        self._path = ""

    def folder(self, path, mode):
        self.files[f"{path}/"] = b""

    def begin(self, path, mode, offset):
        self._path = path
        self.files[path] = b""

    def write(self, piece):
        self.files[self._path] += bytes(piece)

    def end(self):
        self._path = ""

    def close(self):
        self.is_closed = True


class _Body:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.size = sum(map(len, pieces))

    async def __aiter__(self):
        for piece in self._pieces:
            yield piece


async def read_pieces(run: FileRun, pieces: list[bytes]) -> _Kept:
    @asynccontextmanager
    async def open_span():
        yield _Body(pieces)

    sink = _Kept()
    with ThreadPoolExecutor(2) as threads:
        try:
            await read_run(run, open_span, sink, threads=threads, progress=Silence())
        finally:
            assert sink.is_closed
    return sink


@given(
    members=st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=20)), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 200)),
)
@settings(deadline=None)
def test_any_cutting_of_a_run_gives_the_same_files(members: list[tuple[int, bytes]], cuts: list[int]):
    stream, files = b"", []
    for number, (gap, content) in enumerate(members):
        stream += bytes(gap)
        files.append(
            replace(file_at(len(stream), len(content), name=f"f{number}"), digest=Digest.of(content))
        )
        stream += content
    run = FileRun(tuple(files))
    span = stream[run.span.start : run.span.stop]
    edges = sorted({0, len(span), *(cut for cut in cuts if cut < len(span))})
    pieces = [span[start:stop] for start, stop in itertools.pairwise(edges)]

    sink = asyncio.run(read_pieces(run, pieces))

    assert sink.files == {f"f{number}": content for number, (_, content) in enumerate(members)}


@pytest.mark.parametrize(
    ("pieces", "error"),
    [([b"abX"], DigestInvalid), ([b"ab"], SizeInvalid), ([b"abcd"], SizeInvalid), ([], SizeInvalid)],
)
async def test_a_run_of_other_bytes_is_refused(pieces: list[bytes], error: type[Exception]):
    run = FileRun((replace(file_at(7, 3), digest=Digest.of(b"abc")),))

    with pytest.raises(error):
        await read_pieces(run, pieces)


async def test_an_empty_file_is_verified_too():
    run = FileRun((replace(file_at(7, 0), digest=Digest.of(b"abc")),))

    with pytest.raises(DigestInvalid):
        await read_pieces(run, [])


# ---- the same from everywhere


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("source", SOURCES)
async def test_a_kit_has_the_same_files_wherever_it_is(pack_kit, anywhere, store, source: str, style: str):
    digest = await pack_kit(style=STYLES[style])

    async with anywhere(source) as (place, options):
        listed = await list_files(place, V1, **options)

    assert listed == await list_files(Place(store, KIT), V1)
    assert listed.digest == digest
    assert {file.path: file.digest for file in listed.files if not file.is_folder} == {
        path: Digest.of(content) for path, content in FILES.items()
    }
    assert {file.path for file in listed.files if file.is_folder} == FOLDERS
    assert [file.path for file in listed.files] == sorted(
        (file.path for file in listed.files), key=lambda path: path.encode()
    )
    by_path = {file.path: file for file in listed.files}
    assert by_path["src/a.py"].mode & 0o777 == 0o755
    assert (by_path["parts/p.bin"].section, by_path["parts/p.bin"].entry) == (Section.MODEL_PART, "p")
    for file in listed.files:
        blob = (store.layout.blob_path(file.layer)).read_bytes()
        if file.offset is not None:
            assert blob[file.offset :][: file.size] == FILES[file.path]
        else:
            assert file.is_folder or "+" in style


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("source", SOURCES)
async def test_the_same_files_are_unpacked_wherever_the_kit_is(
    pack_kit, anywhere, target: Path, source: str, style: str
):
    await pack_kit(style=STYLES[style])

    async with anywhere(source) as (place, options):
        await unpack(place, V1, target, paths=["model/**/*.json", "**/*.csv", "src/a.py"], **options)

    assert contents(target) == {
        path: content
        for path, content in FILES.items()
        if path.endswith((".json", ".csv")) or path == "src/a.py"
    }
    assert os.access(target / "src/a.py", os.X_OK)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("source", SOURCES)
async def test_a_file_reads_the_same_wherever_the_kit_is(pack_kit, anywhere, source: str, style: str):
    await pack_kit(style=STYLES[style])

    async with anywhere(source) as (place, options):
        read_files = {path: await read(place, path, **options) for path in FILES}

    assert read_files == FILES


@pytest.mark.parametrize("source", SOURCES)
async def test_raw_layers_need_no_list_and_no_reading(pack_kit, anywhere, server, target: Path, source: str):
    files = {"w.bin": b"weights", "docs/README.md": b"# read"}
    await pack_kit(
        files, "{model: {path: w.bin}, docs: [{path: docs/README.md}]}", style=PackStyle("current", "raw")
    )

    async with anywhere(source) as (place, options):
        listed = await list_files(place, V1, **options)
        content = await read(place, "w.bin", **options)
        await unpack(place, V1, target, paths=["**/*.md"], **options)

    assert {file.path: file.digest for file in listed.files} == {
        path: Digest.of(content) for path, content in files.items()
    }
    assert content == b"weights"
    assert contents(target) == {"docs/README.md": b"# read"}
    assert not any("_modelkit" in asked or "discover" in asked for asked in server[1].asked)


# ---- what crosses the network


async def test_only_the_wanted_ranges_are_fetched_where_the_registry_has_the_extension(
    pack_kit, ours: Place, server, target: Path
):
    await pack_kit()

    await unpack(ours, V1, target, paths=["model/a.safetensors", "model/config.json"])

    wanted = len(FILES["model/a.safetensors"]) + len(FILES["model/config.json"])
    assert server[0].content_sent <= wanted * 1.01 + 4 * 1024  # the config of the kit is 1 KiB of it
    assert len(server[0].sent) == 2


async def test_neighbours_of_a_layer_cost_one_request(pack_kit, ours: Place, server, target: Path):
    files = {f"data/{number:04}.json": b"%d" % number * 100 for number in range(300)}
    files["data/z.bin"] = bytes(500_000)
    await pack_kit(files, "datasets: [{path: data}]")

    await unpack(ours, V1, target, paths=["data/*.json"])

    assert len(contents(target)) == 300
    assert len([path for path, _ in server[0].sent]) == 2  # the config and the run


async def test_a_layer_that_is_wanted_nearly_whole_is_fetched_whole_and_so_verified(
    pack_kit, ours: Place, server, target: Path
):
    digest = await pack_kit()
    server[0].change_entry = lambda entry: (
        entry | ({"digest": Digest.of(b"another")} if entry["path"] == "data/train.csv" else {})
    )

    await unpack(ours, digest, target, paths=["data/train.csv"])

    assert contents(target) == {"data/train.csv": FILES["data/train.csv"]}
    assert await read(ours, "data/train.csv") == FILES["data/train.csv"]


async def test_a_file_of_a_compressed_layer_is_cut_out_by_the_registry(
    pack_kit, ours: Place, server, target: Path
):
    await pack_kit(style=STYLES["tar+gzip"])

    await unpack(ours, V1, target, paths=["model/z.safetensors", "model/sub/*"])

    assert set(contents(target)) == {"model/z.safetensors", "model/sub/[x] 100%?#ä.json"}
    assert {path.partition("/model/")[2] for path, _ in server[0].sent[1:]} == {
        "z.safetensors",
        "sub/[x] 100%?#ä.json",
    }


async def test_from_any_registry_only_layers_that_may_hold_a_match_are_fetched(
    pack_kit, anywhere, server, target: Path
):
    await pack_kit()
    notices: list[str] = []

    async with anywhere("any registry") as (place, _):
        await unpack(place, V1, target, paths=["data/*.csv"], notice=notices.append)

    assert set(contents(target)) == {"data/train.csv", "data/test.csv"}
    assert server[0].content_sent < 60_000
    (said,) = [notice for notice in notices if "whole layers" in notice]
    assert said.startswith("to find what is wanted, 2 whole layers are fetched from 127.0.0.1:")
    assert said.endswith(": 45056 bytes")


@pytest.mark.parametrize(
    "discovery",
    [
        (404, ""),
        (401, ""),
        (403, ""),
        (500, ""),
        (302, ""),
        (200, "<html>welcome</html>"),
        (200, "{}"),
        (200, "[1]"),
        (200, '{"extensions": null}'),
        (200, '{"extensions": [7, {"name": "_oci", "endpoints": ["x"]}]}'),
        (200, '{"extensions": [{"name": "_modelkit", "endpoints": 7}]}'),
        (200, '{"extensions": [{"name": "_modelkit", "endpoints": ["_modelkit/x"]}]}'),
        (200, "x" * 2_000_000),
    ],
    ids=lambda discovery: f"{discovery[0]} {discovery[1][:80]}",
)
async def test_a_registry_that_does_not_say_so_has_no_extension(
    pack_kit, ours: Place, server, target: Path, discovery: tuple[int, str]
):
    await pack_kit()
    server[0].discovery = discovery

    await unpack(ours, V1, target, paths=["README.md"])

    assert contents(target) == {"README.md": FILES["README.md"]}
    assert not any("_modelkit" in asked for asked in server[1].asked)


async def test_a_busy_registry_is_asked_again_before_whole_layers_are_fetched(
    pack_kit, ours: Place, server, target: Path
):
    await pack_kit()
    busy = [503, 429]

    async def answer(request):
        if request.path == "/v2/_oci/ext/discover" and busy:
            return web.Response(status=busy.pop())
        return await server[0].answer(request)

    server[1].answer = answer

    await unpack(ours, V1, target, paths=["model/config.json"])

    assert not busy
    assert server[0].content_sent < 5000


async def test_a_long_list_comes_in_pages(pack_kit, ours: Place, server):
    await pack_kit()
    server[0].page_size = 3

    listed = await list_files(ours, V1)

    assert {file.path for file in listed.files} == {*FILES, *FOLDERS}
    assert len([asked for asked in server[1].asked if "_modelkit/files" in asked]) == 7


async def test_a_list_without_end_is_refused(pack_kit, ours: Place, server):
    await pack_kit()
    server[0].page_size = 0

    with pytest.raises(ServerMisbehaved, match="without end"):
        await list_files(ours, V1)


# ---- choosing


async def test_filters_and_paths_choose_together(pack_kit, ours: Place, target: Path):
    await pack_kit()

    await unpack(
        ours,
        V1,
        target,
        filters=[parse_filter("datasets:train"), parse_filter("code")],
        paths=["**/*.csv", "*/a.py"],
    )

    assert set(contents(target)) == {"data/train.csv", "src/a.py"}


@pytest.mark.parametrize("source", SOURCES)
async def test_folders_that_match_are_made(pack_kit, anywhere, target: Path, source: str):
    await pack_kit()

    async with anywhere(source) as (place, options):
        await unpack(place, V1, target, paths=["model/none", "model/sub"], **options)

    assert {str(path.relative_to(target)) for path in target.rglob("*")} == {
        "model",
        "model/none",
        "model/sub",
    }


async def test_the_kitfile_comes_when_a_pattern_matches_it(pack_kit, ours: Place, target: Path):
    await pack_kit()

    await unpack(ours, V1, target, paths=["*"])
    await unpack(ours, V1, target / "b", paths=["Kitfile"])
    await unpack(ours, V1, target / "c", paths=["*"], filters=[parse_filter("docs")])

    assert {path.name for path in target.iterdir()} == {
        *("Kitfile", "README.md", "data", "model", "parts", "src"),
        *("b", "c"),
    }
    assert set(contents(target / "b")) == {"Kitfile"}
    assert set(contents(target / "c")) == {"README.md"}


@pytest.mark.parametrize("source", SOURCES)
async def test_what_matches_nothing_is_an_error_and_leaves_nothing(pack_kit, anywhere, target, source: str):
    await pack_kit()

    async with anywhere(source) as (place, options):
        with pytest.raises(PathMissing, match=r"matches nope or model/\*\.gguf"):
            await unpack(place, V1, target, paths=["nope", "model/*.gguf"], **options)

    assert not target.exists()


async def test_a_pattern_that_matches_nothing_beside_others_is_a_warning(pack_kit, ours: Place, target: Path):
    await pack_kit()
    warnings: list[str] = []

    await unpack(ours, V1, target, paths=["nope", "README.md"], warn=warnings.append)

    assert warnings == ["nothing of what is chosen matches nope"]
    assert set(contents(target)) == {"README.md"}


@pytest.mark.parametrize("pattern", ["", "/", "..", "a/../b", "x" * 2000])
async def test_what_is_no_pattern_is_refused_before_anything_is_asked(ours: Place, server, target, pattern):
    with pytest.raises(FilterInvalid):
        await unpack(ours, V1, target, paths=[pattern])
    with pytest.raises(FilterInvalid):
        await list_files(ours, V1, paths=[pattern])

    assert server[1].asked == []


@pytest.mark.parametrize("source", SOURCES)
async def test_files_are_listed_as_chosen(pack_kit, anywhere, source: str):
    await pack_kit()

    async with anywhere(source) as (place, options):
        listed = await list_files(
            place,
            V1,
            filters=[parse_filter("model,docs")],
            paths=["*/*.json", "*.md"],
            **options,
        )

    assert [file.path for file in listed.files] == ["README.md", "model/config.json", "model/tokenizer.json"]


def finder(store: LayoutRegistry):
    @asynccontextmanager
    async def find(reference):
        yield Place(store, reference.repository), reference.tag

    return find


async def test_the_model_of_another_kit_belongs_to_the_files(pack_kit, store, target: Path):
    await pack_kit(name=RepositoryName("base"))
    await pack_kit({"NEWS": b"new"}, "{model: {path: 'base:v1'}, docs: [{path: NEWS}]}")
    place = Place(store, KIT)

    listed = await list_files(place, V1, find=finder(store), paths=["NEWS", "*/*.json", "README.md"])
    content = await read(place, "model/config.json", find=finder(store))
    await unpack(place, V1, target, find=finder(store), paths=["NEWS", "*/config.json"])

    assert [file.path for file in listed.files] == ["NEWS", "model/config.json", "model/tokenizer.json"]
    assert content == FILES["model/config.json"]
    assert set(contents(target)) == {"NEWS", "model/config.json"}


# ---- all or nothing


async def test_INV_C1_wrong_bytes_of_a_file_leave_nothing_of_any(pack_kit, ours: Place, server, target: Path):
    await pack_kit()
    server[0].change_content = lambda content: content.replace(b"tokens", b"TOKENS", 1)

    with pytest.raises(DigestInvalid, match=r"model/tokenizer.json"):
        await unpack(ours, V1, target, paths=["model/*.json", "README.md"])

    assert not target.exists()


async def test_a_range_that_breaks_is_gone_on_with(pack_kit, ours: Place, server, target: Path):
    await pack_kit()
    server[0].break_after = 100_000

    await unpack(ours, V1, target, paths=["model/*.safetensors"])

    assert contents(target) == {path: FILES[path] for path in FILES if path.endswith(".safetensors")}
    assert server[0].content_sent < 520_000


async def test_a_file_of_a_compressed_layer_that_breaks_is_gone_on_with(pack_kit, ours, server, target: Path):
    await pack_kit(style=STYLES["tar+gzip"])
    server[0].break_after = 100_000

    await unpack(ours, V1, target, paths=["model/z.safetensors"])

    assert contents(target) == {"model/z.safetensors": FILES["model/z.safetensors"]}


async def test_a_registry_that_always_breaks_leaves_nothing(pack_kit, ours: Place, server, target: Path):
    await pack_kit()
    inner = server[0].answer

    async def answer(request):
        # The config, which is small, comes; of other blobs nothing does.
        server[0].break_after = 0 if "Range" in request.headers else None
        return await inner(request)

    server[1].answer = answer

    with pytest.raises(RegistryUnreachable):
        await unpack(ours, V1, target, paths=["model/*.safetensors"])

    assert not target.exists()


async def test_INV_C2_after_a_kill_what_was_verified_is_not_fetched_again(
    pack_kit, ours: Place, server, target: Path, tmp_path: Path
):
    await pack_kit()
    (last,) = (await list_files(ours, V1, paths=["model/z.safetensors"])).files
    inner, end = server[0].answer, asyncio.Event()

    async def answer(request):
        if not end.is_set() and request.headers.get("Range", "").startswith(f"bytes={last.offset}-"):
            await end.wait()
            return web.Response(status=503)
        return await inner(request)

    server[1].answer = answer
    paths = ["model/*.safetensors", "README.md"]
    command = ["unpack", f"{server[1].host}/{KIT}:{V1}", "-d", str(target), "--plain-http"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kitclient.cli", *command),
        *(argument for path in paths for argument in ("--path", path)),
        env=os.environ | {"KITCLIENT_HOME": str(tmp_path / "home")},
        stdout=asyncio.subprocess.DEVNULL,
    )
    # The first model file and the document are there; the last model file is waited for.
    while len(list(target.parent.glob(".target.kitclient-0/*.members"))) < 2:
        assert process.returncode is None
        await asyncio.sleep(0.01)
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    assert contents(target) == {}
    end.set()
    server[0].sent.clear()

    await unpack(ours, V1, target, paths=paths)

    assert contents(target) == {path: FILES[path] for path in FILES if path.endswith((".safetensors", ".md"))}
    assert server[0].content_sent < last.size + 2000


async def test_INV_C1_an_unpack_of_files_that_is_cancelled_leaves_nothing(
    pack_kit, ours: Place, server, target: Path
):
    await pack_kit()
    waiting, end = asyncio.Event(), asyncio.Event()
    inner = server[0].answer

    async def answer(request):
        if "Range" in request.headers:
            waiting.set()
            await end.wait()
            return web.Response(status=503)
        return await inner(request)

    server[1].answer = answer
    task = asyncio.create_task(unpack(ours, V1, target, paths=["model/*.safetensors", "README.md"]))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    end.set()

    assert not target.exists()


async def test_T_15_a_file_that_exists_is_refused_without_being_fetched(pack_kit, ours, server, target: Path):
    await pack_kit()
    write(target, {"model/z.safetensors": b"mine"})

    with pytest.raises(PathRefused, match="already exists"):
        await unpack(ours, V1, target, paths=["model/z.safetensors"])

    assert server[0].content_sent < 2000
    assert contents(target) == {"model/z.safetensors": b"mine"}


async def test_T_15_an_entry_that_is_a_file_and_exists_is_refused_without_reading_its_layer(
    pack_kit, anywhere, server, target: Path
):
    await pack_kit()
    write(target, {"data/train.csv": b"mine"})

    async with anywhere("any registry") as (place, _):
        with pytest.raises(PathRefused, match="already exists"):
            await unpack(place, V1, target, paths=["data/train.csv"])

    assert server[0].content_sent < 2000


async def test_T_15_existing_files_are_left_or_replaced_as_asked(pack_kit, ours: Place, target: Path):
    await pack_kit()
    write(target, {"model/config.json": b"mine"})

    unpacked = await unpack(ours, V1, target, paths=["model/*.json"], existing=Existing.SKIP)
    assert unpacked.kept == ("model/config.json",)
    assert contents(target)["model/config.json"] == b"mine"

    await unpack(ours, V1, target, paths=["model/*.json"], existing=Existing.REPLACE)
    assert contents(target)["model/config.json"] == FILES["model/config.json"]


@pytest.mark.parametrize("source", ["stand-in", "any registry"])
async def test_two_layers_that_hold_one_file_are_refused(
    pack_kit, anywhere, store, target: Path, source: str
):
    await pack_two_layers_with(store, {"same": b"1" * 9000}, {"same": b"2" * 9000})

    async with anywhere(source) as (place, _):
        with pytest.raises(PathRefused, match="two layers hold the file 'same'"):
            await unpack(place, V1, target, paths=["same"], existing=Existing.REPLACE)

    assert not target.exists()


@pytest.mark.parametrize("source", SOURCES)
async def test_L_22_only_what_is_written_counts_against_the_limit(pack_kit, anywhere, target, source: str):
    await pack_kit()

    async with anywhere(source) as (place, options):
        await unpack(place, V1, target, paths=["model/*.json"], **options, max_unpacked=7000)
        with pytest.raises(LayerBroken, match="more than 100000 bytes"):
            await unpack(
                place,
                V1,
                target / "b",
                paths=["model/*.safetensors"],
                **options,
                max_unpacked=100_000,
            )

    assert set(contents(target)) == {"model/config.json", "model/tokenizer.json"}


# ---- a registry that lies


LIES: dict[str, Callable[[dict], object]] = {
    "another digest": lambda entry: entry | {"digest": Digest.of(b"another")},
    "no digest": lambda entry: {key: entry[key] for key in entry if key != "digest"},
    "not a digest": lambda entry: entry | {"digest": "md5:abc"},
    "too small": lambda entry: entry | {"size": entry["size"] - 1},
    "too large": lambda entry: entry | {"size": entry["size"] + 1},
    "far too large": lambda entry: entry | {"size": 2**62},
    "negative": lambda entry: entry | {"size": -1},
    "not a size": lambda entry: entry | {"size": True},
    "elsewhere": lambda entry: entry | {"offset": entry["offset"] + 1},
    "beyond the layer": lambda entry: entry | {"offset": 10**9},
    "before the layer": lambda entry: entry | {"offset": -1},
    "not a mode": lambda entry: entry | {"mode": "rwx"},
    "a mode as a number": lambda entry: entry | {"mode": 420},
    "another layer": lambda entry: entry | {"layer": Digest.of(b"another")},
    "no layer": lambda entry: entry | {"layer": None},
    "a path outside": lambda entry: entry | {"path": "../model/a.safetensors"},
    "an absolute path": lambda entry: entry | {"path": "/model/a.safetensors"},
    "a path that is not clean": lambda entry: entry | {"path": "model//a.safetensors"},
    "a path with controls": lambda entry: entry | {"path": "model/a.safetensors\x1b"},
    "no path": lambda entry: entry | {"path": ""},
    "a link": lambda entry: entry | {"type": "symlink"},
    "no type": lambda entry: {key: entry[key] for key in entry if key != "type"},
    "not an entry": lambda entry: "model/a.safetensors",
    "nothing": lambda entry: None,
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_list_that_lies_leaves_nothing(pack_kit, ours: Place, server, target: Path, lie: str):
    await pack_kit()
    server[0].change_entry = lambda entry: (
        LIES[lie](entry) if entry["path"] == "model/a.safetensors" else entry
    )

    with pytest.raises((ServerMisbehaved, DigestInvalid, SizeInvalid)):
        await unpack(ours, V1, target, paths=["model/*.safetensors"])

    assert not target.exists()


PAGES: dict[str, Callable[[dict], object]] = {
    "another kit": lambda page: page | {"digest": Digest.of(b"another")},
    "no kit": lambda page: {"files": page["files"]},
    "no files": lambda page: {"digest": page["digest"]},
    "files that are no list": lambda page: page | {"files": {}},
    "a list": lambda page: [page],
    "null": lambda page: None,
}


@pytest.mark.parametrize("lie", PAGES)
async def test_what_is_no_list_of_this_kit_is_refused(pack_kit, ours: Place, server, lie: str):
    await pack_kit()
    server[0].change_page = PAGES[lie]

    with pytest.raises(ServerMisbehaved):
        await list_files(ours, V1)


async def test_what_was_not_asked_for_is_not_taken(pack_kit, ours: Place, server, target: Path):
    await pack_kit()
    server[0].change_entry = lambda entry: entry | {"path": "src/planted.py"}

    with pytest.raises(PathMissing):
        await unpack(ours, V1, target, paths=["model/*.safetensors"])

    assert not target.exists()


async def test_a_file_said_to_be_in_a_layer_that_was_filtered_out_is_refused(pack_kit, ours, server, store):
    await pack_kit()
    docs = await list_files(Place(store, KIT), V1, paths=["README.md"])
    server[0].change_entry = lambda entry: entry | {"layer": docs.files[0].layer}

    with pytest.raises(ServerMisbehaved, match="no layer that was asked for"):
        await list_files(ours, V1, filters=[parse_filter("model")])


async def test_a_raw_layer_is_what_the_manifest_says_and_not_what_the_list_says(ours: Place, server):
    # A second layer, so that there is a list at all.
    await pack_two_layers_with(server[0].store, {"a": b"1"}, None, raw=("raw.bin", b"raw"))
    server[0].change_entry = lambda entry: (
        entry | {"digest": Digest.of(b"another")} if entry["path"] == "raw.bin" else entry
    )

    with pytest.raises(ServerMisbehaved, match="another digest"):
        await list_files(ours, V1)


@pytest.mark.parametrize("source", SOURCES)
async def test_one_layer_of_a_kit_of_before_0_5_may_be_the_files_of_two_folders(
    store, anywhere, target: Path, source: str
):
    layer = ("application/vnd.kitops.modelkit.dataset.v1.tar", layer_tar([("x", b"1"), ("y", bytes(9000))]))
    await push(Place(store, KIT), {"datasets": [{"path": "a/x"}, {"path": "b/x"}]}, [layer, layer])

    async with anywhere(source) as (place, options):
        listed = await list_files(place, V1, paths=["*/x"], **options)
        assert [(file.path, file.entry) for file in listed.files] == [("a/x", "a/x"), ("b/x", "b/x")]
        assert [await read(place, path, **options) for path in ("a/x", "b/x")] == [b"1", b"1"]
        await unpack(place, V1, target, paths=["b/x"], **options)

    assert contents(target) == {"b/x": b"1"}


async def test_whole_layers_find_what_a_list_cannot(pack_kit, ours: Place, server, target: Path):
    """The promise of --verify-layers: bytes and list that agree with each other, and not with the manifest."""
    await pack_kit()
    planted = FILES["model/config.json"].replace(b"1", b"2")
    server[0].change_content = lambda content: content.replace(FILES["model/config.json"], planted)
    server[0].change_entry = lambda entry: (
        entry | {"digest": Digest.of(planted)} if entry["path"] == "model/config.json" else entry
    )

    assert await read(ours, "model/config.json") == planted
    with pytest.raises(DigestInvalid):
        await read(ours, "model/config.json", verify_layers=True)
    with pytest.raises(DigestInvalid):
        await list_files(ours, V1, paths=["model/*"], verify_layers=True)
    with pytest.raises(DigestInvalid):
        await unpack(ours, V1, target, paths=["model/config.json"], verify_layers=True)

    assert not target.exists()


# ---- cat


async def pack_two_layers_with(
    store: LayoutRegistry,
    model: dict[str, bytes],
    code: dict[str, bytes] | None,
    *,
    raw: tuple[str, bytes] | None = None,
) -> None:
    """A kit as nobody packs it: a model, and code or a raw document."""
    prefix = "application/vnd.kitops.modelkit"
    layers = [(f"{prefix}.model.v1.tar", layer_tar(model.items()))]
    kitfile: dict = {"model": {"path": "."}}
    if code is not None:
        layers.append((f"{prefix}.code.v1.tar", layer_tar(code.items())))
        kitfile["code"] = [{"path": "."}]
    if raw is not None:
        layers.append((f"{prefix}.docs.v1.raw", raw[1]))
        kitfile["docs"] = [{"path": raw[0]}]
    await push(Place(store, KIT), kitfile, layers)


MISSING: dict[str, tuple[type[PathMissing], str]] = {
    "nope": (PathMissing, "`kitclient files` lists what it has"),
    "model/nope": (PathMissing, "no file 'model/nope'"),
    "README.md/x": (PathMissing, "no file"),
    "model": (PathIsFolder, "'model' is a folder"),
    "model/none": (PathIsFolder, "is a folder"),
    "data": (PathIsFolder, "is a folder"),
}


@pytest.mark.parametrize("path", MISSING)
@pytest.mark.parametrize("style", ["tar", "tar+gzip"])
@pytest.mark.parametrize("source", SOURCES)
async def test_what_is_no_file_of_the_kit_is_said_to_be_none(
    pack_kit, anywhere, source: str, style: str, path: str
):
    await pack_kit(style=STYLES[style])
    error, words = MISSING[path]

    async with anywhere(source) as (place, options):
        with pytest.raises(error, match=words) as raised:
            await read(place, path, **options)

    assert raised.type is error


@pytest.mark.parametrize("source", SOURCES)
async def test_a_file_that_two_layers_have_otherwise_is_ambiguous(anywhere, store, source: str):
    await pack_two_layers_with(store, {"same": b"1", "equal": b"3"}, {"same": b"2", "equal": b"3"})

    async with anywhere(source) as (place, options):
        with pytest.raises(PathAmbiguous, match=r"code . and model \."):
            await read(place, "same", **options)
        assert await read(place, "equal", **options) == b"3"


@pytest.mark.parametrize("source", READING)
async def test_a_file_that_one_layer_has_twice_is_refused(anywhere, store, source: str):
    blob = layer_tar([("a", b"1"), ("a", b"2")])
    layer = ("application/vnd.kitops.modelkit.model.v1.tar", blob)
    await push(Place(store, KIT), {"model": {"path": "a"}}, [layer])

    async with anywhere(source) as (place, options):
        with pytest.raises(LayerBroken, match="twice"):
            await read(place, "a", **options)
        with pytest.raises(LayerBroken, match="twice"):
            await list_files(place, V1, **options)


@pytest.mark.parametrize("source", ["stand-in", "any registry"])
async def test_nothing_of_a_small_file_is_passed_on_when_it_is_wrong(pack_kit, anywhere, server, source: str):
    await pack_kit()
    server[0].change_content = lambda content: content.replace(b"tokens", b"TOKENS", 1)
    written: list[bytes] = []

    async with anywhere(source) as (place, _):
        with pytest.raises(DigestInvalid):
            await cat(place, V1, "model/tokenizer.json", written.append)

    assert written == []


@pytest.mark.parametrize("source", SOURCES)
async def test_a_large_file_comes_whole(pack_kit, anywhere, source: str):
    content = os.urandom(HELD_SIZE_MAX + 1000)
    await pack_kit({"w.bin": content}, "model: {path: w.bin}")

    async with anywhere(source) as (place, options):
        assert await read(place, "w.bin", **options) == content


@pytest.mark.parametrize("source", ["stand-in", "whole layers", "any registry"])
async def test_a_large_file_that_is_wrong_is_said_to_be_spoiled(pack_kit, anywhere, server, source: str):
    content = os.urandom(HELD_SIZE_MAX + 1000)
    await pack_kit({"w.bin": content}, "model: {path: w.bin}")
    server[0].change_content = lambda blob: blob.replace(content[-20:], bytes(20))
    written: list[bytes] = []

    async with anywhere(source) as (place, options):
        with pytest.raises(OutputSpoiled, match=rf"{len(content)} bytes of 'w.bin' had been passed on"):
            await cat(place, V1, "w.bin", lambda piece: written.append(bytes(piece)), **options)

    assert b"".join(written)[:-20] == content[:-20]


async def test_a_reader_that_has_had_enough_ends_it(pack_kit, ours: Place):
    await pack_kit({"w.bin": bytes(HELD_SIZE_MAX + 1000)}, "model: {path: w.bin}")

    def write(piece) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await cat(ours, V1, "w.bin", write)


async def test_cat_fetches_the_file_and_little_else(pack_kit, ours: Place, server):
    await pack_kit()

    assert await read(ours, "model/z.safetensors") == FILES["model/z.safetensors"]

    assert server[0].content_sent < 202_000


async def test_cat_from_any_registry_reads_the_one_layer_that_may_hold_the_file_once(
    pack_kit, anywhere, server
):
    await pack_kit()
    notices: list[str] = []

    async with anywhere("any registry") as (place, _):
        assert await read(place, "data/train.csv", notice=notices.append) == FILES["data/train.csv"]

    assert server[0].content_sent < 45_000
    assert [notice.partition(" from ")[0] for notice in notices] == [
        "to find what is wanted, a whole layer is fetched"
    ]


async def test_a_file_of_another_size_than_listed_is_refused(pack_kit, ours: Place, server):
    await pack_kit(style=STYLES["tar+gzip"])
    server[0].change_entry = lambda entry: entry | {"size": entry.get("size", 0) + 1}

    with pytest.raises(SizeInvalid, match="the list says"):
        await read(ours, "model/config.json")


async def test_a_file_that_is_listed_and_not_there_is_an_error(pack_kit, ours: Place, server):
    await pack_kit(style=STYLES["tar+gzip"])
    inner = server[0].answer

    async def answer(request):
        if request.path.endswith("/model/config.json"):
            return web.Response(status=404)
        return await inner(request)

    server[1].answer = answer

    with pytest.raises(OciError):
        await read(ours, "model/config.json")


async def test_the_hostile_registry_cannot_make_us_list_without_end(pack_kit, ours: Place, monkeypatch):
    await pack_kit()
    monkeypatch.setattr("kitclient.remote_files.MEMBER_COUNT_MAX", 5)

    with pytest.raises((ServerMisbehaved, ClientError), match="lists more than 5 files"):
        await list_files(ours, V1)

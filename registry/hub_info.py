"""What the Hub's API says of a kit and of its files: JSON documents, and the model card that they draw on.

Source: what huggingface_hub 0.23 to 2.4 read (`ModelInfo`, `DatasetInfo`, `RepoFile`, `RepoFolder`); the Hub's model card metadata.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any, Final

from kitspec.errors import ContentInvalid
from kitspec.strict_yaml import Items, Members, Node, Scalar, parse_yaml
from kitspec.views import Kit
from registry.hub import COMMIT_LENGTH, ListedKit, Snapshot, commit_of
from registry.hub_paths import HubPath
from registry.hub_tree import HubFile, HubFolder
from registry.tensors import TensorsInvalid, format_of, read_tensors

ReadFile = Callable[[HubFile, int, int], Awaitable[bytes]]
"""(file, start, stop) -> those bytes of it."""

CARD_PATH: Final = "README.md"
# The metadata of a card with hundreds of benchmark results has some 100 KiB; with more it takes long to parse.
CARD_SIZE_MAX: Final = 256 * 1024
# Clients that need more files ask for the tree instead (huggingface_hub 0.36 from 50,000 on, 1.x from 1,000, 2.x always).
SIBLINGS_MAX: Final = 50_000
_TAGS_MAX: Final = 256
_TAG_LENGTH_MAX: Final = 128
# Headers of tensors that one answer reads: a model of a thousand shards has some 30 MiB.
_TENSOR_HEADERS_SIZE_MAX: Final = 64 * 1024 * 1024

# What a library keeps at the root of its models, the more particular first; the Hub goes by the same files.
_LIBRARIES: Final = (
    ("modules.json", "sentence-transformers"),
    ("adapter_config.json", "peft"),
    ("model_index.json", "diffusers"),
    ("config.json", "transformers"),
)
# Fields for which files have to be gone through, and those that come from the card.
_OF_FILES: Final = frozenset(("siblings", "tags", "library_name", "safetensors"))
_OF_CARD: Final = frozenset(("cardData", "tags", "library_name", "pipeline_tag"))
_FORMATS: Final = ("gguf", "onnx", "safetensors")


# ---- files


def file_document(file: HubFile) -> dict[str, Any]:
    """A file in a tree.

    Every file is said to be one of LFS: those have a SHA-256, which is what is known here; of the others clients expect the
    SHA-1 of git, and compare it (`hf cache verify`).
    """
    return {
        "type": "file",
        "oid": commit_of(file.digest),
        "size": file.size,
        "path": file.path,
        "lfs": _lfs(file, "oid"),
    }


def folder_document(folder: HubFolder, commit: str) -> dict[str, Any]:
    identity = hashlib.sha256(f"{commit} {folder.path}".encode()).hexdigest()
    return {"type": "directory", "oid": identity[:COMMIT_LENGTH], "size": 0, "path": folder.path}


def last_commit_document(snapshot: Snapshot) -> dict[str, Any]:
    """For the entries of a tree that is asked for with `expand`."""
    return {
        "id": snapshot.commit,
        "title": f"ModelKit {snapshot.kit.digest}",
        "date": moment_text(snapshot.modified),
    }


def sibling_document(file: HubFile, *, with_blobs: bool) -> dict[str, Any]:
    document: dict[str, Any] = {"rfilename": file.path}
    if with_blobs:
        document |= {"size": file.size, "blobId": commit_of(file.digest), "lfs": _lfs(file, "sha256")}
    return document


def _lfs(file: HubFile, digest_key: str) -> dict[str, Any]:
    digest = file.digest.encoded
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {file.size}\n"
    return {digest_key: digest, "size": file.size, "pointerSize": len(pointer)}


# ---- kits


def moment_text(moment: datetime) -> str:
    """As every client parses it: UTC, with a fraction and a Z."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def listed_document(path: HubPath, listed: ListedKit, id_: str) -> dict[str, Any]:
    """A kit in a list: what its manifest and its Kitfile say."""
    commit = commit_of(listed.kit.digest)
    document = _identity(path, id_, commit, listed.modified)
    return document | {"tags": kit_tags(listed.kit)}


async def info_document(
    path: HubPath,
    snapshot: Snapshot,
    read: ReadFile,
    *,
    with_blobs: bool,
    expand: Sequence[str],
) -> dict[str, Any]:
    """What `model_info` and `dataset_info` get.

    Args:
        expand: the fields that are wanted, and no others; none for the usual ones. `safetensors` comes only if it is among
            them: the header of every file has to be read for it.

    Raises:
        ManifestInvalid: a layer cannot be looked into.
    """
    is_usual = not expand
    files = await _files(snapshot) if is_usual or _OF_FILES.intersection(expand) else []
    card = await _card(snapshot, read) if is_usual or _OF_CARD.intersection(expand) else {}
    document = _identity(path, path.id, snapshot.commit, snapshot.modified)
    document["usedStorage"] = sum(layer.size for layer in snapshot.kit.manifest.layers)
    document |= _description(path, snapshot.kit, card, {file.path for file in files})
    if len(files) <= SIBLINGS_MAX:  # half a list would be taken for a whole one
        document["siblings"] = [sibling_document(file, with_blobs=with_blobs) for file in files]
        if "safetensors" in expand:
            document |= await _safetensors(files, read)
    return document if is_usual else {key: document[key] for key in ("_id", "id", *expand) if key in document}


async def _files(snapshot: Snapshot) -> list[HubFile]:
    """All files, or one more than may be listed."""
    files: list[HubFile] = []
    async for file in snapshot.tree.files():
        files.append(file)
        if len(files) > SIBLINGS_MAX:
            break
    return files


def _identity(path: HubPath, id_: str, commit: str, modified: datetime) -> dict[str, Any]:
    author, slash, _ = id_.partition("/")
    moment = moment_text(modified)
    return {
        "_id": commit[:24],
        "id": id_,
        **({"modelId": id_} if path.kind == "model" else {}),
        **({"author": author} if slash else {}),
        "sha": commit,
        "lastModified": moment,
        "createdAt": moment,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
    }


def _description(path: HubPath, kit: Kit, card: dict[str, Any], paths: AbstractSet[str]) -> dict[str, Any]:
    """What the card says, and where it is silent the names of the files."""
    tags = [*_card_tags(card), *_format_tags(paths), *kit_tags(kit)]
    said: dict[str, Any] = {"cardData": card} if card else {}
    if path.kind == "dataset":
        text = kit.kitfile.package.description
        return said | {"tags": _tags(tags)} | ({"description": text} if text else {})
    library = _word(card, "library_name") or next((name for mark, name in _LIBRARIES if mark in paths), None)
    if library is not None:
        said["library_name"] = library
        tags.insert(0, library)
    task = _word(card, "pipeline_tag")
    if task is not None:
        said["pipeline_tag"] = task
    return said | {"tags": _tags(tags)}


# ---- tags


def kit_tags(kit: Kit) -> list[str]:
    """What the Kitfile says that the Hub says in tags."""
    kitfile = kit.kitfile
    model = kitfile.model
    license_ = (model.license if model is not None else "") or kitfile.package.license
    said = [model.framework, model.format] if model is not None else []
    return _tags([*(text.lower() for text in said), *([f"license:{license_.lower()}"] if license_ else [])])


def _card_tags(card: Mapping[str, Any]) -> list[str]:
    return [
        *_words(card, "pipeline_tag"),
        *_words(card, "tags"),
        *_words(card, "language"),
        *(f"dataset:{name}" for name in _words(card, "datasets")),
        *(f"base_model:{name}" for name in _words(card, "base_model")),
        *(f"license:{name}" for name in _words(card, "license")),
    ]


def _format_tags(paths: Iterable[str]) -> list[str]:
    endings = {path.rpartition(".")[2].lower() for path in paths}
    return [name for name in _FORMATS if name in endings]


def _tags(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if 0 < len(text) <= _TAG_LENGTH_MAX))[:_TAGS_MAX]


def _word(card: Mapping[str, Any], key: str) -> str | None:
    value = card.get(key)
    return value if isinstance(value, str) and 0 < len(value) <= _TAG_LENGTH_MAX else None


def _words(card: Mapping[str, Any], key: str) -> list[str]:
    """A field that may be one text or a list of them."""
    value = card.get(key)
    listed = value if isinstance(value, list) else [value]
    return [text for text in listed if isinstance(text, str)]


# ---- the card


async def _card(snapshot: Snapshot, read: ReadFile) -> dict[str, Any]:
    """The metadata at the head of the README; empty where there is none, or none that can be read."""
    file = await snapshot.tree.find(CARD_PATH)
    if file is None or not file.size:
        return {}
    content = await read(file, 0, min(file.size, CARD_SIZE_MAX))
    return await asyncio.to_thread(parse_card, content)


def parse_card(content: bytes) -> dict[str, Any]:
    """The YAML between a first line `---` and the next one; empty where there is none, or where it is no mapping.

    Numbers that JSON does not have become text. The answer is no larger than a card may be, aliases written out.
    """
    first, _, rest = content.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    if first.rstrip() != b"---":
        return {}
    lines = rest.split(b"\n")
    end = next((index for index, line in enumerate(lines) if line.rstrip() == b"---"), None)
    if end is None:
        return {}
    try:
        node = parse_yaml(b"\n".join(lines[:end]))
    except ContentInvalid:
        return {}
    card = _value(node) if isinstance(node, Members) else {}
    return card if len(json.dumps(card)) <= CARD_SIZE_MAX else {}


def _value(node: Node) -> Any:  # noqa: ANN401  (any JSON)
    match node:
        case Scalar():
            value = node.value
            return node.text if isinstance(value, float) and not math.isfinite(value) else value
        case Items():
            return [_value(item) for item in node.nodes]
        case Members():
            return {key.text: _value(value) for key, value in node.nodes.items()}


# ---- tensors


async def _safetensors(files: Iterable[HubFile], read: ReadFile) -> dict[str, Any]:
    """How many parameters there are of each type; nothing where that cannot be said."""
    parameters: dict[str, int] = {}
    budget = _TENSOR_HEADERS_SIZE_MAX
    for file in files:
        if format_of(file.path) != "safetensors":
            continue

        async def read_some(start: int, stop: int, file: HubFile = file) -> bytes:
            nonlocal budget
            budget -= stop - start
            if budget < 0:
                raise TensorsInvalid(f"headers of more than {_TENSOR_HEADERS_SIZE_MAX} bytes")
            return await read(file, start, stop)

        try:
            header = await read_tensors(read_some, file.size, "safetensors")
        except TensorsInvalid:
            return {}
        for tensor in header.tensors:
            parameters[tensor.dtype] = parameters.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return (
        {"safetensors": {"parameters": parameters, "total": sum(parameters.values())}} if parameters else {}
    )

"""What a Kitfile must mean before it is packed; the reading of it is in `kitfile.py`.

All problems are collected, sorted, and reported once, as kit does. The rules are those of kit 1.15: paths are compared as
what they point at, and none leads out of the context folder.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from kitspec.errors import KitfileInvalid
from kitspec.kitfile import MANIFEST_VERSION, Dataset, Entry, Kitfile, Section, is_model_reference

_PART_TYPE = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
_HTTP = re.compile(r"https?://", re.IGNORECASE)
_S3 = re.compile(r"s3://(?P<bucket>[^/?]+)/(?P<key>[^?]+)(?:\?versionId=[^&]+)?", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def check_kitfile(kitfile: Kitfile) -> None:
    """Refuse what cannot be packed.

    Raises:
        KitfileInvalid: the message lists every problem.
    """
    problems = sorted(set(_problems(kitfile)))
    if problems:
        listed = "".join(f"\n  * {problem}" for problem in problems)
        raise KitfileInvalid(f"errors while validating Kitfile: {listed}")


def warnings_of(kitfile: Kitfile) -> Iterator[str]:
    """What the author should know, and what does not stop anything."""
    if kitfile.manifest_version != MANIFEST_VERSION:
        yield (
            f"Unrecognized manifestVersion {kitfile.manifest_version!a}: "
            f"treating Kitfile as {MANIFEST_VERSION}"
        )
    for index, dataset in enumerate(kitfile.datasets):
        if dataset.remote_hash and is_model_reference(dataset.remote_path):
            yield f"remoteHash is ignored for a ModelKit reference ({_source(Section.DATASETS, index, dataset)})"


def clean_path(path: str) -> str:
    """The path as it is compared: no `./`, no doubled or trailing slash; `.` for the context folder itself."""
    return posixpath.normpath(path)


def _problems(kitfile: Kitfile) -> Iterator[str]:
    yield from _shared_paths(kitfile)
    for section, index, entry in _all_entries(kitfile):
        yield from _path_problems(section, entry, _source(section, index, entry))
    for part in kitfile.model.parts if kitfile.model is not None else ():
        if part.type and _PART_TYPE.fullmatch(part.type) is None:
            yield (
                f"invalid type {part.type[:80]!a} for modelpart {part.name}: must be at most 64 letters, digits, "
                "'_', '.' and '-', and begin with none of the last two"
            )
    yield from _dataset_problems(kitfile)
    yield from _mcp_server_problems(kitfile)


def _all_entries(kitfile: Kitfile) -> Iterator[tuple[Section, int, Entry]]:
    """With the datasets that are elsewhere: their paths have rules too."""
    yield from kitfile.entries()
    for index, dataset in enumerate(kitfile.datasets):
        if dataset.remote_path:
            yield Section.DATASETS, index, dataset


def _shared_paths(kitfile: Kitfile) -> Iterator[str]:
    sources: dict[str, list[str]] = defaultdict(list)
    for section, index, entry in _all_entries(kitfile):
        if section is not Section.PROMPTS:  # a prompt may be documented, too
            sources[clean_path(entry.path)].append(_source(section, index, entry))
    for path, users in sources.items():
        if len(users) > 1:
            yield f"{_enumerate(users)} use the same path {path}"


def _enumerate(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _path_problems(section: Section, entry: Entry, source: str) -> Iterator[str]:
    path = entry.path
    if _CONTROL.search(path) is not None:
        yield f"control characters are not supported in a Kitfile (path {path!a} in {source})"
    elif _HTTP.match(path):
        yield f"HTTP urls are not supported in paths ({path})"
    elif path.startswith("/"):
        yield f"absolute paths are not supported in a Kitfile (path {path} in {source})"
    elif clean_path(path) == ".." or clean_path(path).startswith("../"):
        yield f"paths outside the context directory are not supported in a Kitfile (path {path} in {source})"
    elif _S3.match(path) or is_model_reference(path):
        yield f"invalid path for {_WORDS[section]} ({path}): only local paths are permitted"


def _dataset_problems(kitfile: Kitfile) -> Iterator[str]:
    filled: dict[str, str] = {}
    for index, dataset in enumerate(kitfile.datasets):
        source = _source(Section.DATASETS, index, dataset)
        yield from _remote_problems(dataset, source)
        if dataset.remote_path and is_model_reference(dataset.remote_path):
            filled[clean_path(dataset.path)] = source
    for section, index, entry in kitfile.entries() if filled else ():
        for folder in _folders_above(clean_path(entry.path)):
            if folder in filled:
                yield (
                    f"path {entry.path} in {_source(section, index, entry)} lies inside {folder}, "
                    f"which {filled[folder]} fills from another ModelKit"
                )


def _folders_above(path: str) -> Iterator[str]:
    while path not in (".", "/", ""):
        path = posixpath.dirname(path) or "."
        yield path


def _remote_problems(dataset: Dataset, source: str) -> Iterator[str]:
    remote = dataset.remote_path
    if not remote:
        if dataset.remote_hash:
            yield f"remote hash is only applicable when remotePath is set ({source})"
    elif _HTTP.match(remote):
        yield f"HTTP urls are not supported in paths ({remote})"
    elif _S3.fullmatch(remote):
        if not dataset.remote_hash:
            yield f"remoteHash is required for {remote} ({source}): the ETag of the object, without quotes"
    elif not is_model_reference(remote):
        yield f"invalid remotePath {remote} in {source}: wanted s3://bucket/key or a ModelKit reference"


def _mcp_server_problems(kitfile: Kitfile) -> Iterator[str]:
    names: dict[str, int] = {}
    for index, server in enumerate(kitfile.mcp_servers):
        if not server.path.endswith(".mcpb"):
            yield f"mcpServers[{index}] needs a path that ends in .mcpb (path {server.path})"
        if not server.name:
            yield f"mcpServers[{index}] needs a name"
        elif names.setdefault(server.name, index) != index:
            yield f"mcpServers[{names[server.name]}] and mcpServers[{index}] have the same name {server.name}"


_WORDS = {
    Section.MODEL: "model",
    Section.MODEL_PART: "modelpart",
    Section.CODE: "code",
    Section.DATASETS: "dataset",
    Section.DOCS: "docs",
    Section.PROMPTS: "prompt",
    Section.MCP_SERVERS: "mcpServer",
}


def _source(section: Section, index: int, entry: Entry) -> str:
    word = _WORDS[section]
    return f"{word} {entry.name}" if entry.name or section is Section.MODEL else f"{word} layer {index}"

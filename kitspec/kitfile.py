"""The Kitfile: what a ModelKit holds, as people write it (YAML) and as its config carries it (JSON).

The types below are the schema: field by field in the order and, in camel case, under the name that kit uses in both forms.
Reading YAML is strict, as in kit; reading a config is tolerant, because newer kits add keys.
`kitfile_rules.py` checks what a Kitfile means. Source: the Kitfile reference; what kit 1.7 was seen to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, DigestInvalid, KitfileInvalid, ReferenceInvalid
from kitspec.go_json import format_float, to_go_json
from kitspec.go_yaml import FlowList, sort_naturally, to_go_yaml
from kitspec.media_types import LayerKind
from kitspec.names import Reference
from kitspec.strict_json import parse_json
from kitspec.strict_yaml import Items, Members, Node, Scalar, parse_yaml

KITFILE_SIZE_MAX = 4 * 1024 * 1024
# Digests and diffIds add some 200 bytes to each entry.
CONFIG_SIZE_MAX = 4 * KITFILE_SIZE_MAX
# As many as a manifest may have layers.
ENTRY_COUNT_MAX = 20_000
FILE_NAMES = ("Kitfile", "kitfile", ".kitfile")
"""Where to look for a Kitfile in a folder; the first that is there counts."""
MANIFEST_VERSION = "1.0.0"


class Section(StrEnum):
    """Where in the Kitfile an entry stands."""

    MODEL = "model"
    MODEL_PART = "modelpart"
    CODE = "code"
    DATASETS = "datasets"
    DOCS = "docs"
    PROMPTS = "prompts"
    MCP_SERVERS = "mcpservers"

    @property
    def layer_kind(self) -> LayerKind:
        return _LAYER_KINDS[self]


_LAYER_KINDS: dict[Section, LayerKind] = {
    Section.MODEL: "model",
    Section.MODEL_PART: "modelpart",
    Section.CODE: "code",
    Section.DATASETS: "dataset",
    Section.DOCS: "docs",
    Section.PROMPTS: "code",
    Section.MCP_SERVERS: "mcpb",
}


@dataclass(frozen=True, slots=True)
class Package:
    name: str = ""
    version: str = ""
    description: str = ""
    license: str = ""
    authors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelPart:
    name: str = ""
    path: str = ""
    license: str = ""
    type: str = ""
    digest: Digest | None = None
    diff_id: Digest | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """Attributes: path: a file or folder, or another ModelKit (`is_model_reference`)."""

    name: str = ""
    path: str = ""
    license: str = ""
    framework: str = ""
    format: str = ""
    version: str = ""
    description: str = ""
    parts: tuple[ModelPart, ...] = ()
    parameters: Any = None
    digest: Digest | None = None
    diff_id: Digest | None = None


@dataclass(frozen=True, slots=True)
class Code:
    name: ClassVar[str] = ""
    path: str = ""
    description: str = ""
    license: str = ""
    digest: Digest | None = None
    diff_id: Digest | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """Attributes: remote_path: where the content is, when it is not in the ModelKit."""

    name: str = ""
    path: str = ""
    remote_path: str = ""
    remote_hash: str = ""
    description: str = ""
    license: str = ""
    parameters: Any = None
    digest: Digest | None = None
    diff_id: Digest | None = None


@dataclass(frozen=True, slots=True)
class Docs:
    name: ClassVar[str] = ""
    path: str = ""
    description: str = ""
    digest: Digest | None = None
    diff_id: Digest | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    name: str = ""
    path: str = ""
    description: str = ""
    digest: Digest | None = None
    diff_id: Digest | None = None


@dataclass(frozen=True, slots=True)
class McpServer:
    name: str = ""
    path: str = ""
    description: str = ""
    digest: Digest | None = None
    diff_id: Digest | None = None


Entry = Model | ModelPart | Code | Dataset | Docs | Prompt | McpServer


@dataclass(frozen=True, slots=True)
class Kitfile:
    manifest_version: str = ""
    package: Package = Package()
    model: Model | None = None
    code: tuple[Code, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    docs: tuple[Docs, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    mcp_servers: tuple[McpServer, ...] = ()

    @classmethod
    def from_yaml(cls, content: bytes) -> Self:
        """Read what people write: any key that is not known is an error.

        Raises:
            KitfileInvalid: the message names every problem with its line.
        """
        if len(content) > KITFILE_SIZE_MAX:
            raise KitfileInvalid(f"a Kitfile of {len(content)} bytes; at most {KITFILE_SIZE_MAX} are allowed")
        try:
            root = parse_yaml(content)
        except ContentInvalid as error:
            raise KitfileInvalid(f"the Kitfile cannot be read: {error}") from error
        if root is None:
            raise KitfileInvalid("the Kitfile is empty; it needs at least a manifestVersion")
        problems: list[str] = []
        kitfile = _from_node(cls, root, "the Kitfile", problems)
        if problems:
            raise KitfileInvalid(
                "the Kitfile cannot be read:\n" + "\n".join(f"  {problem}" for problem in problems)
            )
        return kitfile._counted()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read the config of a ModelKit; unknown keys are passed over.

        Raises:
            KitfileInvalid: the message says where.
        """
        if len(content) > CONFIG_SIZE_MAX:
            raise KitfileInvalid(f"a config of {len(content)} bytes; at most {CONFIG_SIZE_MAX} are allowed")
        try:
            document = parse_json(content)
        except ContentInvalid as error:
            raise KitfileInvalid(f"the config cannot be read: {error}") from error
        return _from_json(cls, document, "the config")._counted()

    def to_json(self) -> bytes:
        """The config, to the byte as kit writes it."""
        return to_go_json(_members(self, for_config=True))

    def to_yaml(self) -> bytes:
        """The Kitfile, to the byte as kit writes it when it unpacks; without digests."""
        return to_go_yaml(_members(self, for_config=False)).encode()

    def entries(self) -> Iterator[tuple[Section, int, Entry]]:
        """Section, position in it, entry: all that have a layer, in the order that layers have in a manifest.

        A model that is another ModelKit and a dataset that is elsewhere have none.
        """
        if self.model is not None:
            if self.model.path and not is_model_reference(self.model.path):
                yield Section.MODEL, 0, self.model
            for index, part in enumerate(self.model.parts):
                yield Section.MODEL_PART, index, part
        for section, listed in self.lists():
            for index, entry in enumerate(listed):
                if not (isinstance(entry, Dataset) and entry.remote_path):
                    yield section, index, entry

    def with_digests(self, layers: Sequence[tuple[Digest, Digest]]) -> Self:
        """The Kitfile as its config says it, when `layers` have been packed.

        Args:
            layers: digest and diffId for each of `entries()`, in that order.
        """
        identified = {
            (section, index): replace(entry, digest=digest, diff_id=diff_id)
            for (section, index, entry), (digest, diff_id) in zip(self.entries(), layers, strict=True)
        }

        def renewed(section: Section, listed: Sequence[_AnyEntry]) -> tuple[_AnyEntry, ...]:
            return tuple(identified.get((section, index), entry) for index, entry in enumerate(listed))  # type: ignore[misc]

        model = self.model
        if model is not None:
            (model,) = renewed(Section.MODEL, (model,))
            model = replace(model, parts=renewed(Section.MODEL_PART, model.parts))
        return replace(
            self,
            model=model,
            code=renewed(Section.CODE, self.code),
            datasets=renewed(Section.DATASETS, self.datasets),
            docs=renewed(Section.DOCS, self.docs),
            prompts=renewed(Section.PROMPTS, self.prompts),
            mcp_servers=renewed(Section.MCP_SERVERS, self.mcp_servers),
        )

    def lists(self) -> tuple[tuple[Section, tuple[Entry, ...]], ...]:
        """The sections that are lists, with all their entries."""
        return (
            (Section.CODE, self.code),
            (Section.DATASETS, self.datasets),
            (Section.DOCS, self.docs),
            (Section.PROMPTS, self.prompts),
            (Section.MCP_SERVERS, self.mcp_servers),
        )

    def _counted(self) -> Self:
        parts = len(self.model.parts) if self.model is not None else 0
        count = parts + sum(len(listed) for _, listed in self.lists())
        if count > ENTRY_COUNT_MAX:
            raise KitfileInvalid(f"a Kitfile of {count} entries; at most {ENTRY_COUNT_MAX} are allowed")
        return self


def is_model_reference(path: str) -> bool:
    """`model.path` that names another ModelKit: it has a tag or a digest and reads as a reference."""
    if ":" not in path and "@" not in path:
        return False
    try:
        reference = Reference.parse(path)
    except ReferenceInvalid:
        return False
    return reference.tag is not None or reference.digest is not None


# ---- the schema, from the types


@dataclass(frozen=True, slots=True)
class _Field:
    """Attributes: kind: str, Digest, Any (parameters) or a type of this module; many: a list of it."""

    attribute: str
    key: str
    kind: Any
    many: bool


_AnyEntry = TypeVar("_AnyEntry")
_T = TypeVar("_T")


def _field(attribute: str, hint: Any) -> _Field:  # noqa: ANN401  (a type expression)
    key = re.sub(r"_(.)", lambda match: match[1].upper(), attribute)
    many = get_origin(hint) is tuple
    kind = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
    return _Field(attribute, key, kind, many)


_SCHEMA: dict[type, tuple[_Field, ...]] = {
    of: tuple(
        _field(name, hint) for name, hint in get_type_hints(of).items() if get_origin(hint) is not ClassVar
    )
    for of in (Kitfile, Package, *get_args(Entry))
}


def _always_written(of: type, field: _Field, *, for_config: bool) -> bool:
    if of is Kitfile:
        return field.attribute == "manifest_version" or (field.attribute == "package" and for_config)
    return of is Docs and field.attribute == "path"


def _members(value: Any, *, for_config: bool) -> dict[str, Any]:  # noqa: ANN401  (any type of the schema)
    members: dict[str, Any] = {}
    of = type(value)
    for field in _SCHEMA[of]:
        item = getattr(value, field.attribute)
        if field.kind is Digest and not for_config:
            continue
        if _is_empty(item, field) and not _always_written(of, field, for_config=for_config):
            continue
        members[field.key] = _form(item, field, for_config=for_config)
    return members


def _is_empty(item: object, field: _Field) -> bool:
    if field.kind is Any:
        return item is None
    return item is None or item in ("", (), Package())


def _form(item: Any, field: _Field, *, for_config: bool) -> object:  # noqa: ANN401  (any value of the schema)
    if field.kind is Any:
        return _sorted(item, for_config=for_config)
    if field.kind is str and field.many:
        return list(item) if for_config else FlowList(item)
    if field.many:
        return [_members(entry, for_config=for_config) for entry in item]
    if field.kind in (str, Digest):
        return str(item)
    return _members(item, for_config=for_config)


def _sorted(value: object, *, for_config: bool) -> object:
    if isinstance(value, Mapping):
        members = {key: _sorted(item, for_config=for_config) for key, item in value.items()}
        return dict(sorted(members.items())) if for_config else sort_naturally(members)
    if isinstance(value, list):
        return [_sorted(item, for_config=for_config) for item in value]
    return value


# ---- from YAML


def _from_node(of: type[_T], node: Node, where: str, problems: list[str]) -> _T:
    values: dict[str, Any] = {}
    if _is_null(node):
        return of()
    if not isinstance(node, Members):
        problems.append(f"line {node.line}: {where} is {_shape(node)}; wanted keys and values")
        return of()
    known = {field.key: field for field in _SCHEMA[of] if field.kind is not Digest}
    for key, value in node.nodes.items():
        field = known.get(key.text)
        if field is None:
            problems.append(
                f"line {key.line}: unknown key {key.text[:80]!a} in {where}; wanted one of {', '.join(known)}"
            )
        else:
            values[field.attribute] = _value(field, value, f"{field.key} of {where}", problems)
    return of(**values)


def _value(field: _Field, node: Node, where: str, problems: list[str]) -> object:
    if field.kind is Any:
        return _plain(node, where, problems)
    if field.many:
        return _values(field, node, where, problems)
    if field.kind is str:
        return _string(node, where, problems)
    if _is_null(node):
        return None if field.kind is Model else field.kind()
    return _from_node(field.kind, node, field.key, problems)


def _values(field: _Field, node: Node, where: str, problems: list[str]) -> tuple[object, ...]:
    if _is_null(node):
        return ()
    if not isinstance(node, Items):
        problems.append(f"line {node.line}: {where} is {_shape(node)}; wanted a list")
        return ()
    if field.kind is str:
        return tuple(
            _string(item, f"{where}, item {index + 1},", problems) for index, item in enumerate(node.nodes)
        )
    return tuple(
        _from_node(field.kind, item, f"{field.key}[{index}]", problems)
        for index, item in enumerate(node.nodes)
    )


def _string(node: Node, where: str, problems: list[str]) -> str:
    if _is_null(node):
        return ""
    if isinstance(node, Scalar):
        return node.text
    problems.append(f"line {node.line}: {where} is {_shape(node)}; wanted text")
    return ""


def _plain(node: Node, where: str, problems: list[str]) -> object:
    if isinstance(node, Items):
        return [_plain(item, where, problems) for item in node.nodes]
    if isinstance(node, Members):
        problems += [
            f"line {key.line}: a key that is not text in {where}: {key.text[:80]!a}; quote it"
            for key in node.nodes
            if not isinstance(key.value, str)
        ]
        return {key.text: _plain(item, where, problems) for key, item in node.nodes.items()}
    value = node.value
    if isinstance(value, float) and not abs(value) < float("inf"):
        problems.append(f"line {node.line}: {where} holds {node.text[:80]}, which JSON cannot express")
    return value


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _shape(node: Node) -> str:
    match node:
        case Scalar():
            return f"the text {node.text[:80]!a}"
        case Items():
            return "a list"
        case Members():
            return "a group of keys"


# ---- from JSON


def _from_json(of: type[_T], document: object, where: str) -> _T:
    if not isinstance(document, dict):
        raise KitfileInvalid(f"{where} is not an object")
    values: dict[str, Any] = {}
    for field in _SCHEMA[of]:
        value = document.get(field.key)
        if value is not None:
            values[field.attribute] = _from_json_value(field, value, f"{field.key} in {where}")
    return of(**values)


def _from_json_value(field: _Field, value: object, where: str) -> object:
    if field.kind is Any:
        return _go_numbers(value)
    if field.many:
        if not isinstance(value, list):
            raise KitfileInvalid(f"{where} is not a list")
        return tuple(
            _from_json_item(field.kind, item, f"{field.key}[{index}]") for index, item in enumerate(value)
        )
    return _from_json_item(field.kind, value, where)


def _from_json_item(kind: type, value: object, where: str) -> object:
    if kind not in (str, Digest):
        return _from_json(kind, value if value is not None else {}, where)
    if not isinstance(value, str):
        raise KitfileInvalid(f"{where} is not a string")
    if kind is str:
        return value
    try:
        return Digest(value) if value else None
    except DigestInvalid as error:
        raise KitfileInvalid(f"{where}: {error}") from error


def _go_numbers(value: object) -> object:
    """Numbers as Go reads them into `any`: floats; but an integer that a float would change stays what it is."""
    if isinstance(value, list):
        return [_go_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _go_numbers(item) for key, item in value.items()}
    if type(value) is int and format_float(float(value)) == str(value):
        return float(value)
    return value

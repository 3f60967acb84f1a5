"""YAML from strangers: the first document as a tree of nodes with line numbers, at a bounded cost.

PyYAML's scanner does the reading; building is ours, because PyYAML's lets duplicate keys pass and recurses without limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from kitspec.errors import ContentInvalid
from kitspec.go_yaml import resolve_scalar

DEPTH_MAX = 64
NODE_COUNT_MAX = 200_000

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE = "tag:yaml.org,2002:"
_TAGS = frozenset(
    (
        None,
        "!",
        *(_CORE + word for word in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp")),
    )
)


@dataclass(frozen=True, slots=True)
class Scalar:
    """Attributes: text: without quotes; is_plain: to be resolved, not text by its quotes or its tag."""

    text: str
    is_plain: bool
    line: int

    @property
    def value(self) -> str | int | float | bool | None:
        return resolve_scalar(self.text) if self.is_plain else self.text


@dataclass(frozen=True, slots=True)
class Items:
    nodes: tuple[Node, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Members:
    """A mapping: merge keys resolved, no key twice."""

    nodes: dict[Scalar, Node]
    line: int


Node = Scalar | Items | Members


def parse_yaml(content: bytes) -> Node | None:
    """The first document; None when there is none.

    Raises:
        ContentInvalid: not YAML, ambiguous, or beyond the limits above.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ContentInvalid(f"not UTF-8: byte {error.start}") from error
    builder = _Builder(yaml.parse(text, Loader=_Loader))
    try:
        return builder.document()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        if "nesting depth" in str(error.problem):  # libyaml's own limit, which is above ours
            raise ContentInvalid(f"{line}nested deeper than {DEPTH_MAX}") from error
        raise ContentInvalid(f"{line}not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ContentInvalid(f"not YAML: {error}") from error


class _Builder:
    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._count = 0

    def document(self) -> Node | None:
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                return self._node(next(self._events), 0)
        return None

    def _node(self, event: yaml.Event, depth: int) -> Node:
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        before = self._count
        self._count += 1
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), line)
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if depth > DEPTH_MAX:
            raise ContentInvalid(f"line {line}: nested deeper than {DEPTH_MAX}")
        self._check_count(line)
        if event.tag not in _TAGS:
            raise ContentInvalid(f"line {line}: the tag {str(event.tag)[:80]!a} has no meaning here")
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = Scalar(event.value, not event.style and event.tag not in ("!", _CORE + "str"), line)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Items(tuple(self._items(depth)), line)
        else:
            node = Members(self._members(depth), line)
        if event.anchor is not None:
            self._anchors[event.anchor] = node, self._count - before
        return node

    def _alias(self, anchor: str, line: int) -> Node:
        if anchor not in self._anchors:
            raise ContentInvalid(f"line {line}: *{anchor[:80]} stands for nothing, or for what it is part of")
        node, count = self._anchors[anchor]
        # What is shared in memory is not shared by whoever walks it: it counts each time.
        self._count += count
        self._check_count(line)
        return node

    def _check_count(self, line: int) -> None:
        if self._count > NODE_COUNT_MAX:
            raise ContentInvalid(f"line {line}: more than {NODE_COUNT_MAX} values, aliases written out")

    def _items(self, depth: int) -> Iterator[Node]:
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                return
            yield self._node(event, depth + 1)

    def _members(self, depth: int) -> dict[Scalar, Node]:
        own: dict[str, Scalar] = {}
        nodes: dict[Scalar, Node] = {}
        merged: list[Members] = []
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._node(event, depth + 1)
            value = self._node(next(self._events), depth + 1)
            if not isinstance(key, Scalar):
                raise ContentInvalid(f"line {key.line}: a key that is not text")
            if key.is_plain and key.text == "<<":
                merged += _sources(value, key.line)
                continue
            if key.text in own:
                raise ContentInvalid(
                    f"line {key.line}: mapping key {key.text[:80]!a} already defined at line {own[key.text].line}"
                )
            own[key.text] = key
            nodes[key] = value
        for source in merged:
            for key, value in source.nodes.items():
                if key.text not in own:
                    own[key.text] = key
                    nodes[key] = value
        return nodes


def _sources(value: Node, line: int) -> list[Members]:
    sources = value.nodes if isinstance(value, Items) else (value,)
    members = [source for source in sources if isinstance(source, Members)]
    if len(members) != len(sources):
        raise ContentInvalid(f"line {line}: << takes a mapping, or a list of mappings")
    return members

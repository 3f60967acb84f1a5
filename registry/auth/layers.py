"""Reads that end at the sections of a ModelKit: the model and its documents, and not the data it was trained on.

    layers: [kitfile, model, docs]        the words of kit's `--filter`

A limited reader gets what is made of readable sections and of nothing else: slices, views, layers, files. `kitfile` adds the
config of whole kits, which names every entry and its digest; what a slice says of itself is always readable with the slice.
Where the rules are kept: `registry/kits.py` and `registry/layer_access.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from kitspec.kitfile import Kitfile, Section
from kitspec.selection import SECTIONS_OF_TYPE
from kitspec.views import places_of

LAYER_WORDS = tuple(SECTIONS_OF_TYPE)


@dataclass(frozen=True)
class LayerScope:
    """Attributes: words: of `LAYER_WORDS`; what may be read."""

    words: frozenset[str]

    @cached_property
    def sections(self) -> frozenset[Section]:
        return frozenset[Section]().union(*(SECTIONS_OF_TYPE[word] for word in self.words))

    @property
    def has_kitfile(self) -> bool:
        return "kitfile" in self.words

    def includes(self, sections: Iterable[Section]) -> bool:
        """Whether what holds bytes of these sections may be read."""
        return self.sections.issuperset(sections)

    def selectors(self, kitfile: Kitfile) -> tuple[str, ...]:
        """Selectors of a tag that choose all that may be read of a kit; none where nothing may."""
        there = {section for (section, _), _ in places_of(kitfile)}
        return tuple(word for word in LAYER_WORDS if word in self.words and SECTIONS_OF_TYPE[word] & there)

    def __or__(self, other: LayerScope) -> LayerScope:
        return LayerScope(self.words | other.words)

    def __str__(self) -> str:
        """As the configuration has it."""
        return ", ".join(word for word in LAYER_WORDS if word in self.words)

"""What can be read as if it were a blob: pieces of stored layers, one behind the other, with bytes of our own between.

A file is a piece of a layer; an archive, or a raw layer in the form of a tar, is many. Nothing of it is stored: it is cut to the
span that is asked for, and each piece leaves by the way the backend has for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from kitspec.digest import Digest
from kitspec.media_types import LayerType


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that stand nowhere."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def cut(self, start: int, stop: int) -> Literal:
        return Literal(self.content[start:stop])


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a layer.

    Attributes:
        layer: the blob.
        layer_type: says whether the layer has to be inflated.
        start, stop: in the inflated layer.
    """

    layer: Digest
    layer_type: LayerType
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> Piece:
        return Piece(self.layer, self.layer_type, self.start + start, self.start + stop)


Segment = Literal | Piece


class Content:
    """Segments, one behind the other."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = [segment for segment in segments if segment.size]
        self._stops = list(accumulate(segment.size for segment in self._segments))

    @property
    def size(self) -> int:
        return self._stops[-1] if self._stops else 0

    def part(self, start: int, stop: int) -> Content:
        """Bytes `start` to `stop`, which lie inside, as a content of their own."""
        return Content(list(self.cut(start, stop)))

    def cut(self, start: int, stop: int) -> Iterator[Segment]:
        """The segments of bytes `start` to `stop`, which lie inside."""
        index = bisect_right(self._stops, start)
        while start < stop:
            segment = self._segments[index]
            begins = self._stops[index] - segment.size
            ends = min(stop, self._stops[index])
            yield segment.cut(start - begins, ends - begins)
            start, index = ends, index + 1

"""Who wants to know how a transfer goes: the side that the transfer calls. Bars and lines are drawn elsewhere."""

from __future__ import annotations

from typing import Literal, Protocol

from kitspec.descriptor import Descriptor

Outcome = Literal["done", "exists", "mounted", "failed"]


class BlobProgress(Protocol):
    """One blob on its way."""

    def advance(self, count: int) -> None:
        """`count` more bytes are across; negative when bytes have to go again."""

    def end(self, outcome: Outcome) -> None:
        """Called once."""


class Progress(Protocol):
    def begin(self, descriptor: Descriptor) -> BlobProgress:
        """A blob's transfer begins. Several are under way at once, all on the event loop's thread."""
        ...


class Silence:
    """Nobody is watching."""

    def begin(self, descriptor: Descriptor) -> Silence:
        _ = descriptor
        return self

    def advance(self, count: int) -> None:
        pass

    def end(self, outcome: Outcome) -> None:
        pass


_: type[Progress] = Silence

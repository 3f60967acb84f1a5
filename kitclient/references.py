"""Kits whose model is another kit's: what the Kitfiles of the chain say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from kitclient.errors import ClientError
from kitclient.modelkit import read_modelkit
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.kitfile import Kitfile, is_model_reference
from kitspec.names import Reference, Tag

# kit's own limit.
CHAIN_LENGTH_MAX = 10

Find = Callable[[Reference], AbstractAsyncContextManager[tuple[Place, Tag | Digest]]]
"""Opens the place that has a reference, and says what it is called there."""


class ReferenceChainInvalid(ClientError):
    """Kits that refer to kits, in a circle or without end."""


def longer(chain: list[str], reference: str) -> list[str]:
    """`chain` with one link more.

    Raises:
        ReferenceChainInvalid: it has been there, or the chain is long enough.
    """
    if reference in chain:
        raise ReferenceChainInvalid(
            f"found cycle in modelkit references: [{'=>'.join([*chain[chain.index(reference) :], reference])}]"
        )
    if len(chain) >= CHAIN_LENGTH_MAX:
        raise ReferenceChainInvalid(f"reached maximum number of model references: [{'=>'.join(chain)}]")
    return [*chain, reference]


def parent_of(kitfile: Kitfile) -> str | None:
    """The reference of the kit whose model this one has; None when the model is its own."""
    path = kitfile.model.path if kitfile.model is not None else ""
    return path if is_model_reference(path) else None


async def parents_of(kitfile: Kitfile, find: Find) -> tuple[str, ...]:
    """The layer paths of all kits that a Kitfile builds on."""
    paths: list[str] = []
    chain: list[str] = []
    parent = parent_of(kitfile)
    while parent is not None:
        chain = longer(chain, parent)
        async with find(Reference.parse(parent)) as (place, reference):
            kit = await read_modelkit(place, reference)
        paths += [entry.path for _, _, entry in kit.kitfile.entries()]
        parent = parent_of(kit.kitfile)
    return tuple(paths)

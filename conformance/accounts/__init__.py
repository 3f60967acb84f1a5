"""Clients that log in: to a private registry, over HTTPS by a private authority, with Basic and with Bearer authentication.

Passwords and certificates are made in the run, and every client keeps what it is told in a folder of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from conformance.accounts import tools
from conformance.accounts.base import Accounts, AccountsLab
from conformance.accounts.registry import PrivateRegistry, running
from conformance.clients.lab import Cell, LeftOut, run_client

__all__ = ["TOOLS", "UNPACKAGED", "run_tool", "running"]

TOOLS: dict[str, type[Accounts]] = {
    "docker": tools.Docker,
    "oras": tools.Oras,
    "crane": tools.Crane,
    "regctl": tools.Regctl,
    "skopeo": tools.Skopeo,
    "kitclient": tools.KitClient,
}
# As among the views: tried where it is on the PATH, and no row of the matrix.
UNPACKAGED: dict[str, type[Accounts]] = {"kit": tools.Kit}


def run_tool(tool: str, registries: Mapping[str, PrivateRegistry], scratch: Path) -> Iterator[Cell | LeftOut]:
    """Every operation of one tool, with each scheme."""
    if tool in UNPACKAGED and shutil.which(tool) is None:
        yield LeftOut(tool, f"there is no `{tool}` on the PATH, and no package registry has it")
        return
    make = (TOOLS | UNPACKAGED)[tool]
    for scheme, registry in registries.items():
        lab = AccountsLab(registry.host, scratch / scheme.lower(), registry, tool)
        for cell in run_client(make, tool, lab):
            yield replace(cell, operation=f"{scheme}: {cell.operation}")

"""Other people's clients against a registry: a matrix of tool and operation, each cell done and its bytes compared.

Nothing is fetched from the network: what is pushed is made here.
"""

from __future__ import annotations

from collections.abc import Iterator

from conformance.clients.crane import Crane
from conformance.clients.docker import Docker
from conformance.clients.lab import Cell, Client, Lab, run_client
from conformance.clients.oras import Oras
from conformance.clients.oras_py import OrasPy
from conformance.clients.regctl import Regctl
from conformance.clients.skopeo import Skopeo

TOOLS: dict[str, type[Client]] = {
    "docker": Docker,
    "oras": Oras,
    "crane": Crane,
    "regctl": Regctl,
    "skopeo": Skopeo,
    "oras-py": OrasPy,
}


def run_tool(tool: str, lab: Lab) -> Iterator[Cell]:
    return run_client(TOOLS[tool], tool, lab)

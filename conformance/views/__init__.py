"""Other people's programs on the views of a ModelKit: a part of it, or the same bytes in another form.

One kit of a real model is pushed once; every program takes what it understands, and its bytes are compared with the folder
that the kit was packed from.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from conformance.clients.lab import Cell, CellFailed, Client, Lab, LeftOut, run_client
from conformance.relay import Relay
from conformance.server import ours
from conformance.toolbox import ToolMissing
from conformance.views import artifacts, images, reads
from conformance.views.kit import KitLab, make_kit

TOOLS: dict[str, Callable[[KitLab], Client]] = {
    "docker": images.Docker,
    "docker-containerd": images.DockerContainerd,
    "containerd": images.Containerd,
    "podman": images.Podman,
    "skopeo": images.Skopeo,
    "kitclient": artifacts.KitClient,
    "oras": artifacts.Oras,
    "crane": artifacts.Crane,
    "regctl": artifacts.Regctl,
    "transformers": reads.Transformers,
    "huggingface_hub": reads.HuggingfaceHub,
    "pyarrow": reads.Pyarrow,
    "duckdb": reads.Duckdb,
    "curl": reads.Curl,
    "wire": reads.OnTheWire,
}
# No package registry has these; where they are on the PATH they are tried, and are no rows of the matrix.
UNPACKAGED: dict[str, Callable[[KitLab], Client]] = {"kit": artifacts.KitOps, "modctl": artifacts.Modctl}


def run_all(scratch: Path, tools: Sequence[str] | None = None) -> Iterator[Cell | LeftOut]:
    """Every operation of each tool, or of the named ones."""
    # Two workers: what one derived the other is asked for.
    with ours(workers=2).running(scratch / "server") as host:
        lab = Lab(host, scratch / "packed")
        lab.folder.mkdir(parents=True)
        try:
            kit = make_kit(lab)
        except (ToolMissing, CellFailed) as error:
            yield Cell("kitclient", "pack and push", str(error))
            return
        relay = Relay(host)
        with relay.running():
            for tool, make in (TOOLS | UNPACKAGED).items():
                if tools is None or tool in tools:
                    yield from _run(tool, make, KitLab(host, scratch / tool, kit, relay))


def _run(tool: str, make: Callable[[KitLab], Client], lab: KitLab) -> Iterator[Cell | LeftOut]:
    if tool in UNPACKAGED and shutil.which(tool) is None:
        yield LeftOut(tool, f"there is no `{tool}` on the PATH, and no package registry has it")
        return
    has_failed = False
    for cell in run_client(make, tool, lab):
        has_failed |= bool(cell.reason)
        yield cell
    if not has_failed:
        shutil.rmtree(lab.folder, ignore_errors=True)  # some hundred MB each

"""What deploy/ has for operators, tried with the programs that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from conformance.clients.lab import Cell, CellFailed, Client, Lab
from conformance.deploy.chart import Chart
from conformance.deploy.compose import Compose
from conformance.deploy.image import Image
from conformance.deploy.monitoring import Monitoring
from conformance.deploy.unit import Unit
from conformance.server import free_port
from conformance.toolbox import ToolMissing

_Client = TypeVar("_Client", bound=Client)


def run_all(scratch: Path) -> Iterator[Cell]:
    """Everything that can be tried without a cluster, the quickest first."""
    yield from _run(Unit, scratch / "unit", lambda unit: f"exposure: {unit.exposure} of 10")
    yield from _run(Monitoring, scratch / "monitoring")
    yield from _run(Compose, scratch / "compose")
    yield from _run(Image, scratch / "image", lambda image: f"size: {image.size}")


def run_chart(scratch: Path) -> Iterator[Cell]:
    """By itself: helm and the libraries of Kubernetes are minutes to build."""
    yield from _run(Chart, scratch / "chart")


def _run(
    make: Callable[[Lab], _Client], folder: Path, tell: Callable[[_Client], str] | None = None
) -> Iterator[Cell]:
    """Every operation, and what there is to tell at the end."""
    folder.mkdir(parents=True)
    try:
        client = make(Lab(f"127.0.0.1:{free_port()}", folder))
        yield from client.cells(folder.name)
    except (ToolMissing, CellFailed) as error:
        yield Cell(folder.name, "to start", str(error))
        return
    if tell is not None:
        yield Cell(folder.name, tell(client), "")

"""MATRIX.md: which version of which client did what with our registry. Same runs, same text: no dates, no times."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from itertools import groupby

from conformance import toolbox
from conformance.clients.lab import Cell

PATH = toolbox.HERE / "MATRIX.md"

_HEAD = """\
# Clients that work with the registry

Written by `.venv/bin/python -m conformance --write`; `make conformance` does all of it again and fails when a cell does.
docs/conformance.md says what each run is. Rows with Basic and Bearer are done with logins, over HTTPS by a private authority.

"""
_VIEWS = """\

## On the views of a ModelKit

Parts of a kit, and the same bytes in other forms, as programs see them that know nothing of ModelKits.

"""
_COLUMNS = "| tool | version | operation | |\n| --- | --- | --- | --- |\n"


def render(clients: Iterable[Cell], views: Iterable[Cell], versions: Mapping[str, str]) -> str:
    """
    Args:
        versions: of each tool; "" where it has none of its own.
    """
    return _HEAD + _table(clients, versions) + _VIEWS + _table(views, versions)


def _table(cells: Iterable[Cell], versions: Mapping[str, str]) -> str:
    rows = []
    for tool, of_tool in groupby(cells, key=lambda cell: cell.tool):
        for number, cell in enumerate(of_tool):
            name, version = (tool, versions.get(tool, "")) if number == 0 else ("", "")
            rows.append(f"| {name} | {version} | {cell.operation} | {'fails' if cell.reason else 'ok'} |\n")
    return _COLUMNS + "".join(rows)


def versions() -> dict[str, str]:
    """Of each client, as pinned, or as the installed command says; "?" where it does not."""
    installed, python = toolbox.VERSIONS["go"]["installed"], toolbox.VERSIONS["python"]
    pinned = {tool: installed[tool]["version"].removeprefix("v") for tool in ("crane", "oras", "regctl")}
    return {
        **pinned,
        **python["views"],
        "oras-py": python["oras-py"]["oras"],
        "docker": _asked("dockerd"),
        "docker-containerd": f"moby {installed['dockerd']['version'].removeprefix('v')}",
        "containerd": _asked("ctr"),
        **{command: _asked(command) for command in ("curl", "podman", "skopeo")},
    }


def _asked(command: str) -> str:
    try:
        path = toolbox.debian_command(command)
    except toolbox.ToolMissing:
        return "?"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"\d+\.\d+\.\d+", said)
    return match[0] if match else "?"

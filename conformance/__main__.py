"""`python -m conformance`: everything, with one line for each thing tried and a closing count.

--only PART     official, clients, views, others, deploy or chart; may be repeated
--tool NAME     of the clients and the views, only this one; may be repeated
--write         write MATRIX.md anew
--install       install what the runs need, and stop
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from conformance import accounts, clients, deploy, matrix, official, other_registries, toolbox, views
from conformance.clients.lab import Cell, Lab, LeftOut
from conformance.deploy.base import make_base
from conformance.server import ServerFailed, ours

_PARTS = ("official", "clients", "others", "views", "deploy", "chart")
# What each part needs, the quickest to install first: it runs while the rest is being installed.
_GO_TOOLS = {
    "official": ("conformance", "versitygw"),
    "clients": ("crane", "oras", "regctl"),
    "others": ("olareg", "registry"),
    "views": ("crane", "oras", "regctl", "dockerd"),
    "deploy": ("conformance", "versitygw"),
    "chart": ("helm", "kubectl-validate"),
}
_DEBIAN_COMMANDS = {
    "clients": ("dockerd", "skopeo"),
    "views": ("ctr", "curl", "dockerd", "podman", "skopeo"),
    "deploy": ("debootstrap", "docker-compose", "dockerd", "nginx", "promtool", "systemd-analyze"),
}
_PYTHON_ENVIRONMENTS = {"clients": "oras-py", "views": "views"}
# Whose results are in MATRIX.md.
_IN_MATRIX = ("clients", "views")
# Two builds at once: one downloads while the other compiles.
_BUILDS_AT_ONCE = 2


def main() -> int:
    arguments = _parse()
    started = time.monotonic()
    scratch = toolbox.CACHE / "run"
    shutil.rmtree(scratch, ignore_errors=True)
    parts = [part for part in _PARTS if part in (arguments.only or _PARTS)]
    passed = failed = 0
    cells: dict[str, list[Cell]] = {}
    with ThreadPoolExecutor(_BUILDS_AT_ONCE) as installer:
        # With --tool, what that tool asks for is installed when it does.
        needed = _begin_installing(installer, parts) if arguments.install or not arguments.tool else {}
        if arguments.install:
            return _report_installed(needed)
        for part in parts:
            for ok, line in _run_part(part, scratch, arguments, cells):
                print(f"{line}  [{time.monotonic() - started:.0f} s]", flush=True)
                passed, failed = passed + (ok is True), failed + (ok is False)
    if not arguments.tool and set(_IN_MATRIX) <= set(parts):
        _compare_matrix(cells, arguments)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m conformance", description="others' suites and clients against us"
    )
    parser.add_argument("--only", action="append", choices=_PARTS, help="only this part; may be repeated")
    parser.add_argument(
        "--tool",
        action="append",
        choices=list(clients.TOOLS | accounts.TOOLS | views.TOOLS | views.UNPACKAGED),
        help="only this client; may be repeated",
    )
    parser.add_argument("--write", action="store_true", help="write MATRIX.md anew")
    parser.add_argument("--install", action="store_true", help="install what the runs need, and stop")
    return parser.parse_args()


def _begin_installing(installer: ThreadPoolExecutor, parts: list[str]) -> dict[str, Future[Path]]:
    """Have it all installed meanwhile; who needs a thing waits for it, and says so if it cannot be had."""
    wanted: dict[str, Callable[[], Path]] = {}
    for part in parts:
        wanted |= {tool: partial(toolbox.go_tool, tool) for tool in _GO_TOOLS[part]}
        wanted |= {
            f"{command} of Debian": partial(toolbox.debian_command, command)
            for command in _DEBIAN_COMMANDS.get(part, ())
        }
        if environment := _PYTHON_ENVIRONMENTS.get(part):
            wanted[f"Python for {environment}"] = partial(toolbox.python_with_packages, environment)
        if part == "views":
            wanted["the model"] = toolbox.model_files
        if part == "deploy":
            wanted["the base of the image"] = make_base
    return {name: installer.submit(install) for name, install in wanted.items()}


def _report_installed(needed: dict[str, Future[Path]]) -> int:
    failed = 0
    for name, path in needed.items():
        try:
            print(f"ok      {name}: {path.result()}", flush=True)
        except toolbox.ToolMissing as error:
            failed += 1
            print(f"FAILED  {name}: {error}", flush=True)
    return 1 if failed else 0


def _run_part(
    part: str, scratch: Path, arguments: argparse.Namespace, cells: dict[str, list[Cell]]
) -> Iterator[tuple[bool | None, str]]:
    """Whether each thing tried did as it should, None where it could not be tried, and its line; fills `cells`."""
    try:
        if part == "official":
            for verdict in official.run_all(scratch):
                yield verdict.passed, "\n    ".join([str(verdict), *verdict.complaints])
            return
        for cell in _cells(part, scratch, arguments.tool):
            if isinstance(cell, Cell):
                cells.setdefault(part, []).append(cell)
                yield not cell.reason, str(cell)
            else:
                yield None, str(cell)
    except (toolbox.ToolMissing, ServerFailed) as error:
        yield False, f"FAILED  {part}: {error}"


def _cells(part: str, scratch: Path, tools: list[str] | None) -> Iterator[Cell | LeftOut]:
    if part == "clients":
        yield from _run_clients(scratch, tools)
    elif part == "views":
        yield from views.run_all(scratch / "views", tools)
    elif part == "deploy":
        yield from deploy.run_all(scratch / "deploy")
    elif part == "chart":
        yield from deploy.run_chart(scratch / "deploy")
    else:
        yield from other_registries.run_all(scratch)


def _run_clients(scratch: Path, tools: list[str] | None) -> Iterator[Cell | LeftOut]:
    with accounts.running(scratch / "accounts") as registries:
        for tool in clients.TOOLS | accounts.TOOLS | accounts.UNPACKAGED:
            if tools is not None and tool not in tools:
                continue
            if tool in clients.TOOLS:
                with ours().running(scratch / tool / "server") as host:
                    yield from clients.run_tool(tool, Lab(host, scratch / tool / "work"))
            if tool in accounts.TOOLS | accounts.UNPACKAGED:
                yield from accounts.run_tool(tool, registries, scratch / tool / "accounts")


def _compare_matrix(cells: dict[str, list[Cell]], arguments: argparse.Namespace) -> None:
    unpackaged = accounts.UNPACKAGED | views.UNPACKAGED
    of_clients, of_views = (
        [cell for cell in cells.get(part, ()) if cell.tool not in unpackaged] for part in _IN_MATRIX
    )
    text = matrix.render(of_clients, of_views, matrix.versions())
    if arguments.write:
        matrix.PATH.write_text(text)
    elif matrix.PATH.read_text() != text:
        print(
            f"note    {matrix.PATH.name} does not say what was just seen; --write writes it anew",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())

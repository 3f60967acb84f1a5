"""`python -m conformance`: everything, with one line for each thing tried and a closing count.

--only PART     official, clients or others; may be repeated
--tool NAME     of the clients, only this one; may be repeated
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

from conformance import clients, matrix, official, other_registries, toolbox
from conformance.clients.lab import Lab
from conformance.server import ServerFailed, ours

_PARTS = ("official", "clients", "others")
# What each part needs, the quickest to install first: it runs while the rest is being installed.
_GO_TOOLS = {
    "official": ("conformance",),
    "clients": ("crane", "oras", "regctl"),
    "others": ("olareg", "registry"),
}
# Two builds at once: one downloads while the other compiles.
_BUILDS_AT_ONCE = 2


def main() -> int:
    arguments = _parse()
    started = time.monotonic()
    scratch = toolbox.CACHE / "run"
    shutil.rmtree(scratch, ignore_errors=True)
    parts = [part for part in _PARTS if part in (arguments.only or _PARTS)]
    passed = failed = 0
    with ThreadPoolExecutor(_BUILDS_AT_ONCE) as installer:
        needed = _begin_installing(installer, parts, arguments.tool)
        if arguments.install:
            return _report_installed(needed)
        for part in parts:
            for ok, line in _run_part(part, scratch, arguments):
                print(f"{line}  [{time.monotonic() - started:.0f} s]", flush=True)
                passed, failed = passed + ok, failed + (not ok)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m conformance", description="others' suites and clients against us"
    )
    parser.add_argument("--only", action="append", choices=_PARTS, help="only this part; may be repeated")
    parser.add_argument(
        "--tool", action="append", choices=list(clients.TOOLS), help="only this client; may be repeated"
    )
    parser.add_argument("--write", action="store_true", help="write MATRIX.md anew")
    parser.add_argument("--install", action="store_true", help="install what the runs need, and stop")
    return parser.parse_args()


def _begin_installing(
    installer: ThreadPoolExecutor, parts: list[str], tools: list[str] | None
) -> dict[str, Future[Path]]:
    wanted: dict[str, Callable[[], Path]] = {}
    for part in parts:
        wanted |= {tool: partial(toolbox.go_tool, tool) for tool in _GO_TOOLS[part]}
    if "clients" in parts:
        wanted |= {name: partial(toolbox.debian_command, name) for name in toolbox.VERSIONS["debian"]}
        wanted["oras-py"] = toolbox.python_with_packages
    return {
        name: installer.submit(install)
        for name, install in wanted.items()
        if not tools or name in {*tools, "crane", "dockerd"}
    }


def _report_installed(needed: dict[str, Future[Path]]) -> int:
    failed = 0
    for name, path in needed.items():
        try:
            print(f"ok      {name}: {path.result()}", flush=True)
        except toolbox.ToolMissing as error:
            failed += 1
            print(f"FAILED  {name}: {error}", flush=True)
    return 1 if failed else 0


def _run_part(part: str, scratch: Path, arguments: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    try:
        if part == "official":
            for verdict in official.run_all(scratch):
                yield verdict.passed, "\n    ".join([str(verdict), *verdict.complaints])
        elif part == "clients":
            yield from _run_clients(scratch, arguments)
        else:
            for cell in other_registries.run_all(scratch):
                yield not cell.reason, str(cell)
    except (toolbox.ToolMissing, ServerFailed) as error:
        yield False, f"FAILED  {part}: {error}"


def _run_clients(scratch: Path, arguments: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    cells = []
    for tool in arguments.tool or clients.TOOLS:
        with ours().running(scratch / tool / "server") as host:
            for cell in clients.run_tool(tool, Lab(host, scratch / tool / "work")):
                cells.append(cell)
                yield not cell.reason, str(cell)
    if arguments.tool:
        return
    text = matrix.render(cells, matrix.versions())
    if arguments.write:
        matrix.PATH.write_text(text)
    elif matrix.PATH.read_text() != text:
        print(
            f"note    {matrix.PATH.name} does not say what was just seen; --write writes it anew",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())

"""kitclient beside any `kit` on the PATH: pack, pull and unpack, against one registry on this machine.

Wall time of the command, start-up included, as its user would see it. Both write to fresh folders and read from a warm
page cache; the registry is ours, for both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.figures import MIB, Measure, Target
from bench.servers import Server
from bench.workloads import Scale

SMALL_FILE_SIZE = 4096
FILES_PER_FOLDER = 100


class ClientFailed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Client:
    """A command that takes kit's arguments."""

    name: str
    command: str


OURS = Client("kitclient", f"{sys.prefix}/bin/kitclient")


def peer() -> Client | None:
    found = shutil.which("kit")
    return Client("kit", found) if found else None


_CASES = {"1 GiB": "one", "10,000 files": "many"}
_NO_SLOWER = Target("<=", 1.0)


def _row(what: str, case: str) -> Measure:
    # The targets are about the one large file; the many small ones are there to be seen.
    is_target = case == "1 GiB" and what in {"pack", "unpack"}
    return Measure(f"{what} of {case}", "s", more_is_better=False, target=_NO_SLOWER if is_target else None)


MEASURES = tuple(_row(what, case) for case in _CASES for what in ("pack", "push", "pull", "unpack"))


def make_models(folder: Path, scale: Scale) -> dict[str, Path]:
    """The two directories to pack, by the name that stands in the rows."""
    one, many = folder / "one", folder / "many"
    one.mkdir(parents=True)
    (one / "Kitfile").write_text(_KITFILE + "model: {name: large, path: model.safetensors}\n")
    with (one / "model.safetensors").open("wb") as file:
        for _ in range(0, scale.large, MIB):
            file.write(os.urandom(MIB))
    for index in range(scale.small_files):
        folder_of_some = many / "files" / f"{index // FILES_PER_FOLDER:04}"
        folder_of_some.mkdir(parents=True, exist_ok=True)
        (folder_of_some / f"{index:06}.bin").write_bytes(os.urandom(SMALL_FILE_SIZE))
    (many / "Kitfile").write_text(_KITFILE + "datasets: [{name: small, path: files}]\n")
    return {"1 GiB": one, "10,000 files": many}


_KITFILE = "manifestVersion: 1.0.0\npackage: {name: bench}\n"


def measure(client: Client, server: Server, model: Path, case: str, scratch: Path) -> dict[str, float]:
    """One round: pack, push, pull into another store, unpack from the registry without any store."""
    registry = urlsplit(server.url).netloc
    reference = f"{registry}/bench/{client.name}-{_CASES[case]}:v1"
    with (
        _folder(scratch) as packed,
        _folder(scratch) as pulled,
        _folder(scratch) as empty,
        _folder(scratch) as target,
    ):

        def run(store: Path, *arguments: str) -> Callable[[], float]:
            return lambda: _timed(client, store, *arguments)

        figures = {
            "pack": _second(run(packed, "pack", str(model), "-t", reference), lambda: _empty(packed)),
            # Once: the second push of a kit has nothing to send.
            "push": run(packed, "push", "--plain-http", reference)(),
            "pull": _second(run(pulled, "pull", "--plain-http", reference), lambda: _empty(pulled)),
            "unpack": _second(
                run(empty, "unpack", "--plain-http", "-d", str(target), reference), lambda: _empty(target)
            ),
        }
        _check(model, target)
    return {f"{what} of {case}": figure for what, figure in figures.items()}


def _second(step: Callable[[], float], undo: Callable[[], None]) -> float:
    """The time of the second of two runs, which finds free what the first one took of the machine's memory."""
    step()
    undo()
    return step()


def _timed(client: Client, store: Path, *arguments: str) -> float:
    os.sync()
    command = [client.command, "--config", str(store), "--progress", "none", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    elapsed = time.perf_counter() - start
    if done.returncode:
        raise ClientFailed(
            f"{' '.join(command)} gave {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-1500:]}"
        )
    return elapsed


def _environment() -> dict[str, str]:
    """Ours, without what keeps Python from keeping compiled modules, as an installed command has them."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def warm_up(client: Client) -> None:
    """Start it once: what the first start alone has to do is not what is measured."""
    subprocess.run([client.command, "pack", "--help"], capture_output=True, check=True, env=_environment())
    subprocess.run([client.command, "pull", "--help"], capture_output=True, check=True, env=_environment())


def _check(model: Path, target: Path) -> None:
    """What came out is what went in, by names and sizes: the clients' own tests look at the bytes."""
    for wanted in model.rglob("*"):
        if wanted.is_file() and wanted.name != "Kitfile":
            unpacked = target / wanted.relative_to(model)
            if not unpacked.is_file() or unpacked.stat().st_size != wanted.stat().st_size:
                raise ClientFailed(f"{wanted.relative_to(model)} did not come back")


# kit looks for news of itself unless this file tells it not to: not what is measured.
_NO_NEWS = "disable-update-notifications"


@contextmanager
def _folder(scratch: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="store-", dir=scratch))
    try:
        (folder / _NO_NEWS).touch()
        yield folder
    finally:
        shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    """Remove what a client left in its folder."""
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != _NO_NEWS:
            left.unlink()

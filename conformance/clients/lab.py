"""Where a client works, what its operations are, and how each is judged."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from conformance.toolbox import ToolMissing

_COMMAND_TIMEOUT_S = 120
_SERVER_START_S = 60
_SERVER_END_S = 30
_Method = TypeVar("_Method", bound=Callable[..., None])
_Lab = TypeVar("_Lab", bound="Lab")
# Settings of programs that would have them work elsewhere, or not at all.
_FOREIGN_SETTINGS = ("DOCKER_", "HF_", "KITCLIENT_", "TRANSFORMERS_")


class CellFailed(Exception):
    """A client's operation did not do what it should; the message says what was seen."""


@dataclass(frozen=True)
class Cell:
    """One tool doing one thing; `reason` is "" where it worked."""

    tool: str
    operation: str
    reason: str

    def __str__(self) -> str:
        return f"{'FAILED' if self.reason else 'ok    '}  {self.tool}: {self.operation}" + (
            f": {self.reason}" if self.reason else ""
        )


@dataclass(frozen=True)
class LeftOut:
    """A tool that is not here and that nobody can be asked to install: neither passed nor failed."""

    tool: str
    reason: str

    def __str__(self) -> str:
        return f"absent  {self.tool}: {self.reason}"


@dataclass(frozen=True)
class Lab:
    """Where a tool works: a registry of its own and a folder that is thrown away.

    Attributes:
        host: of the registry, as `host:port`.
        folder: empty at the start; commands run in it, and it is their home.
    """

    host: str
    folder: Path

    def run(
        self, *command: str | Path, stdin: bytes = b"", cwd: Path | None = None, **environment: str
    ) -> str:
        """Standard output of a command that must succeed, as text."""
        return self.run_for_bytes(*command, stdin=stdin, cwd=cwd, **environment).decode()

    def run_for_bytes(
        self, *command: str | Path, stdin: bytes = b"", cwd: Path | None = None, **environment: str
    ) -> bytes:
        """Standard output of a command that must succeed."""
        try:
            run = subprocess.run(
                command,
                cwd=cwd or self.folder,
                env=self.environment(**environment),
                input=stdin,
                capture_output=True,
                timeout=_COMMAND_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CellFailed(str(error)) from error
        if run.returncode != 0:
            words = " ".join(str(word) for word in command[1:4])
            said = (run.stderr or run.stdout).decode(errors="replace").strip()
            raise CellFailed(f"{Path(command[0]).name} {words}: exit status {run.returncode}: {said[-600:]}")
        return run.stdout

    @contextmanager
    def serving(self, *command: str | Path, ask: Callable[[], object], **environment: str) -> Iterator[None]:
        """Somebody's server, from when `ask` succeeds until the block ends. What it says is in a log in the folder.

        Raises:
            CellFailed: it ended, or does not answer.
        """
        log = self.folder / f"{Path(command[0]).name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + _SERVER_START_S
            while True:
                try:
                    ask()
                    break
                except CellFailed as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        said = log.read_text(errors="replace")[-800:]
                        raise CellFailed(f"{log.stem} does not start: {error}: {said}") from error
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_SERVER_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def environment(self, **more: str) -> dict[str, str]:
        """The caller's, but at home in the folder: nobody's credentials and settings are used."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_SETTINGS)
        }
        return {**inherited, "HOME": str(self.folder), "DOCKER_CONFIG": str(self.folder / "docker"), **more}

    def get(self, path: str, accept: str = "*/*") -> bytes:
        request = urllib.request.Request(f"http://{self.host}{path}", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
            content: bytes = reply.read()
            return content


def check(ok: object, *seen: object) -> None:
    if not ok:
        raise CellFailed("not what was wanted: " + " ".join(str(thing)[:300] for thing in seen))


def layer_tar(size: int = 3_000_000) -> bytes:
    """A tar of one file with bytes that do not compress."""
    return tar_of(b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(size // 32)))


def tar_of(content: bytes) -> bytes:
    """A tar of one file, as `file_in_tar` reads it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("weights.bin")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def file_in_tar(content: bytes) -> bytes:
    """What `tar_of` put into a tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.extractfile("weights.bin")
        check(member is not None, "weights.bin is no file")
        assert member is not None
        return member.read()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digests(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The SHA-256 of every file under a folder, by its path in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in without and path.is_file():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def operation(label: str) -> Callable[[_Method], _Method]:
    """Marks a method of a `Client` as a cell of the matrix, called `label`."""

    def mark(method: _Method) -> _Method:
        method.operation = label  # type: ignore[attr-defined]
        return method

    return mark


class Client:
    """One tool at work. Its operations run in the order they are written in: later ones use what earlier ones made."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @contextmanager
    def ready(self) -> Iterator[None]:
        """What must be up while the operations run."""
        yield

    def cells(self, tool: str) -> Iterator[Cell]:
        with self.ready():
            for label, method in self._operations():
                try:
                    method(self)
                except (CellFailed, OSError, ValueError, LookupError) as error:
                    yield Cell(tool, label, str(error) or type(error).__name__)
                else:
                    yield Cell(tool, label, "")

    def _operations(self) -> Iterator[tuple[str, Callable[[Client], None]]]:
        for ancestor in reversed(type(self).__mro__):
            for method in vars(ancestor).values():
                if hasattr(method, "operation"):
                    yield method.operation, method


def run_client(make: Callable[[_Lab], Client], tool: str, lab: _Lab) -> Iterator[Cell]:
    """Every operation of one tool; a tool that cannot be had is a cell that failed."""
    lab.folder.mkdir(parents=True)
    try:
        yield from make(lab).cells(tool)
    except (ToolMissing, CellFailed) as error:
        yield Cell(tool, "to start", str(error))

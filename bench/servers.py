"""The servers that are measured: started on a fresh folder, watched through /proc, ended by their id.

A server that is given as a URL is only driven; its CPU time and memory are not ours to see.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.figures import MIB

CACHE = Path(".cache/bench")
DISTRIBUTION_VERSION = "v3.1.2"
# Neither side writes an access log: it is a setting of each, and no figure of the table.
_OURS = (
    f"MODELREG_LOG_LEVEL=error MODELREG_LOG_ACCESSLOG_DISABLED=true {sys.prefix}/bin/modelkit-registry serve "
    "--listen 127.0.0.1:{port} --workers {workers} --storage"
)
OURS = f"env {_OURS} {{folder}}"
OURS_ON_S3 = (
    "env MODELREG_STORAGE_S3_REGIONENDPOINT={endpoint} MODELREG_STORAGE_REDIRECT_DISABLE={streams} "
    f"{_OURS} s3://{{bucket}}"
)
START_S = 30
STOP_S = 30
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ServerFailed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server to measure.

    Attributes:
        command: with `{port}`, `{folder}` and `{workers}` to fill in; None when the server runs already. On an object
            store: with `{endpoint}`, `{bucket}` and `{streams}`, which is `true` where redirects are to be off and else
            `false`; the keys come by AWS's own variables.
        url: where it runs already.
    """

    name: str
    command: str | None = None
    url: str | None = None

    @property
    def is_on_s3(self) -> bool:
        return "{bucket}" in (self.command or "")


@dataclass(frozen=True, slots=True)
class Place:
    """Where servers keep what they are given, each in a new folder. To the object store of bench/s3.py that is a bucket.

    Attributes:
        words: what commands may name in braces beside what every server is told.
        environment: what is added to the environment of servers.
    """

    folder: Path
    words: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    name: str
    url: str
    pid: int | None = None
    folder: Path | None = None

    def remove_blobs(self) -> None:
        """Remove the large files in its folder, which nobody will ask for; the page cache gives their memory back."""
        for file in self.folder.rglob("*") if self.folder is not None else ():
            if file.is_file() and file.stat().st_size >= MIB:
                file.unlink()

    def cpu_s(self) -> float | None:
        """CPU seconds so far, of all its processes, also of those that have ended."""
        if self.pid is None:
            return None
        # The folded-in times of reaped children are fields 16 and 17 (proc(5)), after the name in parentheses.
        return sum(sum(map(int, _stat(pid)[11:15])) for pid in _family(self.pid)) / _TICKS_PER_SECOND

    def peak_memory_mib(self) -> float | None:
        """The largest resident set that any of its processes has had; pages of mapped files count too."""
        if self.pid is None:
            return None
        return max(_high_water_kib(pid) for pid in _family(self.pid)) * 1024 / MIB


@contextmanager
def running(candidate: Candidate, place: Place, workers: int, *, streams: bool = True) -> Iterator[Server]:
    """The candidate on a fresh folder in `place`, which goes when it ends; or where it runs already.

    Args:
        streams: send every blob, and never the address of one in an object store.
    """
    if candidate.command is None:
        assert candidate.url is not None
        yield Server(candidate.name, candidate.url.rstrip("/"))
        return
    port = free_port()
    folder = place.folder / f"{candidate.name}-{secrets.token_hex(4)}"
    folder.mkdir()
    words = {"port": port, "folder": folder, "workers": workers, "bucket": folder.name, **place.words}
    command = shlex.split(candidate.command.format(**words, streams=str(streams).lower()))
    try:
        with started(command, folder.with_suffix(".log"), place.environment) as process:
            wait_until(lambda: _answers(port), process, f"{candidate.name} answers GET /v2/")
            yield Server(candidate.name, f"http://127.0.0.1:{port}", process.pid, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # What one server left dirty must not be written at the expense of the next.
        os.sync()


@contextmanager
def started(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with the block. An error in the block gets the end of its log as a note.

    Args:
        environment: what is added to ours.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    except Exception as error:
        error.add_note(f"{command[0]} wrote:\n{log.read_text(errors='replace')[-2000:]}")
        raise
    finally:
        _stop(process)


def wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], so: str) -> None:
    """
    Args:
        so: what is waited for, in words.

    Raises:
        ServerFailed: the process has ended, or `is_ready` is not true after START_S.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if is_ready():
            return
        time.sleep(0.05)
    raise ServerFailed(f"given up to wait until {so}")


def distribution() -> Candidate | None:
    """CNCF Distribution, built into `.cache` when it is not there; None without Go."""
    return _distribution(
        "distribution", "distribution.yml", "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY={folder}"
    )


def distribution_on_s3() -> Candidate | None:
    """The same on an object store."""
    variables = (
        "REGISTRY_STORAGE_S3_REGIONENDPOINT={endpoint} REGISTRY_STORAGE_S3_BUCKET={bucket} "
        "REGISTRY_STORAGE_REDIRECT_DISABLE={streams}"
    )
    return _distribution("distribution-s3", "distribution-s3.yml", variables)


def _distribution(name: str, settings: str, variables: str) -> Candidate | None:
    package = f"github.com/distribution/distribution/v3/cmd/registry@{DISTRIBUTION_VERSION}"
    binary = built(package, CACHE / f"registry-{DISTRIBUTION_VERSION}" / "registry")
    if binary is None:
        return None
    file = Path(__file__).with_name(settings)
    # One process of Go uses all cores: there is no number of workers to set.
    return Candidate(
        name,
        f"env {variables} REGISTRY_HTTP_ADDR=127.0.0.1:{{port}} {shlex.quote(str(binary))} serve {shlex.quote(str(file))}",
    )


def built(package: str, binary: Path, **variables: str) -> Path | None:
    """`binary`, built by `go install` when it is not there; None when it is not and there is no Go.

    Args:
        variables: further ones of Go's.
    """
    if not binary.exists():
        if shutil.which("go") is None:
            return None
        print(f"building {package} into {binary.parent} …", flush=True)
        environment = {**os.environ, **variables, "GOBIN": str(binary.parent.resolve())}
        subprocess.run(["go", "install", package], env=environment, check=True)
    return binary


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as probe:
            probe.sendall(b"GET /v2/ HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            return probe.recv(16).startswith((b"HTTP/1.1 200", b"HTTP/1.1 401"))
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        # Its session is its own: the workers go with it.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _family(pid: int) -> list[int]:
    """`pid` and its descendants."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents.setdefault(int(_stat(int(folder.name))[1]), []).append(int(folder.name))
        except FileNotFoundError:  # ended meanwhile
            continue
    family = [pid]
    for member in family:  # grows while it is walked
        family += parents.get(member, [])
    return family


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third, the state, on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _high_water_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)

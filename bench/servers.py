"""The servers that are measured: started on a fresh folder, watched through /proc, ended by their id.

A server that is given as a URL is only driven; its CPU time and memory are not ours to see.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.figures import MIB

CACHE = Path(".cache/bench")
DISTRIBUTION_VERSION = "v3.1.2"
# Neither side writes an access log: it is a setting of each, and no figure of the table.
OURS = (
    f"env MODELREG_LOG_LEVEL=error MODELREG_LOG_ACCESSLOG_DISABLED=true {sys.prefix}/bin/modelkit-registry serve "
    "--listen 127.0.0.1:{port} --storage {folder} --workers {workers}"
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
        command: with `{port}`, `{folder}` and `{workers}` to fill in; None when the server runs already.
        url: where it runs already.
    """

    name: str
    command: str | None = None
    url: str | None = None


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
def running(candidate: Candidate, scratch: Path, workers: int) -> Iterator[Server]:
    """The candidate on a fresh folder below `scratch`, which goes when it ends; or where it runs already."""
    if candidate.command is None:
        assert candidate.url is not None
        yield Server(candidate.name, candidate.url.rstrip("/"))
        return
    port = _free_port()
    folder = Path(tempfile.mkdtemp(prefix=f"{candidate.name}-", dir=scratch))
    log = folder.with_suffix(".log")
    command = shlex.split(candidate.command.format(port=port, folder=folder, workers=workers))
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait_until_ready(process, port, shlex.join(command), log)
            yield Server(candidate.name, f"http://127.0.0.1:{port}", process.pid, folder)
        finally:
            _stop(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # What one server left dirty must not be written at the expense of the next.
        os.sync()


def distribution() -> Candidate | None:
    """CNCF Distribution, built into `.cache` when it is not there; None without Go."""
    binary = CACHE / f"registry-{DISTRIBUTION_VERSION}" / "registry"
    if not binary.exists():
        if shutil.which("go") is None:
            return None
        module = f"github.com/distribution/distribution/v3/cmd/registry@{DISTRIBUTION_VERSION}"
        print(f"building CNCF Distribution {DISTRIBUTION_VERSION} into {CACHE} …", flush=True)
        subprocess.run(
            ["go", "install", module], env={**os.environ, "GOBIN": str(binary.parent.resolve())}, check=True
        )
    settings = Path(__file__).with_name("distribution.yml")
    variables = "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY={folder} REGISTRY_HTTP_ADDR=127.0.0.1:{port}"
    # One process of Go uses all cores: there is no number of workers to set.
    return Candidate(
        "distribution", f"env {variables} {shlex.quote(str(binary))} serve {shlex.quote(str(settings))}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, command: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as probe:
                probe.sendall(b"GET /v2/ HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
                if probe.recv(16).startswith(b"HTTP/1.1 200"):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise ServerFailed(f"{command} did not answer GET /v2/:\n{log.read_text()[-2000:]}")


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

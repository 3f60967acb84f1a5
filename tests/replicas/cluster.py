"""Replicas of the registry over one bucket, started, killed and replaced, with a proxy in front that asks them in turn.

For tests, for conformance and for scripts alike: commands and sockets only. A replica is a process of the installed command
with one worker. What every replica logged is looked through at the end: an error or a stack trace fails the block.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.replicas.round_robin import RoundRobin, round_robin

COMMAND = f"{sys.prefix}/bin/modelkit-registry"
# S3 takes no smaller part: uploads of a few megabytes then have several.
PART_SIZE_MIN = 5 * 1024 * 1024
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_OPERATION_TIMEOUT_S = 600.0
_POLL_S = 0.01
_COMPLAINTS_SHOWN = 10
_LINE_LENGTH_MAX = 600


class ClusterFailed(Exception):
    """A replica did not start, ended by itself, or logged what a sound one does not; the message has the lines."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where replicas keep everything.

    Attributes:
        endpoint: URL of the store.
    """

    endpoint: str
    name: str
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """What tells a replica, but for the bucket's name."""
        return {
            "MODELREG_STORAGE_S3_REGION": "us-east-1",
            "MODELREG_STORAGE_S3_REGIONENDPOINT": self.endpoint,
            "MODELREG_STORAGE_S3_ACCESSKEY": self.access_key,
            "MODELREG_STORAGE_S3_SECRETKEY": self.secret_key,
            "MODELREG_STORAGE_S3_CHUNKSIZE": str(PART_SIZE_MIN),
        }


class Replica:
    """One process. It has begun to start when this has been made.

    Args:
        log: its log, a file that is made.
        settings: variables, beside those of the bucket and the caller's own.
    """

    def __init__(self, bucket: Bucket, log: Path, settings: Mapping[str, str]) -> None:
        self.log = log
        self._address = ""
        self._is_ended = False
        command = [COMMAND, "serve", "--listen", "127.0.0.1:0", "--workers", "1"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--storage", f"s3://{bucket.name}"],
                env={**os.environ, "MODELREG_LOG_FORMATTER": "json", **bucket.environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it listens. Waits until it does.

        Raises:
            ClusterFailed: it ended, or takes too long.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._address:
            is_over = self._process.poll() is not None or time.monotonic() > deadline
            self._address = self._read_address()
            if is_over and not self._address:
                raise ClusterFailed(
                    f"a replica does not listen:\n{self.log.read_text(errors='replace')[-2000:]}"
                )
            if not self._address:
                time.sleep(_POLL_S)
        return f"http://{self._address}"

    def _read_address(self) -> str:
        for event in _events(self.log):
            if event.get("event") == "serving":
                return str(event["address"])
        return ""

    @property
    def memory_size(self) -> int:
        """Bytes of its resident set."""
        return self._status_bytes("VmRSS:")

    @property
    def memory_peak(self) -> int:
        """Bytes of the largest resident set it has had."""
        return self._status_bytes("VmHWM:")

    def _status_bytes(self, field_name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name))

    def kill(self) -> None:
        """SIGKILL: it ends in the middle of whatever it does."""
        self._is_ended = True
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM: it finishes what is under way.

        Raises:
            ClusterFailed: it had ended before, or does not end well.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise ClusterFailed(
                f"{self.log.name}: a replica did not stop within {_STOP_TIMEOUT_S} s"
            ) from None
        if status != 0:
            raise ClusterFailed(
                f"{self.log.name}: a replica ended with {status}\n{self.log.read_text()[-2000:]}"
            )

    def complaints(self) -> list[str]:
        """Lines of its log that a sound replica does not write."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            event = _parsed(line)
            is_error = (
                event.get("level") in {"error", "fatal"} or "traceback" in event or "Traceback (most" in line
            )
            if is_error:
                found.append(f"{self.log.name}: {line[:_LINE_LENGTH_MAX]}")
        return found


class Cluster:
    """N replicas, each in its place, and spare ones that wait to take a place.

    Everything blocks: in a coroutine `start` and `stop` belong into a thread. `kill` takes milliseconds.

    Args:
        folder: for the logs; made when it is not there.
        spares: processes that are started ahead, so that `start` need not wait for one.
        settings: variables of every replica, such as `{"MODELREG_MANIFESTS_ALLOWSPARSE": "true"}`.

    Attributes:
        bucket: that they share.
        proxy: gives each request to the next replica.
    """

    proxy: RoundRobin

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        *,
        replicas: int = 3,
        spares: int = 0,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.bucket = bucket
        self._folder = folder
        self._settings = settings or {}
        self._count = replicas
        self._spare_count = spares
        self._all: list[Replica] = []
        self._spares: list[Replica] = []
        self._places: list[Replica | None] = []
        self._running = ExitStack()
        # Several places may be started at the same time, each from a thread.
        self._beginning = threading.Lock()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._places = [self._begin() for _ in range(self._count)]
            self._spares = [self._begin() for _ in range(self._spare_count)]
            self.urls  # noqa: B018 - waits until all listen
            self.proxy = self._running.enter_context(round_robin(lambda: self.urls))
        except BaseException:
            self._kill_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()
        if error is not None:
            self._kill_all()
            error.add_note(
                "\n".join([f"logs of the replicas: {self._folder}", *self.complaints()[:_COMPLAINTS_SHOWN]])
            )
            return
        try:
            for replica in self._spares:
                replica.kill()
            for place in range(self._count):
                self.stop(place)
        finally:
            self._kill_all()
        if complaints := self.complaints():
            shown = "\n".join(complaints[:_COMPLAINTS_SHOWN])
            raise ClusterFailed(f"{len(complaints)} lines in the logs of the replicas:\n{shown}")

    def __len__(self) -> int:
        """Places, taken or not."""
        return self._count

    @property
    def url(self) -> str:
        """Of the proxy."""
        return self.proxy.url

    @property
    def urls(self) -> list[str]:
        """Of the replicas that are in their places."""
        return [replica.url for replica in self._places if replica is not None]

    def replica(self, place: int) -> Replica:
        """Raises: ClusterFailed: nobody is there."""
        replica = self._places[place]
        if replica is None:
            raise ClusterFailed(f"no replica is in place {place}: start it first")
        return replica

    def kill(self, place: int) -> None:
        """SIGKILL."""
        replica, self._places[place] = self.replica(place), None
        replica.kill()

    def stop(self, place: int) -> None:
        """SIGTERM, and wait until it has ended well. Nothing when nobody is there."""
        replica, self._places[place] = self._places[place], None
        if replica is not None:
            replica.stop()

    def start(self, place: int) -> None:
        """A spare one takes the place, where there is one, else a new one; it listens when this is over."""
        assert self._places[place] is None, f"place {place} is taken"
        with self._beginning:
            replica = self._spares.pop(0) if self._spares else self._begin()
            if len(self._spares) < self._spare_count:
                self._spares.append(self._begin())
        replica.url  # noqa: B018 - waits until it listens
        self._places[place] = replica

    def operate(self, *arguments: str, settings: Mapping[str, str] | None = None) -> str:
        """Run another command of the registry on the bucket, `garbage-collect` for one; what it printed.

        Raises:
            ClusterFailed: its exit status is not 0.
        """
        done = subprocess.run(
            [COMMAND, *arguments, "--storage", f"s3://{self.bucket.name}"],
            env={**os.environ, **self.bucket.environment, **self._settings, **(settings or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_OPERATION_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise ClusterFailed(
                f"{arguments} ended with {done.returncode}\n{done.stderr[-2000:]}{done.stdout[-2000:]}"
            )
        return done.stdout

    def complaints(self) -> list[str]:
        """Lines that a sound replica does not log, of all that there have been."""
        return [line for replica in self._all for line in replica.complaints()]

    def _begin(self) -> Replica:
        log = self._folder / f"replica-{len(self._all)}.log"
        replica = Replica(self.bucket, log, self._settings)
        self._all.append(replica)
        return replica

    def _kill_all(self) -> None:
        self._running.close()
        for replica in self._all:
            replica.kill()


@contextmanager
def running(folder: Path, **arguments: Any) -> Iterator[Cluster]:
    """A cluster over a fresh bucket of the tests' object store ($VERSITYGW or $S3_ENDPOINT). Arguments as `Cluster`."""
    # Here, because conformance has a store of its own and nothing of ours.
    from tests.replicas.store import fresh_bucket

    with fresh_bucket() as (bucket, _), Cluster(bucket, folder, **arguments) as cluster:
        yield cluster


def _events(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(errors="replace").splitlines():
        yield _parsed(line)


def _parsed(line: str) -> dict[str, Any]:
    """A log line; what is not whole, or not JSON, has no fields."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}

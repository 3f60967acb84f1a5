"""Servers on one object store: versitygw on this machine's disk, a bucket for each. What the store takes, both take alike.

Rows about redirects are of the servers that redirect; the others are passed over.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench import servers
from bench.figures import MIB, Measure, Target
from bench.servers import Place, Server
from bench.wire import Connection, Source
from bench.workloads import (
    GB,
    NAME,
    Figures,
    Material,
    Workload,
    cpu,
    memory_measures,
    peak_memory,
    rate,
    timed_pull,
    timed_push,
)

VERSITYGW_VERSION = "v1.8.0"
_BINARY = Path(f".cache/s3/versitygw-{VERSITYGW_VERSION}/versitygw")  # where `make test-s3` puts it

_WHOLE = "push of 1 GiB, one PUT"
_STREAM = "push of 1 GiB, one PATCH stream"
_STREAMED = "pull of 1 GiB, streamed"
_REDIRECTED = "pull of 1 GiB, redirected"
_WAIT_GROWS = "wait for the 201 of 4 GiB less that of 10 MiB"
_PULLS = 3
_PULLS_REDIRECTED = 15


def gateway() -> Path | None:
    """versitygw, built into `.cache` when it is not there; None without Go."""
    package = f"github.com/versity/versitygw/cmd/versitygw@{VERSITYGW_VERSION}"
    return servers.built(package, _BINARY, CGO_ENABLED="0")


@contextmanager
def store(binary: Path, scratch: Path) -> Iterator[Place]:
    """An object store that runs until the end of the block, over a folder below `scratch`."""
    folder = scratch / "s3"
    folder.mkdir()
    port = servers.free_port()
    keys = f"bench-{secrets.token_hex(8)}", secrets.token_hex(16)
    # It changes into its folder: all paths are absolute.
    command = [str(binary.resolve()), "--port", f"127.0.0.1:{port}", "--keep-alive", "--quiet"]
    # ETags by MD5 would be most of what a push costs, whoever pushes.
    command += ["posix", "--data-integrity-etag", str(folder.resolve())]
    log = scratch / "s3.log"
    with servers.started(command, log, {"ROOT_ACCESS_KEY": keys[0], "ROOT_SECRET_KEY": keys[1]}) as process:
        servers.wait_until(lambda: _listens(port), process, "versitygw listens")
        yield Place(
            folder,
            {"endpoint": f"http://127.0.0.1:{port}"},
            {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]},
        )


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def push_whole(server: Server, material: Material) -> Figures:
    return timed_push(server, material.large, Connection.push_whole, _WHOLE, "push")


def push_stream(server: Server, material: Material) -> Figures:
    return timed_push(server, material.large, Connection.push_stream, _STREAM)


def pull_streamed(server: Server, material: Material) -> Figures:
    return timed_pull(server, [material.large.blob()], _PULLS, _STREAMED, "pull")


def pull_redirected(server: Server, material: Material) -> Figures:
    """The median of many: the bytes come from the same store by the same path, whoever sent us there."""
    blob = material.large.blob()
    with Connection(server.url) as connection:
        connection.push_whole(NAME, blob)
        connection.check(NAME, blob.digest)
        if not connection.pull(NAME, blob.digest):
            print(f"{server.name} sends {blob.size} bytes itself: no figure for redirects", flush=True)
            return {}
        rates = []
        for _ in range(_PULLS_REDIRECTED):
            start = time.perf_counter()
            connection.pull(NAME, blob.digest)
            rates.append(blob.size / GB / (time.perf_counter() - start))
    return {_REDIRECTED: median(rates)}


def waits(server: Server, material: Material) -> Figures:
    """From the last byte that the client handed to its kernel to the 201, at the end of one PUT."""
    size = material.scale.large
    ms = {
        "10 MiB": _wait_ms(server, _source(material, "ten", 10 * MIB), times=9),
        "1 GiB": _wait_ms(server, material.large, times=3),
        "4 GiB": _wait_ms(server, _source(material, "larger", 4 * size), times=3),
    }
    figures = {_wait_for(what): wait for what, wait in ms.items()}
    return figures | {_WAIT_GROWS: ms["4 GiB"] - ms["10 MiB"]}


def memory(server: Server, material: Material) -> Figures:
    return peak_memory(server, [material.several.blob() for _ in range(16)])


def _wait_ms(server: Server, source: Source, *, times: int = 1) -> float:
    """The median of `times`, each when the like of it has been pushed and removed: see workloads.timed_push."""
    seconds = []
    with Connection(server.url) as connection:
        for _ in range(1 + times):
            seconds.append(connection.push_whole(NAME, source.blob()))
            server.remove_blobs()
    return median(seconds[1:]) * 1000


def _source(material: Material, name: str, size: int) -> Source:
    if name not in material.more:
        material.more[name] = Source(material.scratch / name, size)
    return material.more[name]


def _wait_for(what: str) -> str:
    return f"wait for the 201 of {what}"


def _wait(name: str, target: Target | None = None) -> Measure:
    return Measure(name, "ms", more_is_better=False, target=target)


# "Equal" in milliseconds: 10 MiB are answered in some thirty, of which a ratio would be noise. Nobody who has sent
# 4 GiB notices 50 more.
_EQUAL = Target("<=", 50, is_ratio=False)
_TENTH = Target("<=", 0.1)

WORKLOADS = (
    Workload("s3-push", (rate(_WHOLE, Target(">=", 1.5)), cpu("push")), push_whole),
    Workload("s3-push-stream", (rate(_STREAM, Target(">=", 1.5)),), push_stream),
    Workload("s3-pull", (rate(_STREAMED, Target(">=", 1.0)), cpu("pull")), pull_streamed),
    Workload("s3-redirect", (rate(_REDIRECTED, Target(">=", 1.0)),), pull_redirected, streams=False),
    Workload(
        "s3-wait",
        (
            _wait(_wait_for("10 MiB")),
            _wait(_wait_for("1 GiB"), _TENTH),
            _wait(_wait_for("4 GiB")),
            _wait(_WAIT_GROWS, _EQUAL),
        ),
        waits,
        rounds_max=3,
    ),
    # One worker takes all 16.
    Workload("s3-memory", memory_measures(200), memory, rounds_max=1, workers=1),
)

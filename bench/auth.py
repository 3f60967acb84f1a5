"""What authentication costs: rows about our own server, against itself. Another one is passed over.

A registry of its own is started for them, in which everybody may read and one user may write. So the same manifest is asked for
with credentials and without, and the same layer while others guess passwords and while they do not.
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import bcrypt

from bench.figures import Measure, Target
from bench.manifest_load import manifest_gets_per_second
from bench.servers import OURS, Candidate, Place, Server, running
from bench.views import knows_kits
from bench.wire import Connection
from bench.workloads import NAME, Figures, Material, Workload, push_model

_USER = "bench"
# htpasswd's default is 5; what is checked is remembered, so only the guesses pay for it.
_COST = 10
_TURNS = 4
_GUESSES_PER_SECOND = 100
_GUESSERS = 16

_BASIC = "manifest GETs by tag, with a password / without"
_BEARER = "manifest GETs by tag, with a token / without"
_GUESSED = "pull of 1 GiB, while 100 passwords a second are guessed / not"


def manifest_gets(server: Server, material: Material) -> Figures:
    """In turn, by everybody and by one who has logged in."""
    if not knows_kits(server):
        return {}
    with _guarded(material.scratch) as (url, authorization):
        with Connection(url, authorization) as connection:
            push_model(connection, material.small.blob(), "v1")
            scope = f"repository:{NAME}:pull"
            token = json.loads(connection.get(f"/v2/token?service=bench&scope={scope}"))["token"]
        target = f"{url}/v2/{NAME}/manifests/v1"
        rates: dict[str, list[float]] = {"": [], authorization: [], f"Bearer {token}": []}
        for _ in range(_TURNS):
            for credentials, seen in rates.items():
                seen.append(
                    manifest_gets_per_second(
                        target, material.scale.seconds / _TURNS, authorization=credentials
                    )
                )
    anonymous, basic, bearer = map(median, rates.values())
    return {_BASIC: basic / anonymous, _BEARER: bearer / anonymous}


def guessed(server: Server, material: Material) -> Figures:
    """From addresses of their own, as guessers have: to none of them is said to wait."""
    if not knows_kits(server):
        return {}
    blob = material.large.blob()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with _guarded(material.scratch) as (url, authorization):
        with Connection(url, authorization) as connection:
            connection.push_whole(NAME, blob)
            connection.check(NAME, blob.digest)
        with Connection(url) as connection:
            for number in range(_TURNS * 2):
                with _guessing(url) if (is_guessed := number % 2 == 1) else _nobody():
                    start = time.perf_counter()
                    connection.pull(NAME, blob.digest)
                    connection.pull(NAME, blob.digest)
                    seconds[is_guessed].append(time.perf_counter() - start)
    return {_GUESSED: median(seconds[False]) / median(seconds[True])}


@contextmanager
def _guarded(scratch: Path) -> Iterator[tuple[str, str]]:
    """Its URL, and the `Authorization` of the one who may write."""
    password = secrets.token_urlsafe(12)
    users, settings = scratch / "users", scratch / "guarded.yml"
    users.write_bytes(b"%s:%s\n" % (_USER.encode(), bcrypt.hashpw(password.encode(), bcrypt.gensalt(_COST))))
    everybody = {"anonymousPolicy": ["read"], "defaultPolicy": ["read", "create", "update", "delete"]}
    auth = {"htpasswd": {"path": str(users)}, "token": {"realm": "http://bench/v2/token", "service": "bench"}}
    settings.write_text(
        json.dumps({"auth": auth, "http": {"accessControl": {"repositories": {"**": everybody}}}})
    )
    command = f"{OURS} --config {settings}"
    with running(Candidate("guarded", command), Place(scratch), workers=2) as server:
        yield server.url, f"Basic {base64.b64encode(f'{_USER}:{password}'.encode()).decode()}"


@contextmanager
def _nobody() -> Iterator[None]:
    yield


@contextmanager
def _guessing(url: str) -> Iterator[None]:
    """By a process of its own, from when it has begun."""
    command = [sys.executable, "-m", "bench.auth", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guessing:
        try:
            assert guessing.stdout is not None
            guessing.stdout.readline()
            yield
        finally:
            guessing.terminate()


def _guess(url: str) -> None:
    """Until we are ended: wrong passwords of many users, each from another address of loopback."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    start = time.monotonic()

    def guess(number: int) -> None:
        time.sleep(max(0.0, start + number / _GUESSES_PER_SECOND - time.monotonic()))
        source = f"127.1.{number // 250 % 250}.{number % 250 + 1}"
        text = base64.b64encode(f"user-{number % 1000}:wrong".encode()).decode()
        request = (
            f"GET /v2/ HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nAuthorization: Basic {text}\r\n\r\n"
        )
        with socket.create_connection((host, port), timeout=60, source_address=(source, 0)) as connection:
            connection.sendall(request.encode())
            while connection.recv(65536):
                pass

    with ThreadPoolExecutor(_GUESSERS) as pool:
        number = 0
        while True:
            list(pool.map(guess, range(number, number + _GUESSES_PER_SECOND)))
            number += _GUESSES_PER_SECOND
            print(number, flush=True)


def _measure(name: str, limit: float) -> Measure:
    return Measure(name, "x", more_is_better=True, target=Target(">=", limit, is_ratio=False))


WORKLOADS = (
    Workload("auth", (_measure(_BASIC, 0.8), _measure(_BEARER, 0.8)), manifest_gets),
    Workload("guesses", (_measure(_GUESSED, 0.9),), guessed, rounds_max=3),
)

if __name__ == "__main__":
    _guess(sys.argv[1])

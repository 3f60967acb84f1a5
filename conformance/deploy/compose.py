"""The compose files, read by docker-compose; and what s3.yml puts together, without containers: nginx before three replicas."""

from __future__ import annotations

import hashlib
import http.client
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from conformance import official, toolbox
from conformance.clients.lab import CellFailed, Client, Lab, check, operation
from conformance.server import ServerFailed, free_port, object_store
from tests.replicas.cluster import Cluster, ClusterFailed

_FOLDER = toolbox.HERE.parent / "deploy" / "compose"
_IN_COMPOSE = "server registry:5000;"
_BLOB_SIZE = 100 * 1024 * 1024
_PIECE = 1024 * 1024
_TIMEOUT_S = 60
# Beside the two files themselves.
_SETTINGS = {"S3_BUCKET": "models", "S3_ENDPOINT": "https://s3.example"}

_NGINX_CONF = """\
daemon off;
user {user};
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/default.conf;
}}
"""


class Compose(Client):
    """Both files, and nginx.conf at work."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.compose = toolbox.debian_command("docker-compose")
        self.nginx = toolbox.debian_command("nginx")

    @operation("docker-compose config: folder.yml, s3.yml")
    def config(self) -> None:
        self.lab.run(self.compose, "--file", _FOLDER / "folder.yml", "config")
        said = self.lab.run(self.compose, "--file", _FOLDER / "s3.yml", "config", **_SETTINGS)
        check("replicas: 3" in said and "MODELREG_STORAGE_S3_BUCKET: models" in said, said)

    @operation("docker-compose config: s3.yml without a bucket is refused")
    def without_a_bucket(self) -> None:
        try:
            self.lab.run(
                self.compose, "--file", _FOLDER / "s3.yml", "config", S3_ENDPOINT="https://s3.example"
            )
        except CellFailed as error:
            check("name the bucket" in str(error), error)
        else:
            raise CellFailed("it is taken")

    @operation("nginx.conf before three replicas: the official suite")
    def official_suite(self) -> None:
        try:
            verdict = official.run(BehindNginx(self.nginx), official.DEV, self.lab.folder / "suite")
        except (ServerFailed, ClusterFailed) as error:
            raise CellFailed(str(error)) from error
        check(verdict.passed, *verdict.complaints)

    @operation(
        "nginx.conf before three replicas: a blob of 100 MiB in one request; a replica that is killed is not missed"
    )
    def large_blob(self) -> None:
        content = hashlib.shake_256(b"layer").digest(_PIECE) * (_BLOB_SIZE // _PIECE)
        try:
            with BehindNginx(self.nginx).started(self.lab.folder / "large") as (cluster, host):
                path = _push(host, content)
                cluster.kill(0)
                for _ in range(2 * len(cluster)):
                    check(_get(host, path) == content, "other bytes came back")
        except (ServerFailed, ClusterFailed) as error:
            raise CellFailed(str(error)) from error


@dataclass(frozen=True)
class BehindNginx:
    """Three replicas behind nginx, with the committed nginx.conf but for the addresses in it."""

    nginx: Path
    name: str = "ours, S3, 3 replicas behind nginx"
    login: tuple[str, str] | None = None
    finds_sources: bool = True

    @contextmanager
    def running(self, scratch: Path) -> Iterator[str]:
        """As `Subject.running`."""
        with self.started(scratch) as (_, host):
            yield host

    @contextmanager
    def started(self, scratch: Path) -> Iterator[tuple[Cluster, str]]:
        """The replicas, and `host:port` of nginx."""
        settings = {"MODELREG_LIMITS_TRUSTEDPROXIES": '["127.0.0.0/8"]'}
        with (
            object_store(scratch / "store") as bucket,
            Cluster(bucket, scratch / "replicas", replicas=3, settings=settings) as cluster,
        ):
            host = f"127.0.0.1:{free_port()}"
            folder = scratch / "nginx"
            self._write(folder, host, [urlsplit(url).netloc for url in cluster.urls])
            with Lab(host, folder).serving(self.nginx, "-c", folder / "nginx.conf", ask=lambda: _ask(host)):
                yield cluster, host

    @staticmethod
    def _write(folder: Path, host: str, replicas: list[str]) -> None:
        folder.mkdir()
        text = (_FOLDER / "nginx.conf").read_text()
        check(_IN_COMPOSE in text and "listen 5000;" in text, "nginx.conf names other addresses")
        text = text.replace(_IN_COMPOSE, " ".join(f"server {replica};" for replica in replicas))
        (folder / "default.conf").write_text(text.replace("listen 5000;", f"listen {host};"))
        user = "root" if os.geteuid() == 0 else "nobody"
        (folder / "nginx.conf").write_text(_NGINX_CONF.format(folder=folder, user=user))


def _ask(host: str) -> None:
    try:
        _get(host, "/v2/")
    except OSError as error:
        raise CellFailed(str(error)) from error


def _get(host: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        with connection.getresponse() as answer:
            content = answer.read()
            if answer.status == 307:  # the store sends large blobs itself
                place = urlsplit(answer.headers["Location"])
                return _get(place.netloc, f"{place.path}?{place.query}")
            check(answer.status == 200, f"GET {path}: status {answer.status}")
            return content
    finally:
        connection.close()


def _push(host: str, content: bytes) -> str:
    """The path of the blob."""
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v2/team/large/blobs/uploads/")
        with connection.getresponse() as answer:
            check(answer.status == 202, f"POST: status {answer.status}")
            place = urlsplit(answer.headers["Location"])
        query = "&".join(filter(None, (place.query, f"digest={digest}")))
        # In pieces of no announced length in all, as docker sends it.
        pieces = (content[start : start + _PIECE] for start in range(0, len(content), _PIECE))
        connection.request(
            "PUT",
            f"{place.path}?{query}",
            body=pieces,
            encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )
        with connection.getresponse() as answer:
            check(answer.status == 201, f"PUT: status {answer.status}")
    finally:
        connection.close()
    return f"/v2/team/large/blobs/{digest}"

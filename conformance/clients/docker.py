"""Docker, with an engine of our own."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from conformance import toolbox
from conformance.clients.lab import Client, Lab, check, file_in_tar, layer_tar, operation

# What Debian's docker command speaks; engines of today ask for more unless told.
_API_VERSION_MIN = "1.41"


class Engine(Client):
    """A client that has a Docker engine of its own: its own folders, no network, no rules in the kernel's tables."""

    # Slow, and works everywhere: overlayfs does not lie on top of overlayfs.
    storage_driver = "vfs"
    socket: Path

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.daemon = self.find_daemon()

    def find_daemon(self) -> Path:
        return toolbox.debian_command("dockerd")

    def before_daemon(self) -> tuple[str | Path, ...]:
        """A command that starts the engine's, which is appended to it, in its own place."""
        return ()

    def run(self, *arguments: str, stdin: bytes = b"") -> str:
        address = f"unix://{self.socket}"
        # BuildKit is a plug-in of the docker command's, which Debian has not.
        return self.lab.run("docker", *arguments, stdin=stdin, DOCKER_HOST=address, DOCKER_BUILDKIT="0")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The engine, from when it answers; what it stored goes with it."""
        with TemporaryDirectory(prefix="docker-", ignore_cleanup_errors=True) as name:
            # The path of a socket has 107 characters at most, and containerd's lies deep.
            short, data = Path(name), self.lab.folder / "data"
            self.socket = short / "docker.sock"
            folders = ("--data-root", data, "--exec-root", short / "exec", "--pidfile", short / "dockerd.pid")
            network = ("--bridge=none", "--iptables=false", "--ip6tables=false")
            command = (self.daemon, f"--storage-driver={self.storage_driver}", *folders, *network)
            address = ("-H", f"unix://{self.socket}")
            try:
                with self.lab.serving(
                    *self.before_daemon(),
                    *command,
                    *address,
                    ask=lambda: self.run("version"),
                    DOCKER_MIN_API_VERSION=_API_VERSION_MIN,
                ):
                    yield
            finally:
                shutil.rmtree(data, ignore_errors=True)


class Docker(Engine):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.image = f"{self.lab.host}/docker/image:v1"

    @operation("push")
    def push(self) -> None:
        self.run("import", "--change", "CMD /weights.bin", "-", self.image, stdin=layer_tar())
        self.run("push", self.image)

    @operation("pull by tag")
    def pull(self) -> None:
        identity = self.run("image", "inspect", "--format", "{{.Id}}", self.image)
        self.run("rmi", self.image)
        self.run("pull", self.image)
        check(
            self.run("image", "inspect", "--format", "{{.Id}}", self.image) == identity,
            "another image came back",
        )

    @operation("pull by digest")
    def pull_by_digest(self) -> None:
        digest = hashlib.sha256(self.lab.get("/v2/docker/image/manifests/v1")).hexdigest()
        self.run("rmi", self.image)
        said = self.run("pull", f"{self.lab.host}/docker/image@sha256:{digest}")
        check(digest in said, said)

    @operation("bytes of a file in the image")
    def content(self) -> None:
        self.run("pull", self.image)
        container = self.run("create", self.image).strip()
        self.run("cp", f"{container}:/weights.bin", "weights.bin")
        self.run("rm", container)
        check((self.lab.folder / "weights.bin").read_bytes() == file_in_tar(layer_tar()), "the file differs")

    @operation("push to another repository (mount)")
    def mounted(self) -> None:
        target = f"{self.lab.host}/docker/other:v1"
        self.run("tag", self.image, target)
        said = self.run("push", target)
        check("Mounted from" in said or "Layer already exists" in said, said)

    @operation("push --all-tags")
    def all_tags(self) -> None:
        self.run("tag", self.image, f"{self.lab.host}/docker/image:v2")
        self.run("push", "--all-tags", f"{self.lab.host}/docker/image")
        seen = json.loads(self.lab.get("/v2/docker/image/tags/list"))
        check(seen["tags"] == ["v1", "v2"], seen)

"""Docker, with an engine of our own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conformance import toolbox
from conformance.clients.lab import CellFailed, Client, Lab, check, file_in_tar, layer_tar, operation

_ENGINE_START_S = 60


class Docker(Client):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.daemon = toolbox.debian_command("dockerd")
        self.socket = self.lab.folder / "docker.sock"
        self.image = f"{self.lab.host}/docker/image:v1"

    def run(self, *arguments: str, stdin: bytes = b"") -> str:
        return self.lab.run("docker", *arguments, stdin=stdin, DOCKER_HOST=f"unix://{self.socket}")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """A Docker engine of our own: its own folders, no network, no rules in the kernel's tables."""
        log = self.lab.folder / "dockerd.log"
        command: list[str | Path] = [
            *(
                self.daemon,
                "--storage-driver=vfs",
                "--data-root",
                self.lab.folder / "data",
                "--exec-root",
                self.lab.folder / "exec",
            ),
            *("--pidfile", self.lab.folder / "dockerd.pid", "-H", f"unix://{self.socket}"),
            *("--bridge=none", "--iptables=false", "--ip6tables=false"),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            deadline = time.monotonic() + _ENGINE_START_S
            while True:
                try:
                    self.run("version")
                    break
                except CellFailed as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        said = log.read_text(errors="replace")[-800:]
                        raise CellFailed(f"the Docker engine does not start: {error}: {said}") from error
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

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

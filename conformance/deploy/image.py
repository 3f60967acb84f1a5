"""deploy/Dockerfile, built and run by a real Docker engine as docs/operations.md says: no root, nothing written but the volume."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from conformance import toolbox
from conformance.clients.docker import Engine
from conformance.clients.lab import CellFailed, Lab, check, layer_tar, operation
from conformance.deploy.base import make_base
from conformance.deploy.unit import seccomp_profile
from conformance.server import object_store

_BASE, _IMAGE, _AGAIN = "python-base", "modelkit-registry", "modelkit-registry-again"
_ON_FOLDER, _ON_S3, _AS_UNIT, _VOLUME = "registry", "registry-s3", "registry-unit", "registry"
_BUILD_TIMEOUT_S = 600
_SOON_S = 60
# As docs/operations.md has it, but for the network: this engine has no bridge.
_LOCKED = ("--network=host", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")


class Image(Engine):
    """The image, built twice, run on a volume and on an object store, stopped in the middle of a push and started again.

    Attributes:
        size: what to say of it; "" before it is built.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.size = ""
        self._source = lab.folder / "source"
        self.pushed = f"{lab.host}/team/image:v1"
        if "overlay" not in lab.run("stat", "--file-system", "--format=%T", str(lab.folder)):
            # Each step of a build is then a folder of what it changed, and no copy of everything.
            self.storage_driver = "overlay2"

    @contextmanager
    def ready(self) -> Iterator[None]:
        with super().ready():
            try:
                yield
            finally:
                for container in (_ON_FOLDER, _ON_S3, _AS_UNIT):
                    with suppress(CellFailed):
                        self.run("rm", "--force", "--volumes", container)
                # The engine keeps the host's network mounted there, and does not let go of it by itself.
                with suppress(CellFailed):
                    self.lab.run("umount", self.socket.parent / "exec" / "netns" / "default")

    @operation("docker build")
    def build(self) -> None:
        self._copy_source()
        self.run("import", str(make_base()), _BASE)
        self._build(_IMAGE)
        whole, base = (self._ask(image, "{{.Size}}") for image in (_IMAGE, _BASE))
        self.size = f"{whole / 1e6:.0f} MB, of which the base has {base / 1e6:.0f}"

    @operation("docker build, again: the same layers to the bit")
    def build_again(self) -> None:
        self._build(_AGAIN, "--no-cache")
        first, second = (self._ask(image, "{{json .RootFS.Layers}}") for image in (_IMAGE, _AGAIN))
        check(first == second, first, second)

    @operation("docker run: read-only, no root, no capabilities; healthy")
    def start(self) -> None:
        self._start(_ON_FOLDER, f"--volume={_VOLUME}:/var/lib/modelkit-registry")
        check(self.run("exec", _ON_FOLDER, "id", "-u").strip() == "10001", "it runs as another user")
        status = self.run("exec", _ON_FOLDER, "cat", "/proc/1/status")
        check("CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status, status)

    @operation("docker push into the container, docker pull")
    def push_and_pull(self) -> None:
        self.run("import", "--change", "CMD /weights.bin", "-", self.pushed, stdin=layer_tar())
        self.run("push", self.pushed)
        self._pull()

    @operation("docker stop in the middle of a push: it is finished, exit status 0")
    def stop(self) -> None:
        push = HalfAPush(self.lab.host)
        stopping = threading.Thread(target=self._stop, args=(_ON_FOLDER,))
        stopping.start()
        try:
            _wait(lambda: "drain.started" in self._log(_ON_FOLDER), "it does not drain")
            push.finish()
        finally:
            stopping.join()
        status = self._ask(_ON_FOLDER, "{{.State.ExitCode}}", "container")
        check(status == 0, f"exit status {status}", self._log(_ON_FOLDER)[-300:])

    @operation("docker start: what was pushed is still there")
    def start_again(self) -> None:
        self.run("start", _ON_FOLDER)
        self._wait_until_healthy(_ON_FOLDER)
        self._pull()
        self._stop(_ON_FOLDER)

    @operation(
        "docker run within what the systemd unit lets it ask of the kernel: healthy, docker push, pull"
    )
    def within_the_unit(self) -> None:
        profile = self.lab.folder / "seccomp.json"
        profile.write_text(json.dumps(seccomp_profile()))
        self._start(_AS_UNIT, f"--security-opt=seccomp={profile}")
        status = self.run("exec", _AS_UNIT, "cat", "/proc/1/status")
        check("Seccomp:\t2" in status, status)
        self.run("push", self.pushed)
        self._pull()
        self._stop(_AS_UNIT)

    @operation("docker run on an object store: healthy, docker push, pull")
    def on_s3(self) -> None:
        with object_store(self.lab.folder / "s3") as bucket:
            settings = {**bucket.environment, "MODELREG_STORAGE_S3_BUCKET": bucket.name}
            self._start(_ON_S3, *(f"--env={name}={text}" for name, text in settings.items()))
            self.run("push", self.pushed)
            self._pull()
            self._stop(_ON_S3)

    def _copy_source(self) -> None:
        """What .dockerignore lets through, as it is now: two builds are of the same files, whoever edits them meanwhile."""
        root = toolbox.HERE.parent
        let_through = (root / ".dockerignore").read_text().splitlines()
        names = [line.removeprefix("!") for line in let_through if line.startswith("!")]
        for name in (*names, ".dockerignore", "deploy/Dockerfile"):
            source, target = root / name, self._source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)

    def _build(self, name: str, *options: str) -> None:
        """Not by `run`: it takes longer than what a client does."""
        base = ("--network=host", f"--build-arg=PYTHON_IMAGE={_BASE}")
        what = ("--file", self._source / "deploy" / "Dockerfile", "--tag", name, self._source)
        try:
            run = subprocess.run(
                ("docker", "build", *base, *options, *what),
                env=self.lab.environment(DOCKER_HOST=f"unix://{self.socket}", DOCKER_BUILDKIT="0"),
                capture_output=True,
                text=True,
                timeout=_BUILD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CellFailed(f"docker build: longer than {_BUILD_TIMEOUT_S} s") from error
        (self.lab.folder / f"{name}.log").write_text(run.stdout)
        check(run.returncode == 0, run.stdout[-250:], run.stderr[-250:])

    def _start(self, container: str, *options: str) -> None:
        address = f"--env=MODELREG_HTTP_ADDR={self.lab.host}"
        # The image's own check, asked sooner than every ten seconds.
        often = "--health-interval=2s"
        self.run("run", "--detach", f"--name={container}", *_LOCKED, often, address, *options, _IMAGE)
        self._wait_until_healthy(container)

    def _stop(self, container: str) -> None:
        self.run("stop", "--time=70", container)

    def _wait_until_healthy(self, container: str) -> None:
        def is_healthy() -> bool:
            state = self._ask(container, "{{json .State}}", "container")
            check(state["Running"], "it has ended", self._log(container)[-300:])
            return bool(state["Health"]["Status"] == "healthy")

        _wait(is_healthy, "it does not become healthy")

    def _pull(self) -> None:
        identity = self.run("image", "inspect", "--format={{.Id}}", self.pushed)
        self.run("rmi", self.pushed)
        self.run("pull", self.pushed)
        same = self.run("image", "inspect", "--format={{.Id}}", self.pushed) == identity
        check(same, "another image came back")

    def _ask(self, name: str, template: str, kind: str = "image") -> Any:  # noqa: ANN401 - as the template says
        return json.loads(self.run(kind, "inspect", f"--format={template}", name))

    def _log(self, container: str) -> str:
        # What the registry logs it writes to standard error, and `docker logs` keeps the two apart.
        return self.lab.run("sh", "-c", f"docker logs {container} 2>&1", DOCKER_HOST=f"unix://{self.socket}")


class HalfAPush:
    """A blob of which the first half has been sent."""

    def __init__(self, host: str) -> None:
        self._content = layer_tar()
        self._connection = http.client.HTTPConnection(host, timeout=_SOON_S)
        self._connection.request("POST", "/v2/team/slow/blobs/uploads/")
        with self._connection.getresponse() as answer:
            place = urlsplit(answer.headers["Location"])
        digest = hashlib.sha256(self._content).hexdigest()
        query = "&".join(filter(None, (place.query, f"digest=sha256:{digest}")))
        self._connection.putrequest("PUT", f"{place.path}?{query}")
        self._connection.putheader("Content-Type", "application/octet-stream")
        self._connection.putheader("Content-Length", str(len(self._content)))
        self._connection.endheaders(self._content[: len(self._content) // 2])

    def finish(self) -> None:
        """Send the rest.

        Raises:
            CellFailed: it is not taken.
        """
        self._connection.send(self._content[len(self._content) // 2 :])
        with self._connection.getresponse() as answer:
            check(answer.status == 201, f"status {answer.status}", answer.read())
        self._connection.close()


def _wait(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _SOON_S
    while not is_so():
        check(time.monotonic() < deadline, f"{otherwise} within {_SOON_S} s")
        time.sleep(0.2)

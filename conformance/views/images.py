"""The image views, for programs that know images: engines, containerd, and what copies images about."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from conformance import toolbox
from conformance.clients.docker import Engine
from conformance.clients.lab import Client, check, operation
from conformance.views.kit import COMPRESSIONS, MODEL_SLICE, MODELPACK_TAG, OWNER_ONLY, TAG, KitLab

# An image holds what its container would see of these, too; a kit has nothing of that name.
_NOT_OF_THE_KIT = ("dev", "etc", "proc", "sys", ".dockerenv")


class Docker(Engine):
    """Docker as Debian has it: it keeps images its own way and, like all before 23, knows no zstd layers."""

    lab: KitLab

    @operation("pull, create, cp: the kit")
    def whole(self) -> None:
        self.check_image(f"{TAG}.as.image", "")

    @operation("pull, create, cp: only the model")
    def slice(self) -> None:
        self.check_image(f"{MODEL_SLICE.tag}.as.image", *MODEL_SLICE.prefixes)

    @operation("build, COPY --from= only the model")
    def build(self) -> None:
        context = self.lab.folder / "context"
        context.mkdir()
        image = f"{self.lab.repository}:{MODEL_SLICE.tag}.as.image"
        (context / "Dockerfile").write_text(f"FROM scratch\nCOPY --from={image} /model /opt/model\n")
        self.run("build", "-t", "built", str(context))
        self.copy_out("built", "/opt/model", "built/model", "/no-command")
        self.lab.check_files("built", "model/")

    @operation("pull, create, cp: gzip layers")
    def gzip(self) -> None:
        self.check_image("gzip.as.image", "")

    @operation("pull, create, cp: zstd layers, inflated (.as.readable)")
    def inflated(self) -> None:
        self.check_image("zstd.as.readable", "")

    def check_image(self, tag: str, *prefixes: str) -> None:
        image = f"{self.lab.repository}:{tag}"
        self.run("pull", image)
        self.copy_out(image, "/", tag)
        for name in _NOT_OF_THE_KIT:
            path = self.lab.folder / tag / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.lab.check_files(tag, *prefixes)
        self.run("rmi", image)
        shutil.rmtree(self.lab.folder / tag)

    def copy_out(self, image: str, source: str, target: str, *command: str) -> None:
        """`source`, a folder in an image, as the folder `target` here.

        Args:
            command: for an image that names none; nothing is run.
        """
        (self.lab.folder / target).parent.mkdir(exist_ok=True)
        container = self.run("create", image, *command).strip()
        self.run("cp", f"{container}:{source}", target)
        self.run("rm", container)


class DockerContainerd(Docker):
    """Docker as it is today: its images are containerd's."""

    storage_driver = "native"

    def find_daemon(self) -> Path:
        toolbox.debian_command("ctr")  # brings containerd, which the engine starts
        return toolbox.go_tool("dockerd")

    @operation("pull, create, cp: zstd layers")
    def zstd(self) -> None:
        self.check_image("zstd.as.image", "")


class Containerd(Client):
    """containerd by itself, as a node of a cluster has it."""

    lab: KitLab
    socket: Path

    def __init__(self, lab: KitLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.debian_command("ctr")

    def run(self, *arguments: str | Path) -> str:
        return self.lab.run(self.tool, "--address", self.socket, *arguments)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """containerd, from when it answers; what it stored goes with it."""
        config, root = self.lab.folder / "containerd.toml", self.lab.folder / "root"
        config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        with TemporaryDirectory(prefix="containerd-", ignore_cleanup_errors=True) as name:
            # The path of a socket has 107 characters at most.
            self.socket = Path(name) / "containerd.sock"
            folders = ("--root", root, "--state", Path(name) / "state")
            daemon = (self.tool.with_name("containerd"), "--config", config, *folders)
            try:
                with self.lab.serving(*daemon, "--address", self.socket, ask=lambda: self.run("version")):
                    yield
            finally:
                shutil.rmtree(root, ignore_errors=True)

    @operation("pull, mount: the kit")
    def whole(self) -> None:
        self.check_mounted(f"{TAG}.as.image", "")

    @operation("pull, mount: only the model")
    def slice(self) -> None:
        self.check_mounted(f"{MODEL_SLICE.tag}.as.image", *MODEL_SLICE.prefixes)

    @operation("pull, mount: gzip and zstd layers")
    def compressed(self) -> None:
        for compression in COMPRESSIONS:
            self.check_mounted(f"{compression}.as.image", "")

    def check_mounted(self, tag: str, *prefixes: str) -> None:
        image = f"{self.lab.repository}:{tag}"
        place = self.lab.folder / tag
        place.mkdir()
        # overlayfs does not lie on top of overlayfs.
        snapshotter = ("--snapshotter", "native")
        self.run("images", "pull", "--plain-http", *snapshotter, image)
        self.run("images", "mount", *snapshotter, image, place)
        try:
            self.lab.check_files(tag, *prefixes)
        finally:
            self.run("images", "unmount", "--rm", *snapshotter, place)


class Podman(Client):
    lab: KitLab
    short: Path

    def __init__(self, lab: KitLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.debian_command("podman")
        # Where it is told to look for credentials there must be some.
        credentials = self.lab.folder / "docker" / "config.json"
        credentials.parent.mkdir()
        credentials.write_text("{}")

    def run(self, *arguments: str) -> str:
        folders = [
            word
            for option, folder in (
                ("--root", self.lab.folder / "root"),
                ("--runroot", self.short / "run"),
                ("--tmpdir", self.short / "tmp"),
            )
            for word in (option, folder)
        ]
        drivers = ("--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none")
        return self.lab.run(self.tool, *folders, *drivers, *arguments)

    @contextmanager
    def ready(self) -> Iterator[None]:
        # podman takes a run root of 50 characters at most.
        with TemporaryDirectory(prefix="podman-", ignore_cleanup_errors=True) as name:
            self.short = Path(name)
            try:
                yield
            finally:
                shutil.rmtree(self.lab.folder / "root", ignore_errors=True)

    @operation("pull, image mount: the kit")
    def whole(self) -> None:
        self.check_mounted(f"{TAG}.as.image", "")

    @operation("pull, image mount: only the model")
    def slice(self) -> None:
        self.check_mounted(f"{MODEL_SLICE.tag}.as.image", *MODEL_SLICE.prefixes)

    @operation("pull, image mount: gzip and zstd layers")
    def compressed(self) -> None:
        for compression in COMPRESSIONS:
            self.check_mounted(f"{compression}.as.image", "")

    @operation("pull, image mount: a ModelPack that was pushed")
    def modelpack(self) -> None:
        self.check_mounted(f"{MODELPACK_TAG}.as.image", "")

    @operation("pull, image mount: readable by all")
    def readable(self) -> None:
        image = self.check_mounted(f"{TAG}.as.readable", "", keep=True)
        place = Path(self.run("image", "mount", image).strip())
        modes = {
            path.relative_to(place).as_posix(): path.stat().st_mode & 0o777
            for path in place.rglob("*")
            if not path.is_symlink()
        }
        wanted = {path: 0o755 if (place / path).is_dir() else 0o644 for path in modes}
        check(modes == wanted and OWNER_ONLY in modes, {path: oct(mode) for path, mode in modes.items()})

    def check_mounted(self, tag: str, *prefixes: str, keep: bool = False) -> str:
        """Pull and look into it; gives the image's name."""
        image = f"{self.lab.repository}:{tag}"
        self.run("pull", "--quiet", "--tls-verify=false", image)
        place = self.run("image", "mount", image).strip()
        self.lab.check_files(place, *prefixes)
        self.run("image", "unmount", image)
        if not keep:
            self.run("rmi", image)
        return image


class Skopeo(Client):
    lab: KitLab

    def __init__(self, lab: KitLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.debian_command("skopeo")

    def copy(self, source: str, target: str, *options: str) -> None:
        insecure = ("--src-tls-verify=false", "--dest-tls-verify=false")
        self.lab.run(self.tool, "--insecure-policy", "copy", *insecure, *options, source, target)

    def copy_here(self, tag: str) -> Path:
        """What a tag names, as a folder of its manifest and blobs."""
        self.copy(f"docker://{self.lab.repository}:{tag}", f"dir:{tag}")
        return self.lab.folder / tag

    @operation("copy a slice")
    def slice(self) -> None:
        check_layers(self.lab, self.copy_here(MODEL_SLICE.tag), *MODEL_SLICE.prefixes)

    @operation("copy the image")
    def image(self) -> None:
        folder = self.copy_here(f"{TAG}.as.image")
        check_layers(self.lab, folder, "")
        check(_modes(folder)[OWNER_ONLY] == 0o600, "the image changed modes; that is .as.readable's")

    @operation("copy an image to another repository, and from there")
    def pushed(self) -> None:
        elsewhere = f"docker://{self.lab.host}/skopeo/image:v1"
        self.copy(f"docker://{self.lab.repository}:{MODEL_SLICE.tag}.as.image", elsewhere, "--all")
        self.copy(elsewhere, "dir:pushed")
        check_layers(self.lab, self.lab.folder / "pushed", *MODEL_SLICE.prefixes)

    @operation("copy the image readable by all")
    def readable(self) -> None:
        folder = self.copy_here(f"{TAG}.as.readable")
        check_layers(self.lab, folder, "")
        check(set(_modes(folder).values()) == {0o644, 0o755}, _modes(folder))
        check(_modes(folder)[OWNER_ONLY] == 0o644, _modes(folder))


def check_layers(lab: KitLab, folder: Path, *prefixes: str) -> None:
    """Unpacked, the layers of what skopeo copied into a folder give a part of the kit."""
    target = folder.with_name(f"{folder.name}.files")
    for layer in _layers(folder):
        with tarfile.open(layer) as tar:
            tar.extractall(target, filter="data")
    lab.check_files(target, *prefixes)


def _layers(folder: Path) -> list[Path]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [folder / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]


def _modes(folder: Path) -> dict[str, int]:
    """The permission bits of all that is in the layers that skopeo copied, by path."""
    found: dict[str, int] = {}
    for layer in _layers(folder):
        with tarfile.open(layer) as tar:
            found |= {member.name: member.mode & 0o777 for member in tar}
    return found

"""Slices and the ModelPack view, for programs that know OCI artifacts, ModelKits or ModelPacks."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

from conformance import toolbox
from conformance.clients.lab import CellFailed, Client, check, digests, operation
from conformance.views.kit import (
    CSV_SLICE,
    KITCLIENT,
    MODEL_SLICE,
    MODELPACK_TAG,
    PROMPTS_SLICE,
    SLICES,
    TAG,
    KitLab,
    Slice,
)


class KitClient(Client):
    lab: KitLab

    def unpack(self, tag: str, folder: str, *options: str) -> None:
        reference = f"{self.lab.repository}:{tag}"
        self.lab.run(KITCLIENT, "unpack", reference, "-d", folder, *options, "--config", "store")

    @operation("a slice of every selector is what unpack --filter gives")
    def slices(self) -> None:
        for part in SLICES:
            self.unpack(part.tag, "sliced")
            self.unpack(TAG, "filtered", "--filter", part.filters)
            self.lab.check_files("sliced", *part.prefixes)
            self.lab.check_files("filtered", *part.prefixes)
            for folder in ("sliced", "filtered"):
                shutil.rmtree(self.lab.folder / folder)

    @operation("a slice of two parts")
    def two_parts(self) -> None:
        self.unpack(f"{TAG}.only.docs.datasets_test", "two")
        self.lab.check_files("two", "docs/", "README.md", *CSV_SLICE.prefixes)

    @operation("a slice of a ModelPack that was pushed")
    def modelpack(self) -> None:
        self.unpack(f"{MODELPACK_TAG}.only.datasets_test", "of-a-pack")
        self.lab.check_files("of-a-pack", *CSV_SLICE.prefixes)

    @operation("single files (--path)")
    def single_files(self) -> None:
        self.unpack(TAG, "single", "--path", "model/*.json")
        seen = digests(self.lab.folder / "single", without=("Kitfile",))
        check(
            seen == {path: digest for path, digest in self.lab.kit.files.items() if _is_json_of_model(path)},
            seen,
        )


class KitOps(Client):
    """`kit`, which cannot be installed from a package registry: only where it is on the PATH."""

    lab: KitLab

    def unpack(self, part: Slice) -> None:
        reference = f"{self.lab.repository}:{part.tag}"
        self.lab.run("kit", "unpack", "--plain-http", reference, "-d", "sliced", "--config", "store")
        self.lab.check_files("sliced", *part.prefixes)
        shutil.rmtree(self.lab.folder / "sliced")

    @operation("unpack of every slice but prompts")
    def slices(self) -> None:
        for part in SLICES:
            if part is not PROMPTS_SLICE:
                self.unpack(part)

    @operation("unpack of prompts, as far as this kit knows them")
    def prompts(self) -> None:
        try:
            self.lab.run("kit", "unpack", "--plain-http", f"{self.lab.repository}:{TAG}", "-d", "whole")
        except CellFailed:
            return  # before 1.10 it fails at any kit that has them
        self.unpack(PROMPTS_SLICE)


class Modctl(Client):
    """CNCF ModelPack's own command, which is not on the module proxy: only where it is on the PATH."""

    lab: KitLab

    def pull(self, tag: str) -> None:
        options = ("--plain-http", "--no-progress", "--extract-from-remote", "--extract-dir", tag)
        folders = ("--storage-dir", self.lab.folder / "store", "--log-dir", self.lab.folder / "log")
        self.lab.run("modctl", "pull", *options, *folders, f"{self.lab.repository}:{tag}")

    @operation("pull the ModelPack view")
    def whole(self) -> None:
        self.pull(f"{TAG}.as.modelpack")
        self.lab.check_files(f"{TAG}.as.modelpack", "")

    @operation("pull the ModelPack view of the model")
    def slice(self) -> None:
        self.pull(f"{MODEL_SLICE.tag}.as.modelpack")
        self.lab.check_files(f"{MODEL_SLICE.tag}.as.modelpack", *MODEL_SLICE.prefixes)


class Oras(Client):
    lab: KitLab

    def __init__(self, lab: KitLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("oras")

    def check_pulled(self, reference: str) -> None:
        folder = self.lab.folder / "pulled"
        self.lab.run(self.tool, "pull", "--plain-http", "-o", folder, reference)
        self.lab.check_files(folder, "")
        shutil.rmtree(folder)

    @operation("pull the ModelPack view")
    def modelpack(self) -> None:
        self.check_pulled(f"{self.lab.repository}:{TAG}.as.modelpack")

    @operation("pull the ModelPack view of gzip layers")
    def compressed(self) -> None:
        self.check_pulled(f"{self.lab.repository}:gzip.as.modelpack")

    @operation("cp the ModelPack view to another repository, pull it there")
    def pushed(self) -> None:
        pack = f"{self.lab.host}/oras/pack:v1"
        plain = ("--from-plain-http", "--to-plain-http")
        self.lab.run(self.tool, "cp", *plain, f"{self.lab.repository}:{TAG}.as.modelpack", pack)
        self.check_pulled(pack)

    @operation("cp a slice")
    def slice(self) -> None:
        copy_with_oras(self.lab, self.tool, f"{self.lab.repository}:{MODEL_SLICE.tag}", "layout")
        check_layout(self.lab, "layout", *MODEL_SLICE.prefixes)


class Crane(Client):
    lab: KitLab

    def __init__(self, lab: KitLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("crane")

    @operation("pull a slice")
    def slice(self) -> None:
        self.lab.run(self.tool, "pull", "--format=oci", f"{self.lab.repository}:{MODEL_SLICE.tag}", "layout")
        check_layout(self.lab, "layout", *MODEL_SLICE.prefixes)

    @operation("copy a slice to another repository, pull it there")
    def pushed(self) -> None:
        elsewhere = f"{self.lab.host}/crane/slice:v1"
        self.lab.run(self.tool, "copy", f"{self.lab.repository}:{MODEL_SLICE.tag}", elsewhere)
        self.lab.run(self.tool, "pull", "--format=oci", elsewhere, "pushed")
        check_layout(self.lab, "pushed", *MODEL_SLICE.prefixes)

    @operation("export the image")
    def export(self) -> None:
        self.lab.run(self.tool, "export", f"{self.lab.repository}:{TAG}.as.image", "image.tar")
        with tarfile.open(self.lab.folder / "image.tar") as tar:
            tar.extractall(self.lab.folder / "image", filter="data")
        self.lab.check_files("image", "")

    @operation("validate --remote the image of gzip layers")
    def validate(self) -> None:
        # It takes every layer for gzip.
        said = self.lab.run(self.tool, "validate", "--remote", f"{self.lab.repository}:gzip.as.image")
        check("PASS" in said, said)


class Regctl(Client):
    lab: KitLab

    def __init__(self, lab: KitLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("regctl")

    def copy(self, source: str, target: str) -> None:
        settings = self.lab.folder / "regctl.json"
        settings.write_text(json.dumps({"hosts": {self.lab.host: {"tls": "disabled"}}}))
        self.lab.run(self.tool, "image", "copy", source, target, REGCTL_CONFIG=str(settings))

    @operation("image copy of a slice")
    def slice(self) -> None:
        self.copy(f"{self.lab.repository}:{MODEL_SLICE.tag}", "ocidir://layout:v1")
        check_layout(self.lab, "layout", *MODEL_SLICE.prefixes)

    @operation("image copy of a slice to another repository, and from there")
    def pushed(self) -> None:
        elsewhere = f"{self.lab.host}/regctl/slice:v1"
        self.copy(f"{self.lab.repository}:{MODEL_SLICE.tag}", elsewhere)
        self.copy(elsewhere, "ocidir://pushed:v1")
        check_layout(self.lab, "pushed", *MODEL_SLICE.prefixes)


def copy_with_oras(lab: KitLab, oras: Path, reference: str, layout: str) -> None:
    """A slice whole: `oras pull` writes only layers that have a file's name."""
    lab.run(oras, "cp", "--from-plain-http", reference, "--to-oci-layout", f"{layout}:v1")


def check_layout(lab: KitLab, name: str, *prefixes: str) -> None:
    """An OCI image layout holds one manifest with all its blobs, whose layers are a part of the kit."""
    blobs = lab.folder / name / "blobs" / "sha256"
    for path in blobs.iterdir():
        check(hashlib.sha256(path.read_bytes()).hexdigest() == path.name, path.name, "has other bytes")
    (listed,) = json.loads((blobs.parent.parent / "index.json").read_text())["manifests"]
    manifest = json.loads((blobs / _hex(listed)).read_text())
    wanted = {_hex(listed), *(_hex(blob) for blob in (manifest["config"], *manifest["layers"]))}
    check({path.name for path in blobs.iterdir()} == wanted, "other blobs than the manifest lists")
    for layer in manifest["layers"]:
        with tarfile.open(blobs / _hex(layer)) as tar:
            tar.extractall(lab.folder / f"{name}.files", filter="data")
    lab.check_files(f"{name}.files", *prefixes)


def _hex(descriptor: dict[str, str]) -> str:
    return descriptor["digest"].removeprefix("sha256:")


def _is_json_of_model(path: str) -> bool:
    return path.startswith("model/") and path.endswith(".json") and path.count("/") == 1

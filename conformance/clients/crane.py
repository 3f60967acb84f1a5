"""go-containerregistry's crane."""

from __future__ import annotations

import gzip
import hashlib
import json

from conformance import toolbox
from conformance.clients.lab import Client, Lab, check, file_in_tar, layer_tar, operation


class Crane(Client):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("crane")
        self.image, self.copied = f"{self.lab.host}/crane/image:v1", f"{self.lab.host}/crane/copied:v2"

    @operation("append")
    def append(self) -> None:
        (self.lab.folder / "layer.tar").write_bytes(layer_tar())
        self.lab.run(self.tool, "append", "-f", "layer.tar", "-t", self.image)

    @operation("pull (tarball, OCI layout), export")
    def pull(self) -> None:
        self.lab.run(self.tool, "pull", self.image, "image.tar")
        self.lab.run(self.tool, "pull", "--format=oci", self.image, "image.oci")
        self.lab.run(self.tool, "export", self.image, "exported.tar")
        check(
            file_in_tar((self.lab.folder / "exported.tar").read_bytes()) == file_in_tar(layer_tar()),
            "the file differs",
        )

    @operation("push (tarball, OCI layout)")
    def push(self) -> None:
        self.lab.run(self.tool, "push", "image.tar", f"{self.lab.host}/crane/pushed:v1")
        self.lab.run(self.tool, "push", "image.oci", f"{self.lab.host}/crane/pushed:v2")
        digests = {
            self.lab.run(self.tool, "digest", f"{self.lab.host}/crane/pushed:v2"),
            self.lab.run(self.tool, "digest", self.image),
        }
        check(len(digests) == 1, digests)

    @operation("validate --remote")
    def validate(self) -> None:
        said = self.lab.run(self.tool, "validate", "--remote", self.image)
        check("PASS" in said, said)

    @operation("copy between repositories")
    def copy(self) -> None:
        self.lab.run(self.tool, "copy", self.image, self.copied)
        check(
            self.lab.run(self.tool, "manifest", self.copied)
            == self.lab.run(self.tool, "manifest", self.image),
            "manifests differ",
        )

    @operation("tag, ls")
    def ls(self) -> None:
        self.lab.run(self.tool, "tag", self.copied, "v3")
        check(self.lab.run(self.tool, "ls", f"{self.lab.host}/crane/copied").split() == ["v2", "v3"], "tags")

    @operation("catalog")
    def catalog(self) -> None:
        names = self.lab.run(self.tool, "catalog", self.lab.host).split()
        check({"crane/copied", "crane/image", "crane/pushed"} <= set(names), names)

    @operation("blob")
    def blob(self) -> None:
        manifest = json.loads(self.lab.run(self.tool, "manifest", self.image))
        digest = manifest["layers"][0]["digest"]
        content = self.lab.run_for_bytes(self.tool, "blob", f"{self.lab.host}/crane/image@{digest}")
        check(f"sha256:{hashlib.sha256(content).hexdigest()}" == digest, "the blob differs")
        check(gzip.decompress(content) == layer_tar(), "the layer differs")

    @operation("delete")
    def delete(self) -> None:
        digest = self.lab.run(self.tool, "digest", self.copied).strip()
        self.lab.run(self.tool, "delete", f"{self.lab.host}/crane/copied@{digest}")
        check(self.lab.run(self.tool, "ls", f"{self.lab.host}/crane/copied").split() == [], "tags are left")

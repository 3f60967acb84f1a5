"""regclient's regctl."""

from __future__ import annotations

import json

from conformance import toolbox
from conformance.clients.lab import Client, Lab, check, layer_tar, operation


class Regctl(Client):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("regctl")
        self.image = f"{self.lab.host}/regctl/image:v1"

    def run(self, *arguments: str, stdin: bytes = b"") -> str:
        return self.lab.run(
            self.tool, *arguments, stdin=stdin, REGCTL_CONFIG=str(self.lab.folder / "regctl.json")
        )

    @operation("artifact put, get")
    def artifact(self) -> None:
        self.run("registry", "set", self.lab.host, "--tls", "disabled")
        self.run(
            "artifact",
            "put",
            "--artifact-type",
            "application/x.text",
            f"{self.lab.host}/regctl/artifact:v1",
            stdin=b"some text",
        )
        check(self.run("artifact", "get", f"{self.lab.host}/regctl/artifact:v1") == "some text", "the text")

    @operation("artifact put --subject, list")
    def referrers(self) -> None:
        subject = f"{self.lab.host}/regctl/artifact:v1"
        self.run(
            "artifact", "put", "--artifact-type", "application/x.sbom", "--subject", subject, stdin=b"{}"
        )
        listed = json.loads(self.run("artifact", "list", subject, "--format", "{{json .}}"))
        check([item["artifactType"] for item in listed["descriptors"]] == ["application/x.sbom"], listed)

    @operation("image create, mod, copy to an OCI layout")
    def to_layout(self) -> None:
        (self.lab.folder / "layer").mkdir()
        (self.lab.folder / "layer" / "weights.bin").write_bytes(layer_tar())
        self.run("image", "create", self.image)
        self.run("image", "mod", self.image, "--replace", "--layer-add", "dir=layer")
        self.run("image", "copy", self.image, "ocidir://layout:v1")

    @operation("image copy from an OCI layout")
    def from_layout(self) -> None:
        restored = f"{self.lab.host}/regctl/restored:v1"
        self.run("image", "copy", "ocidir://layout:v1", restored)
        check(
            self.run("manifest", "get", restored, "--format", "raw-body")
            == self.run("manifest", "get", self.image, "--format", "raw-body")
        )

    @operation("image copy --referrers")
    def copy(self) -> None:
        self.run(
            "image",
            "copy",
            "--referrers",
            f"{self.lab.host}/regctl/artifact:v1",
            f"{self.lab.host}/regctl/copied:v1",
        )
        listed = json.loads(
            self.run("artifact", "list", f"{self.lab.host}/regctl/copied:v1", "--format", "{{json .}}")
        )
        check(len(listed["descriptors"]) == 1, listed)

    @operation("index create, manifest head")
    def index(self) -> None:
        reference = f"{self.lab.host}/regctl/image:index"
        self.run("index", "create", reference, "--ref", self.image, "--platform", "linux/amd64")
        check(
            "index" in self.run("manifest", "head", reference, "--format", "{{.GetDescriptor.MediaType}}"),
            "no index",
        )

    @operation("blob put, get, delete")
    def blobs(self) -> None:
        digest = self.run("blob", "put", f"{self.lab.host}/regctl/artifact", stdin=b"a blob").strip()
        check(self.run("blob", "get", f"{self.lab.host}/regctl/artifact", digest) == "a blob", digest)
        self.run("blob", "delete", f"{self.lab.host}/regctl/artifact", digest)

    @operation("tag ls, rm")
    def tags(self) -> None:
        check(self.run("tag", "ls", f"{self.lab.host}/regctl/image").split() == ["index", "v1"], "tags")
        self.run("tag", "rm", f"{self.lab.host}/regctl/image:index")
        check(self.run("tag", "ls", f"{self.lab.host}/regctl/image").split() == ["v1"], "a tag is left")

    @operation("repo ls")
    def repositories(self) -> None:
        names = self.run("repo", "ls", self.lab.host).split()
        check({"regctl/artifact", "regctl/image", "regctl/restored"} <= set(names), names)

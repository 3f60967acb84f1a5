"""skopeo, from Debian."""

from __future__ import annotations

import hashlib
import json

from conformance import toolbox
from conformance.clients.lab import Client, Lab, check, layer_tar, operation


class Skopeo(Client):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.tool = toolbox.debian_command("skopeo")
        self.image = f"docker://{self.lab.host}/skopeo/image:v1"

    def seed(self) -> None:
        (self.lab.folder / "layer.tar").write_bytes(layer_tar())
        crane_tool = toolbox.go_tool("crane")
        self.lab.run(
            crane_tool,
            "append",
            "-f",
            "layer.tar",
            "--oci-empty-base",
            "-t",
            f"{self.lab.host}/skopeo/image:v1",
        )

    def run(self, *arguments: str) -> str:
        return self.lab.run(self.tool, "--insecure-policy", *arguments)

    @operation("copy to an OCI layout")
    def to_layout(self) -> None:
        self.seed()
        self.run("copy", "--src-tls-verify=false", self.image, "oci:layout:v1")

    @operation("copy from an OCI layout")
    def from_layout(self) -> None:
        self.run(
            "copy", "--dest-tls-verify=false", "oci:layout:v1", f"docker://{self.lab.host}/skopeo/restored:v1"
        )
        raw = self.run(
            "inspect", "--tls-verify=false", "--raw", f"docker://{self.lab.host}/skopeo/restored:v1"
        )
        check(raw == self.run("inspect", "--tls-verify=false", "--raw", self.image), "manifests differ")

    @operation("copy as Docker schema 2")
    def converted(self) -> None:
        target = f"docker://{self.lab.host}/skopeo/docker:v1"
        self.run(
            "copy",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            "--format",
            "v2s2",
            self.image,
            target,
        )
        raw = json.loads(self.run("inspect", "--tls-verify=false", "--raw", target))
        check(raw["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json", raw)

    @operation("inspect")
    def inspect(self) -> None:
        seen = json.loads(self.run("inspect", "--tls-verify=false", self.image))
        check(
            seen["Digest"]
            == f"sha256:{hashlib.sha256(self.lab.get('/v2/skopeo/image/manifests/v1')).hexdigest()}",
            seen,
        )

    @operation("list-tags")
    def list_tags(self) -> None:
        seen = json.loads(
            self.run("list-tags", "--tls-verify=false", f"docker://{self.lab.host}/skopeo/image")
        )
        check(seen["Tags"] == ["v1"], seen)

    @operation("delete")
    def delete(self) -> None:
        self.run("delete", "--tls-verify=false", f"docker://{self.lab.host}/skopeo/restored:v1")
        seen = json.loads(self.lab.get("/v2/skopeo/restored/tags/list"))
        check(seen["tags"] == [], seen)

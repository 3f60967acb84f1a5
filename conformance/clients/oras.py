"""The oras command: artifacts with files."""

from __future__ import annotations

import hashlib
import json

from conformance import toolbox
from conformance.clients.lab import Client, Lab, check, layer_tar, operation, tree


class Oras(Client):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.tool = toolbox.go_tool("oras")
        self.plain = "--plain-http"
        self.artifact = f"{self.lab.host}/oras/artifact:v1"
        self.files = {"model.bin": layer_tar(), "docs/readme.md": b"# A model\n", "empty": b""}

    @operation("push files")
    def push(self) -> None:
        for name, content in self.files.items():
            path = self.lab.folder / "pushed" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.lab.run(
            *(self.tool, "push", self.plain, "--artifact-type", "application/x.model", self.artifact),
            *("model.bin:application/octet-stream", "docs/readme.md:text/markdown", "empty:text/plain"),
            cwd=self.lab.folder / "pushed",
        )

    @operation("push and pull a folder")
    def push_folder(self) -> None:
        self.lab.run(self.tool, "push", self.plain, f"{self.lab.host}/oras/folder:v1", "pushed")
        self.lab.run(self.tool, "pull", self.plain, "-o", "pulled-folder", f"{self.lab.host}/oras/folder:v1")
        check(tree(self.lab.folder / "pulled-folder" / "pushed") == self.files, "the folder differs")

    @operation("pull")
    def pull(self) -> None:
        self.lab.run(self.tool, "pull", self.plain, "-o", "pulled", self.artifact)
        check(tree(self.lab.folder / "pulled") == self.files, "the files differ")

    @operation("attach")
    def attach(self) -> None:
        (self.lab.folder / "sbom.json").write_text("{}\n")
        self.lab.run(
            self.tool,
            "attach",
            self.plain,
            "--artifact-type",
            "application/x.sbom",
            self.artifact,
            "sbom.json:application/json",
        )
        self.lab.run(
            self.tool,
            "attach",
            self.plain,
            "--artifact-type",
            "application/x.note",
            self.artifact,
            "--annotation",
            "note=kept",
        )

    @operation("discover, by type")
    def discover(self) -> None:
        found = json.loads(self.lab.run(self.tool, "discover", self.plain, "--format", "json", self.artifact))
        types = sorted(item["artifactType"] for item in found["referrers"])
        check(types == ["application/x.note", "application/x.sbom"], types)
        one = self.lab.run(
            self.tool,
            "discover",
            self.plain,
            "--format",
            "json",
            "--artifact-type",
            "application/x.sbom",
            self.artifact,
        )
        check(len(json.loads(one)["referrers"]) == 1, one)

    @operation("cp -r between repositories")
    def copy(self) -> None:
        target = f"{self.lab.host}/oras/copied:v1"
        self.lab.run(self.tool, "cp", "-r", "--from-plain-http", "--to-plain-http", self.artifact, target)
        found = json.loads(self.lab.run(self.tool, "discover", self.plain, "--format", "json", target))
        check(len(found["referrers"]) == 2, found)
        check(
            self.lab.run(self.tool, "manifest", "fetch", self.plain, target)
            == self.lab.run(self.tool, "manifest", "fetch", self.plain, self.artifact),
            "manifests differ",
        )

    @operation("cp -r to an OCI layout and back")
    def layout(self) -> None:
        self.lab.run(
            self.tool, "cp", "-r", "--from-plain-http", "--to-oci-layout", self.artifact, "layout:v1"
        )
        self.lab.run(
            self.tool,
            "cp",
            "-r",
            "--from-oci-layout",
            "--to-plain-http",
            "layout:v1",
            f"{self.lab.host}/oras/restored:v1",
        )
        self.lab.run(self.tool, "pull", self.plain, "-o", "restored", f"{self.lab.host}/oras/restored:v1")
        check(tree(self.lab.folder / "restored") == self.files, "the files differ")

    @operation("tag, repo tags, repo ls")
    def listings(self) -> None:
        self.lab.run(self.tool, "tag", self.plain, self.artifact, "v2", "latest")
        check(
            self.lab.run(self.tool, "repo", "tags", self.plain, f"{self.lab.host}/oras/artifact").split()
            == ["latest", "v1", "v2"],
            "tags",
        )
        names = self.lab.run(self.tool, "repo", "ls", self.plain, self.lab.host).split()
        check({"oras/artifact", "oras/copied", "oras/folder", "oras/restored"} <= set(names), names)

    @operation("blob push, fetch, delete")
    def blobs(self) -> None:
        digest = f"sha256:{hashlib.sha256(b'a blob').hexdigest()}"
        (self.lab.folder / "blob").write_bytes(b"a blob")
        self.lab.run(self.tool, "blob", "push", self.plain, f"{self.lab.host}/oras/artifact", "blob")
        check(
            self.lab.run(
                self.tool, "blob", "fetch", self.plain, "-o", "-", f"{self.lab.host}/oras/artifact@{digest}"
            )
            == "a blob",
            "the blob",
        )
        self.lab.run(
            self.tool, "blob", "delete", self.plain, "--force", f"{self.lab.host}/oras/artifact@{digest}"
        )

    @operation("manifest delete")
    def delete(self) -> None:
        self.lab.run(self.tool, "manifest", "delete", self.plain, "--force", self.artifact)
        check(
            self.lab.run(self.tool, "repo", "tags", self.plain, f"{self.lab.host}/oras/artifact").split()
            == [],
            "tags are left",
        )

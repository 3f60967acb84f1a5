"""kitclient, by its command line, against registries that are not ours: CNCF Distribution and olareg; and ours, as the control.

A kit is packed, pushed, listed, pulled by another store, unpacked in part and in whole, tagged and removed; what comes out is
compared with what went in, byte for byte. A pull that is killed is done again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from conformance import toolbox
from conformance.clients.lab import Cell, CellFailed, Client, Lab, check, operation, run_client, tree
from conformance.server import ServerFailed, Subject, distribution, olareg, ours

_KITCLIENT = toolbox.HERE.parent / ".venv" / "bin" / "kitclient"
# Large enough that a kill finds the pull under way.
_MODEL_SIZE = 64 * 1024 * 1024

_KITFILE = """\
manifestVersion: 1.0.0
package:
  name: conformance
  version: 0.0.1
  authors: [Nobody]
model:
  name: weights
  path: model.bin
datasets:
  - name: train
    path: data/train
  - name: test
    path: data/test.csv
code:
  - path: src
docs:
  - path: README.md
"""


class KitClient(Client):
    """kitclient at work, in several stores: each is another machine."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.reference = f"{lab.host}/team/kit:v1"
        self.copied = f"{lab.host}/team/copy:v1"
        self.files = _make_kit(lab.folder / "source")

    def run(self, store: str, *arguments: str) -> str:
        """Standard output of a command that must succeed."""
        return self.lab.run(_KITCLIENT, *arguments, "--config", self.lab.folder / store)

    def check_files(self, folder: str, wanted: dict[str, bytes]) -> None:
        seen = tree(self.lab.folder / folder)
        seen.pop("Kitfile", None)
        check(seen == wanted, sorted(seen))

    @operation("pack, push")
    def pack_and_push(self) -> None:
        self.run("here", "pack", "source", "-t", self.reference)
        self.run("here", "push", self.reference, "--plain-http")

    @operation("list")
    def list_remote(self) -> None:
        listed = self.run("there", "list", f"{self.lab.host}/team/kit", "--plain-http", "--format", "json")
        check([row["tags"] for row in json.loads(listed)] == [["v1"]], listed)

    @operation("inspect, info")
    def inspect_remote(self) -> None:
        seen = json.loads(self.run("there", "inspect", "-r", self.reference, "--plain-http"))
        digest = hashlib.sha256(self._manifest("team/kit", "v1")).hexdigest()
        check(seen["digest"] == f"sha256:{digest}", seen)
        check("conformance" in self.run("there", "info", "-r", self.reference, "--plain-http"), "no Kitfile")

    @operation("unpack --filter")
    def unpack_part(self) -> None:
        filters = ("--filter", "model", "--filter", "datasets:train")
        self.run("there", "unpack", self.reference, "--plain-http", "-d", "part", *filters)
        wanted = {
            path: content
            for path, content in self.files.items()
            if path == "model.bin" or path.startswith("data/train/")
        }
        self.check_files("part", wanted)

    @operation("unpack")
    def unpack_all(self) -> None:
        self.run("there", "unpack", self.reference, "--plain-http", "-d", "whole")
        self.check_files("whole", self.files)
        check((self.lab.folder / "whole" / "Kitfile").read_bytes(), "no Kitfile")

    @operation("pull, then unpack")
    def pull(self) -> None:
        self.run("there", "pull", self.reference, "--plain-http")
        self.run("there", "unpack", self.reference, "-d", "from-store")
        self.check_files("from-store", self.files)

    @operation("pull after a kill")
    def killed_pull(self) -> None:
        store = self.lab.folder / "killed"
        process = subprocess.Popen(
            [_KITCLIENT, "pull", self.reference, "--plain-http", "--config", store],
            env=self.lab.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for_bytes(store, process)
        process.kill()
        process.wait()
        self.run("killed", "pull", self.reference, "--plain-http")
        self.run("killed", "unpack", self.reference, "-d", "after-kill")
        self.check_files("after-kill", self.files)

    @operation("tag, push")
    def push_tag(self) -> None:
        self.run("here", "tag", self.reference, f"{self.lab.host}/team/kit:v2")
        self.run("here", "push", f"{self.lab.host}/team/kit:v2", "--plain-http")
        check(self._manifest("team/kit", "v2") == self._manifest("team/kit", "v1"), "another manifest")

    @operation("push to another repository")
    def push_elsewhere(self) -> None:
        self.run("here", "push", self.reference, self.copied, "--plain-http")
        check(self._manifest("team/copy", "v1") == self._manifest("team/kit", "v1"), "another manifest")

    @operation("diff")
    def diff(self) -> None:
        said = self.run(
            "here", "diff", f"local://{self.reference}", f"remote://{self.copied}", "--plain-http"
        )
        check("identical" in said, said)

    @operation("remove -r")
    def remove(self) -> None:
        self.run("here", "remove", "-r", self.copied, "--plain-http")
        try:
            self._manifest("team/copy", "v1")
        except urllib.error.HTTPError as error:
            check(error.code == 404, error)
        else:
            raise CellFailed("the tag is still there")

    def _manifest(self, name: str, tag: str) -> bytes:
        return self.lab.get(
            f"/v2/{name}/manifests/{tag}", accept="application/vnd.oci.image.manifest.v1+json"
        )


def run_all(scratch: Path) -> Iterator[Cell]:
    for make in (distribution, olareg, ours):
        try:
            subject = make()
        except toolbox.ToolMissing as error:
            yield Cell("kitclient", f"against {make.__name__}", str(error))
        else:
            yield from run(subject, scratch / f"other-{make.__name__}")


def run(subject: Subject, scratch: Path) -> Iterator[Cell]:
    """Every operation against one registry."""
    tool = f"kitclient with {subject.name}"
    try:
        with subject.running(scratch / "server") as host:
            yield from run_client(KitClient, tool, Lab(host, scratch / "work"))
    except ServerFailed as error:
        yield Cell(tool, "the server", str(error))


def _make_kit(folder: Path) -> dict[str, bytes]:
    """A folder to pack: every kind of part, an empty file, a long name, a large model."""
    seed = hashlib.sha256(b"model").digest()
    files = {
        "model.bin": hashlib.shake_256(seed).digest(1024 * 1024) * (_MODEL_SIZE // (1024 * 1024)),
        "data/train/a.jsonl": b'{"x": 1}\n' * 1000,
        "data/train/sub/b.jsonl": b"",
        "data/test.csv": b"x,y\n1,2\n",
        "src/train.py": b"print('train')\n",
        f"src/{'long-name-' * 15}.txt": b"long\n",
        "README.md": "# Kit \N{LATIN SMALL LETTER U WITH DIAERESIS}\n".encode(),
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "Kitfile").write_text(_KITFILE)
    return files


def _wait_for_bytes(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the pull has written something, or is over already."""
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        # A file may be renamed between being listed and being looked at: then it is whole, which is too late to kill.
        with suppress(FileNotFoundError):
            if any(path.stat().st_size > 1024 * 1024 for path in folder.rglob("*") if path.is_file()):
                return
        time.sleep(0.005)

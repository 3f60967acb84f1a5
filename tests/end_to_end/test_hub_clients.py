"""The real clients of the Hugging Face Hub, unchanged, against a registry in a process of its own.

Their environments are made once, in .cache/hub-clients, from the package index. None of them is told more than HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from deploy import demo

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "hub-clients"
HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 600
RUN_TIMEOUT_S = 120

# Beside the oldest that is in use, the last of each major version.
HUGGINGFACE_HUB = [
    "huggingface_hub==0.23.5",
    "huggingface_hub==0.36.0",
    "huggingface_hub==1.5.0",
    "huggingface_hub>=2.4",
]
TRANSFORMERS = "transformers>=5"
LOADERS = ("safetensors", "numpy")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(INSTALL_TIMEOUT_S + RUN_TIMEOUT_S)]


@dataclass(frozen=True)
class Served:
    """A registry that has the kit as `demo/minilm` and as `team/deep/demo/minilm`."""

    host: str
    context: Path
    plan: dict[str, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hub")
    context = folder / "context"
    write_context(context)
    with pytest.MonkeyPatch.context() as patch, demo.registry(folder / "registry") as host:
        patch.setenv("KITCLIENT_HOME", str(folder / "client"))
        shallow, deep = f"{host}/demo/minilm:v1", f"{host}/team/deep/demo/minilm:v1"
        demo.client("pack", context, "-t", shallow)
        demo.client("tag", shallow, deep)
        demo.client("push", shallow)
        demo.client("push", deep)
        yield Served(host, context, plan_of(context, manifest_digest(host, "demo/minilm", "v1")))


def write_context(context: Path) -> None:
    """The demo's kit, with a dataset and a folder of documents."""
    with FileLock(demo.CACHE.parent / "demo.lock"):
        model = demo.fetch_model()
    demo.write_context(context, model)
    (context / "data").mkdir()
    (context / "data" / "train.csv").write_text("sentence,label\nPush once.,1\n")
    (context / "docs").mkdir()
    (context / "docs" / "guide.md").write_text("# Guide\n")
    with (context / "Kitfile").open("a") as kitfile:
        kitfile.write("  - path: docs/\ndatasets:\n  - name: train\n    path: data/train.csv\n")


def manifest_digest(host: str, name: str, tag: str) -> str:
    with urllib.request.urlopen(f"http://{host}/v2/{name}/manifests/{tag}") as reply:
        return str(reply.headers["Docker-Content-Digest"]).rpartition(":")[2]


def plan_of(context: Path, digest: str) -> dict[str, Any]:
    """What tests/end_to_end/hub_client.py is to find."""
    model = digests_of(context / "model")
    beside = {
        path: digest
        for path, digest in digests_of(context).items()
        if not path.startswith("model/") and path != "Kitfile"
    }
    weights = (context / "model" / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", weights)
    tensors = json.loads(weights[8 : 8 + size])
    tensors.pop("__metadata__", None)
    return {
        "repository": "demo/minilm",
        "dataset": ["demo/minilm", "data/train.csv", beside["data/train.csv"]],
        "files": beside | model,
        "tag": "v1",
        "digest": digest,
        "commit": digest[:40],
        "slice": "v1.only.model",
        "slice_files": model,
        "tensors": {name: [tensor["dtype"], tensor["shape"]] for name, tensor in tensors.items()},
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        "weights_size": len(weights),
        "weights_head": weights[:16].hex(),
        "weights_tail": weights[-16:].hex(),
    }


def digests_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Passes everything on to `host`, and breaks off the first answer with the weights in its midst.

    Attributes:
        resumed_at: where the requests begin that came after that and asked for a part of the weights.
    """

    daemon_threads = True
    # Clients write pieces of 10 MiB: of less than one nothing is kept.
    CUT_AFTER = 32 * 1024 * 1024

    def __init__(self, host: str) -> None:
        super().__init__(("127.0.0.1", 0), CuttingHandler)
        self.far = host.rpartition(":")
        self.is_cut = False
        self.resumed_at: list[int] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def note(self, request: bytes) -> bool:
        """Look at what a client sends; whether the answer to it is to be cut off."""
        if not re.match(rb"GET \S+/model\.safetensors ", request):
            return False
        asked = re.search(rb"\r\nrange: bytes=([0-9]+)-\r\n", request, re.IGNORECASE)
        if asked is not None:
            self.resumed_at.append(int(asked[1]))
        is_first, self.is_cut = not self.is_cut, True
        return is_first


class CuttingHandler(socketserver.BaseRequestHandler):
    server: CuttingProxy
    request: socket.socket

    def handle(self) -> None:
        host, _, port = self.server.far
        self.left: int | None = None
        with socket.create_connection((host, int(port))) as far, suppress(OSError):
            answers = threading.Thread(target=self.pass_answers, args=(far,))
            answers.start()
            while request := self.request.recv(1 << 16):
                if self.server.note(request):
                    self.left = self.server.CUT_AFTER
                far.sendall(request)
            far.shutdown(socket.SHUT_WR)
            answers.join()

    def pass_answers(self, far: socket.socket) -> None:
        with suppress(OSError):
            while answer := far.recv(1 << 16):
                if self.left is not None:
                    self.left -= len(answer)
                    if self.left < 0:
                        break
                self.request.sendall(answer)
        with suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting(host: str) -> Iterator[CuttingProxy]:
    with CuttingProxy(host) as proxy:
        serving = threading.Thread(target=proxy.serve_forever)
        serving.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            serving.join()


def environment(*requirements: str) -> Path:
    """The interpreter of an environment that has these, and nothing of ours."""
    name = "".join(character if character.isalnum() else "-" for character in requirements[0])
    folder = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not (folder / ".whole").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [
                folder / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ]
            subprocess.run([*pip, *requirements], check=True, timeout=INSTALL_TIMEOUT_S)
            (folder / ".whole").touch()
    return folder / "bin" / "python"


def run(python: Path, script: str, *arguments: str, endpoint: str, home: Path) -> str:
    """Run a script as a user of the Hub would."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [python, HERE / script, *arguments],
        env={**kept, **settings, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def run_client(requirement: str, served: Served, tmp_path: Path, *, below: str = "") -> str:
    """All of hub_client.py; the version that it ran with."""
    home = tmp_path / "home"
    home.mkdir()
    plan = tmp_path / "plan.json"
    with cutting(served.host) as proxy:
        plan.write_text(json.dumps(served.plan | {"cutting_endpoint": f"http://{proxy.host}/hf{below}"}))
        python = environment(requirement, *LOADERS)
        version = run(
            python, "hub_client.py", str(plan), endpoint=f"http://{served.host}/hf{below}", home=home
        )
        assert len(proxy.resumed_at) == 1
        assert 0 < proxy.resumed_at[0] <= proxy.CUT_AFTER
    return version


@pytest.mark.parametrize("requirement", HUGGINGFACE_HUB)
def test_huggingface_hub_works_unchanged(requirement: str, served: Served, tmp_path: Path) -> None:
    version = run_client(requirement, served, tmp_path)

    assert requirement.endswith(f"=={version}") or ">=" in requirement


def test_a_deep_name_is_found_below_a_longer_endpoint(served: Served, tmp_path: Path) -> None:
    run_client(HUGGINGFACE_HUB[-1], served, tmp_path, below="/team/deep")


def test_transformers_load_what_was_packed(served: Served, tmp_path: Path) -> None:
    """Configuration, tokenizer and weights are the same from the hub and from the folder that was packed."""
    said = run(
        environment(TRANSFORMERS, *LOADERS),
        "hub_loader.py",
        "demo/minilm",
        str(served.context / "model"),
        endpoint=f"http://{served.host}/hf",
        home=tmp_path,
    )

    assert said.splitlines()[-1] == f"{len(served.plan['tensors'])} tensors are the same"

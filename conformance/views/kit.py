"""The ModelKit that the views are views of: a real model, two datasets, code, documents and prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conformance import toolbox
from conformance.clients.lab import Lab, check, digests
from conformance.relay import Relay

PROGRAMS = Path(__file__).with_name("programs")
KITCLIENT = toolbox.HERE.parent / ".venv" / "bin" / "kitclient"
REPOSITORY = "team/kit"
TAG = "v1"
# Tags of the same kit packed otherwise: with compressed layers, and as a CNCF ModelPack.
COMPRESSIONS = ("gzip", "zstd")
MODELPACK_TAG = "modelpack"
_PACK_OPTIONS = {
    TAG: (),
    **{compression: ("--compression", compression) for compression in COMPRESSIONS},
    MODELPACK_TAG: ("--use-model-pack",),
}

_KITFILE = """\
manifestVersion: 1.0.0
package:
  name: minilm
  version: 1.0.0
  authors: [Nobody]
model:
  name: minilm
  path: model
  parts:
    - name: adapter
      path: adapter/lora.bin
datasets:
  - name: train set
    path: data/train.parquet
  - name: test
    path: data/test.csv
code:
  - path: src
docs:
  - path: docs
  - path: README.md
prompts:
  - path: prompts
"""
_SMALL_FILES = {
    "adapter/lora.bin": bytes(range(256)) * 1024,
    "src/train.py": b"print('train')\n",
    "src/lib/empty.py": b"",
    f"src/{'long-name-' * 12}.txt": b"long\n",
    "docs/\N{LATIN CAPITAL LETTER U WITH DIAERESIS}ber uns.md": b"# About\n",
    "README.md": b"# A model\n",
    "prompts/system.md": b"Be brief.\n",
}
# What a program that is not root could not read in an image.
OWNER_ONLY = "prompts/system.md"

MODEL = "model/model.safetensors"
PARQUET = "data/train.parquet"
CSV = "data/test.csv"


@dataclass(frozen=True)
class Slice:
    """A part of the kit.

    Attributes:
        selectors: as in a tag, behind `.only.`.
        filters: the same as kit's `--filter` has it.
        prefixes: what the paths of its files begin with.
    """

    selectors: str
    filters: str
    prefixes: tuple[str, ...]

    @property
    def tag(self) -> str:
        return f"{TAG}.only.{self.selectors}"


MODEL_SLICE = Slice("model", "model", ("model/", "adapter/"))
CSV_SLICE = Slice("datasets_test", "datasets:test", (CSV,))
PROMPTS_SLICE = Slice("prompts", "prompts", ("prompts/",))
SLICES = (
    MODEL_SLICE,
    Slice("model_minilm", "model:minilm", ("model/",)),
    Slice("model_adapter", "model:adapter", ("adapter/",)),
    Slice("datasets", "datasets", ("data/",)),
    Slice("datasets_train-set", "datasets:train set", (PARQUET,)),
    CSV_SLICE,
    Slice("code", "code", ("src/",)),
    Slice("docs", "docs", ("docs/", "README.md")),
    Slice("docs_README-md", "docs:README.md", ("README.md",)),
    PROMPTS_SLICE,
)


@dataclass(frozen=True)
class Kit:
    """The folder that the kit was packed from.

    Attributes:
        files: the SHA-256 of each file that belongs to the kit, by its path.
    """

    folder: Path
    files: dict[str, str]

    def part(self, *prefixes: str) -> dict[str, str]:
        """Of `files`, those whose path begins with one of these."""
        return {path: digest for path, digest in self.files.items() if path.startswith(prefixes)}

    def size(self, *prefixes: str) -> int:
        """Bytes of the files whose path begins with one of these."""
        return sum((self.folder / path).stat().st_size for path in self.part(*prefixes))


@dataclass(frozen=True)
class KitLab(Lab):
    """A lab whose registry holds the kit.

    Attributes:
        relay: on the way to the same registry.
    """

    kit: Kit
    relay: Relay

    @property
    def repository(self) -> str:
        return f"{self.host}/{REPOSITORY}"

    def url(self, path: str, *, host: str | None = None) -> str:
        """Of something below the repository."""
        return f"http://{host or self.host}/v2/{REPOSITORY}/{path}"

    def run_program(self, name: str, *arguments: str | Path, hub: str | None = None) -> str:
        """Standard output of one of the programs beside this file, run with the packages of [python.views].

        Args:
            hub: the registry that it takes for the Hugging Face Hub, as `host:port`; the lab's by default.
        """
        python = toolbox.python_with_packages("views")
        endpoint = f"http://{hub or self.host}/hf"
        command = (python, PROGRAMS / f"{name}.py", *arguments)
        return self.run(*command, HF_ENDPOINT=endpoint, HF_HUB_DISABLE_TELEMETRY="1")

    def check_files(self, folder: str | Path, *prefixes: str) -> None:
        """A folder holds the files of the kit whose paths begin with one of these, with the same bytes, and no others."""
        seen = digests(self.folder / folder, without=("Kitfile",))
        wanted = self.kit.part(*prefixes)
        check(seen == wanted, "in", folder, "differ:", _difference(seen, wanted))

    def check_wire(self, size: int, fetch: Callable[[], object]) -> None:
        """What `fetch` gets through the relay costs the bytes of a part, at most 1 % and 64 KiB over its size."""
        before = self.relay.passed
        fetch()
        passed = self.relay.passed - before
        size_max = size + size // 100 + 64 * 1024
        check(size <= passed <= size_max, f"{passed:,} bytes passed for a part of {size:,}")


def make_kit(lab: Lab) -> Kit:
    """Make the folder, pack it in each way and push it.

    Raises:
        CellFailed, ToolMissing: there is no kit, and nothing to be tried on it.
    """
    folder = lab.folder / "source"
    shutil.copytree(
        toolbox.model_files(), folder / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    for path, content in _SMALL_FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / OWNER_ONLY).chmod(0o600)
    (folder / "data").mkdir()
    lab.run(toolbox.python_with_packages("views"), PROGRAMS / "make_datasets.py", folder / "data")
    files = digests(folder)
    (folder / "Kitfile").write_text(_KITFILE)
    store = ("--config", lab.folder / "store")
    for tag, options in _PACK_OPTIONS.items():
        reference = f"{lab.host}/{REPOSITORY}:{tag}"
        lab.run(KITCLIENT, "pack", folder, "-t", reference, *options, *store)
        lab.run(KITCLIENT, "push", reference, *store)
    shutil.rmtree(lab.folder / "store")
    return Kit(folder, files)


def _difference(seen: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(path for path in seen.keys() | wanted.keys() if seen.get(path) != wanted.get(path))

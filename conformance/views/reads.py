"""Files, archives, tensors and the hub: for curl, and for Python programs that know nothing of registries."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from urllib.parse import quote

from conformance import toolbox
from conformance.clients.lab import CellFailed, Client, check, digests, operation
from conformance.views.artifacts import copy_with_oras
from conformance.views.kit import (
    CSV,
    CSV_SLICE,
    MODEL,
    MODEL_SLICE,
    MODELPACK_TAG,
    PARQUET,
    REPOSITORY,
    TAG,
    KitLab,
)

_TENSOR = "embeddings.word_embeddings.weight"
_COLUMN = "score"
_BREAK_AFTER = 20_000_000


class Curl(Client):
    lab: KitLab

    def __init__(self, lab: KitLab) -> None:
        super().__init__(lab)
        self.tool = toolbox.debian_command("curl")

    def fetch(self, url: str, target: str, *options: str) -> Path:
        """What a URL gives, as a file."""
        self.lab.run(self.tool, "-fsS", *options, "-o", target, url)
        return self.lab.folder / target

    @operation("archive of the model, into tar x")
    def archive(self) -> None:
        (self.lab.folder / "model").mkdir()
        url = self.lab.url(f"_modelkit/archive/{TAG}?filter=model")
        self.lab.run("sh", "-c", f"{self.tool} -fsS '{url}' | tar x -C model")
        self.lab.check_files("model", *MODEL_SLICE.prefixes)

    @operation("archive by pattern")
    def pattern(self) -> None:
        tar = self.fetch(self.lab.url(f"_modelkit/archive/{TAG}?path=**/*.json"), "json.tar", "--globoff")
        with tarfile.open(tar) as archive:
            archive.extractall(self.lab.folder / "json", filter="data")
        wanted = {path: digest for path, digest in self.lab.kit.files.items() if path.endswith(".json")}
        check(digests(self.lab.folder / "json") == wanted, wanted)

    @operation("archive, broken off and resumed (-C -)")
    def resumed(self) -> None:
        path = f"_modelkit/archive/{TAG}?filter=model,code"
        whole = self.fetch(self.lab.url(path), "whole.tar")
        through_relay = self.lab.url(path, host=self.lab.relay.host)
        part = self.lab.folder / "part.tar"
        self.lab.relay.cut_after = _BREAK_AFTER
        try:
            self.fetch(through_relay, part.name)
        except CellFailed:
            size = part.stat().st_size
            check(0 < size < whole.stat().st_size, size, "bytes came of", whole.stat().st_size)
        else:
            raise CellFailed("the transfer was not broken off")
        self.lab.check_wire(
            whole.stat().st_size - size, lambda: self.fetch(through_relay, part.name, "-C", "-")
        )
        check(part.read_bytes() == whole.read_bytes(), "another tar")

    @operation("every file by its path")
    def files(self) -> None:
        urls = self.lab.folder / "urls"
        lines = []
        for path in self.lab.kit.files:
            lines += [f'url = "{self.file_url(path)}"', f'output = "files/{path}"', "create-dirs"]
        urls.write_text("\n".join(lines))
        self.lab.run(self.tool, "-fsS", "--config", urls)
        self.lab.check_files("files", "")

    @operation("a range of a file in a gzip layer")
    def compressed_range(self) -> None:
        url = self.lab.url(f"_modelkit/files/gzip/{MODEL}")
        part = self.fetch(url, "range", "-r", "80000000-80000999").read_bytes()
        with (self.lab.kit.folder / MODEL).open("rb") as file:
            file.seek(80_000_000)
            check(part == file.read(1000), "other bytes")

    @operation("a tensor by its name")
    def tensor(self) -> None:
        fetched = self.fetch(self.lab.url(f"_modelkit/tensors/{TAG}/{MODEL}?name={_TENSOR}"), "tensor")
        check(fetched.read_bytes() == tensor_bytes(self.lab.kit.folder / MODEL, _TENSOR), "other numbers")

    def file_url(self, path: str) -> str:
        return self.lab.url(f"_modelkit/files/{TAG}/{quote(path)}")


class Transformers(Client):
    lab: KitLab

    @operation("configuration, tokens and (with safetensors) tensors, as from the folder")
    def load(self) -> None:
        from_folder = self.lab.run_program("load_model", self.lab.kit.folder / "model")
        from_hub = self.lab.run_program("load_model", REPOSITORY, TAG)
        check(json.loads(from_hub) == json.loads(from_folder), from_hub)


class HuggingfaceHub(Client):
    lab: KitLab

    def download(self, revision: str, target: str, *patterns: str) -> None:
        folder = self.lab.folder / target
        self.lab.run_program("download_snapshot", REPOSITORY, revision, folder, *patterns)

    def check_snapshot(self, target: str, *prefixes: str) -> None:
        """A snapshot holds a part of the kit, the files of the model's folder at the root."""
        seen = digests(self.lab.folder / target)
        wanted = {
            path.removeprefix("model/"): self.lab.kit.files[path] for path in self.lab.kit.part(*prefixes)
        }
        check({path: seen[path] for path in seen if not path.startswith(".cache/")} == wanted, sorted(seen))

    @operation("snapshot_download of a slice")
    def slice(self) -> None:
        self.download(f"{TAG}.only.model", "slice")
        self.check_snapshot("slice", *MODEL_SLICE.prefixes)

    @operation("snapshot_download of a slice of a ModelPack")
    def modelpack(self) -> None:
        self.download(f"{MODELPACK_TAG}.only.model", "pack")
        self.check_snapshot("pack", *MODEL_SLICE.prefixes)

    @operation("snapshot_download of a pattern")
    def pattern(self) -> None:
        self.download(TAG, "pattern", "data/*.csv")
        self.check_snapshot("pattern", CSV)


class Pyarrow(Client):
    lab: KitLab

    @operation("one column of the Parquet file, over HTTP ranges")
    def column(self) -> None:
        check_column(self.lab, "read_column")


class Duckdb(Client):
    lab: KitLab

    @operation("one column of the Parquet file, over HTTP ranges (fsspec's)")
    def column(self) -> None:
        check_column(self.lab, "query_column")


class OnTheWire(Client):
    """What a part costs, at the socket: at most 1 % and 64 KiB over its size."""

    lab: KitLab

    @operation("a slice (oras)")
    def slice(self) -> None:
        reference = f"{self.lab.relay.host}/{REPOSITORY}:{CSV_SLICE.tag}"
        oras = toolbox.go_tool("oras")
        size = self.lab.kit.size(*CSV_SLICE.prefixes)
        self.lab.check_wire(size, lambda: copy_with_oras(self.lab, oras, reference, "layout"))

    @operation("the ModelPack view of a slice (oras)")
    def modelpack(self) -> None:
        reference = f"{self.lab.relay.host}/{REPOSITORY}:{CSV_SLICE.tag}.as.modelpack"
        oras = toolbox.go_tool("oras")
        size = self.lab.kit.size(*CSV_SLICE.prefixes)
        self.lab.check_wire(size, lambda: self.lab.run(oras, "pull", "--plain-http", "-o", "pack", reference))

    @operation("the image of a slice (skopeo)")
    def image(self) -> None:
        source = f"docker://{self.lab.relay.host}/{REPOSITORY}:{CSV_SLICE.tag}.as.image"
        command = (toolbox.debian_command("skopeo"), "--insecure-policy", "copy", "--src-tls-verify=false")
        size = self.lab.kit.size(*CSV_SLICE.prefixes)
        self.lab.check_wire(size, lambda: self.lab.run(*command, source, "dir:image"))

    @operation("a file (curl)")
    def file(self) -> None:
        self.check_url(self.lab.kit.size(CSV), f"_modelkit/files/{TAG}/{CSV}")

    @operation("a tensor (curl)")
    def tensor(self) -> None:
        size = len(tensor_bytes(self.lab.kit.folder / MODEL, _TENSOR))
        self.check_url(size, f"_modelkit/tensors/{TAG}/{MODEL}?name={_TENSOR}")

    @operation("an archive (curl)")
    def archive(self) -> None:
        self.check_url(self.lab.kit.size("data/"), f"_modelkit/archive/{TAG}?filter=datasets")

    @operation("a download from the hub (huggingface_hub)")
    def hub_download(self) -> None:
        arguments = ("download_file", REPOSITORY, TAG, "model.safetensors")
        self.lab.check_wire(
            self.lab.kit.size(MODEL), lambda: self.lab.run_program(*arguments, hub=self.lab.relay.host)
        )

    def check_url(self, size: int, path: str) -> None:
        curl, url = toolbox.debian_command("curl"), self.lab.url(path, host=self.lab.relay.host)
        self.lab.check_wire(size, lambda: self.lab.run_for_bytes(curl, "-fsS", url))


def check_column(lab: KitLab, program: str) -> None:
    """A program reads a column from the registry as from the folder, and a tenth of the file passes at most."""
    url = lab.url(f"_modelkit/files/{TAG}/{PARQUET}", host=lab.relay.host)
    before = lab.relay.passed
    from_registry = lab.run_program(program, url, _COLUMN)
    passed = lab.relay.passed - before
    check(from_registry == lab.run_program(program, lab.kit.folder / PARQUET, _COLUMN), from_registry)
    size = lab.kit.size(PARQUET)
    check(0 < passed <= size // 10, f"{passed:,} bytes passed, of a file of {size:,}")


def tensor_bytes(path: Path, name: str) -> bytes:
    """A tensor of a safetensors file: an 8-byte length, a header in JSON, then the numbers."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8:begin])[name]["data_offsets"]
    return content[begin + start : begin + stop]

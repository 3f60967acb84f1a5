"""Everything that a program asks of the Hub through huggingface_hub, with whichever version runs this: `hub_client.py <plan.json>`.

Run in an environment that has nothing of this project, with HF_ENDPOINT and HF_HOME set. The plan says what is there:

    repository, dataset         ids
    files                       path -> SHA-256, of all files at `main`
    slice, slice_files          a revision that has a part of them, and that part
    commit                      of `main`
    tensors                     name -> [dtype, shape], of model.safetensors
    cutting_endpoint            like HF_ENDPOINT; breaks off the first answer with model.safetensors

Ends with 0 and prints the version; an assertion that fails says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

PLAN = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
REPOSITORY: str = PLAN["repository"]
FILES: dict[str, str] = PLAN["files"]
VERSION = tuple(int(number) for number in huggingface_hub.__version__.split(".")[:2])


def main() -> None:
    api = HfApi()
    for check in (
        snapshots,
        single_files,
        resumed_download,
        information,
        tree,
        errors,
        file_system,
        tensors,
        datasets,
        writes,
    ):
        check(api)
    sys.stdout.write(f"{huggingface_hub.__version__}\n")


def snapshots(_: HfApi) -> None:
    whole = snapshot_download(REPOSITORY)
    assert Path(whole).name == PLAN["commit"], whole
    assert contents(whole) == FILES, contents(whole)

    assert snapshot_download(REPOSITORY) == whole
    some = snapshot_download(
        REPOSITORY, allow_patterns=["*.json", "docs/*"], ignore_patterns="tokenizer*", cache_dir=fresh()
    )
    assert contents(some) == {
        path: digest
        for path, digest in FILES.items()
        if (path.endswith(".json") or path.startswith("docs/")) and not path.startswith("tokenizer")
    }, contents(some)

    part = snapshot_download(REPOSITORY, revision=PLAN["slice"], cache_dir=fresh())
    assert contents(part) == PLAN["slice_files"], contents(part)

    folder = fresh()
    snapshot_download(REPOSITORY, local_dir=folder)
    shutil.rmtree(Path(folder) / ".cache", ignore_errors=True)
    shutil.rmtree(Path(folder) / ".huggingface", ignore_errors=True)
    assert contents(folder) == FILES, contents(folder)


def single_files(_: HfApi) -> None:
    cache = fresh()
    path = hf_hub_download(REPOSITORY, "config.json", cache_dir=cache)
    assert digest_of(path) == FILES["config.json"]
    fetched = Path(path).resolve().stat()
    assert hf_hub_download(REPOSITORY, "config.json", cache_dir=cache) == path
    assert hf_hub_download(REPOSITORY, "config.json", cache_dir=cache, local_files_only=True) == path
    kept = Path(path).resolve().stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (fetched.st_ino, fetched.st_mtime_ns), "fetched again"

    nested = next(path for path in FILES if "/" in path)
    subfolder, _, name = nested.rpartition("/")
    assert digest_of(hf_hub_download(REPOSITORY, name, subfolder=subfolder, cache_dir=cache)) == FILES[nested]
    for revision in ("main", PLAN["tag"], PLAN["commit"], f"sha256-{PLAN['digest']}"):
        assert (
            digest_of(hf_hub_download(REPOSITORY, nested, revision=revision, cache_dir=cache))
            == FILES[nested]
        )


def resumed_download(_: HfApi) -> None:
    """A download that is cut off goes on: within the call, or in versions before 2.0 when it is called again."""
    cache = fresh()
    for attempt in range(2):
        try:
            path = hf_hub_download(
                REPOSITORY, "model.safetensors", cache_dir=cache, endpoint=PLAN["cutting_endpoint"]
            )
        except Exception:  # each HTTP library that it was built on has an error of its own
            if attempt or VERSION >= (2, 0):
                raise
        else:
            assert digest_of(path) == FILES["model.safetensors"]
            return


def information(api: HfApi) -> None:
    info = api.model_info(REPOSITORY)
    assert info.id == REPOSITORY
    assert info.sha == PLAN["commit"]
    assert {sibling.rfilename for sibling in info.siblings} == set(FILES)
    assert info.last_modified is not None
    assert info.private is False
    assert "license:apache-2.0" in info.tags
    assert info.pipeline_tag == "sentence-similarity", info.pipeline_tag
    assert info.library_name == "sentence-transformers", info.library_name
    assert info.card_data is not None
    assert info.card_data.license == "apache-2.0"
    with_blobs = api.model_info(REPOSITORY, files_metadata=True)
    assert {
        sibling.rfilename: sibling.lfs["sha256"] if isinstance(sibling.lfs, dict) else sibling.lfs.sha256
        for sibling in with_blobs.siblings
    } == FILES
    assert api.model_info(REPOSITORY, revision=PLAN["tag"]).sha == PLAN["commit"]
    if VERSION >= (0, 25):
        expanded = api.model_info(REPOSITORY, expand=["safetensors", "sha"])
        assert expanded.sha == PLAN["commit"]
        assert expanded.safetensors.total == PLAN["parameters"], expanded.safetensors

    assert sorted(api.list_repo_files(REPOSITORY)) == sorted(FILES)
    refs = api.list_repo_refs(REPOSITORY)
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", PLAN["commit"])]
    assert (PLAN["tag"], PLAN["commit"]) in [(ref.name, ref.target_commit) for ref in refs.tags]
    assert PLAN["commit"] in [commit.commit_id for commit in api.list_repo_commits(REPOSITORY)]
    assert api.repo_exists(REPOSITORY)
    assert not api.repo_exists("nobody/nothing")
    assert api.revision_exists(REPOSITORY, PLAN["tag"])
    assert not api.revision_exists(REPOSITORY, "v99")
    assert api.file_exists(REPOSITORY, "config.json")
    assert not api.file_exists(REPOSITORY, "absent.json")
    assert [model.id for model in api.list_models(search="minilm")] == [REPOSITORY]
    assert not list(api.list_models(search="no such model"))
    assert api.whoami(token="hf_anything")["auth"]["accessToken"]["role"] == "read"


def tree(api: HfApi) -> None:
    listed = list(api.list_repo_tree(REPOSITORY, recursive=True, expand=True))
    assert {entry.path for entry in listed if hasattr(entry, "size")} == set(FILES)
    assert {entry.path for entry in listed if not hasattr(entry, "size")} == {
        str(parent) for path in FILES for parent in Path(path).parents if str(parent) != "."
    }
    assert {entry.path for entry in api.list_repo_tree(REPOSITORY, "docs")} == {
        path for path in FILES if path.startswith("docs/")
    }
    found = api.get_paths_info(REPOSITORY, ["config.json", "docs", "absent", "model.safetensors"])
    assert {entry.path for entry in found} == {"config.json", "docs", "model.safetensors"}
    with raises(EntryNotFoundError):
        list(api.list_repo_tree(REPOSITORY, "absent/folder"))
    if hasattr(api, "verify_repo_checksums"):
        verified = api.verify_repo_checksums(REPOSITORY, cache_dir=Path(os.environ["HF_HOME"]) / "hub")
        assert not verified.mismatches, verified
        assert verified.checked_count == len(FILES), verified


def errors(api: HfApi) -> None:
    with raises(RepositoryNotFoundError):
        api.model_info("nobody/nothing")
    with raises(RepositoryNotFoundError):
        hf_hub_download("nobody/nothing", "config.json", cache_dir=fresh())
    with raises(RevisionNotFoundError) as caught:
        api.model_info(REPOSITORY, revision="v99")
    assert PLAN["tag"] in str(caught.value), caught.value
    with raises(RevisionNotFoundError):
        snapshot_download(REPOSITORY, revision="refs/pr/1", cache_dir=fresh())
    with raises(EntryNotFoundError):
        hf_hub_download(REPOSITORY, "absent.json", cache_dir=fresh())


def file_system(_: HfApi) -> None:
    files = HfFileSystem()
    names = {name.removeprefix(f"{REPOSITORY}/") for name in files.ls(REPOSITORY, detail=False)}
    assert names == {path.partition("/")[0] for path in FILES}, names
    assert {name.removeprefix(f"{REPOSITORY}/") for name in files.find(REPOSITORY)} == set(FILES)
    at_tag = f"{REPOSITORY}@{PLAN['tag']}"
    with files.open(f"{at_tag}/model.safetensors", block_size=4096) as file:
        assert file.size == PLAN["weights_size"]
        file.seek(-16, 2)
        tail = file.read()
        file.seek(0)
        head = file.read(16)
    assert (head.hex(), tail.hex()) == (PLAN["weights_head"], PLAN["weights_tail"])
    assert files.glob(f"{REPOSITORY}/docs/*.md")
    assert not files.exists(f"{REPOSITORY}/absent.json")


def tensors(api: HfApi) -> None:
    metadata = api.get_safetensors_metadata(REPOSITORY)
    header = metadata.files_metadata["model.safetensors"].tensors
    assert {name: [tensor.dtype, list(tensor.shape)] for name, tensor in header.items()} == PLAN["tensors"]
    assert sum(metadata.parameter_count.values()) == PLAN["parameters"]


def datasets(api: HfApi) -> None:
    identity, path, digest = PLAN["dataset"]
    assert api.dataset_info(identity).id == identity
    assert digest_of(hf_hub_download(identity, path, repo_type="dataset", cache_dir=fresh())) == digest
    assert path in contents(snapshot_download(identity, repo_type="dataset", cache_dir=fresh()))
    assert path in api.list_repo_files(identity, repo_type="dataset")
    assert identity in [dataset.id for dataset in api.list_datasets()]
    with HfFileSystem().open(f"datasets/{identity}/{path}", "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == digest


def writes(api: HfApi) -> None:
    for write in (
        lambda: api.create_repo("demo/new", token="hf_anything"),
        lambda: api.delete_repo(REPOSITORY, token="hf_anything"),
        lambda: api.create_tag(REPOSITORY, tag="v2", token="hf_anything"),
        lambda: api.upload_file(
            path_or_fileobj=b"x", path_in_repo="x", repo_id=REPOSITORY, token="hf_anything"
        ),
    ):
        with raises(HfHubHTTPError) as caught:
            write()
        assert "read-only" in str(caught.value), caught.value


# ---- tools


class Caught:
    value: BaseException


@contextmanager
def raises(kind: type[BaseException]) -> Iterator[Caught]:
    caught = Caught()
    try:
        yield caught
    except kind as error:
        caught.value = error
    else:
        raise AssertionError(f"no {kind.__name__}")


def fresh() -> str:
    """A folder that nothing is in."""
    return tempfile.mkdtemp(dir=os.environ["HF_HOME"])


def digest_of(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def contents(folder: str | Path) -> dict[str, str]:
    root = Path(folder)
    return {str(path.relative_to(root)): digest_of(path) for path in root.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()

"""The command line: what it prints, where, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kitclient import cli

KITFILE = """
manifestVersion: 1.0.0
package: {name: golden, authors: [Ann, Bo]}
model: {name: m, path: w.bin}
datasets: [{name: train, path: data}]
docs: [{path: README.md}]
"""


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "data").mkdir(parents=True)
    (folder / "w.bin").write_bytes(b"weights")
    (folder / "data/t.csv").write_bytes(b"1,2")
    (folder / "README.md").write_bytes(b"# read")
    (folder / "Kitfile").write_text(KITFILE)
    return folder


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def kitclient(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    """Run the command line in this process, on a store of its own."""
    monkeypatch.setenv("KITCLIENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))

    def run(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(end.value.code if isinstance(end.value.code, int) else 1, captured.out, captured.err)

    return run


@pytest.fixture
def packed(kitclient, context: Path) -> str:
    result = kitclient("pack", context, "-t", "reg.example/org/kit:v1,v2")
    assert result.code == 0, result.err
    return result.lines[-1].removeprefix("Model saved: ")


def test_pack_says_what_it_saved_in_kits_words(kitclient, context: Path):
    first, second = kitclient("pack", context, "-t", "kit:v1"), kitclient("pack", context, "-t", "kit:v2")

    kinds = ["model", "dataset", "docs"]
    assert [line.partition(":")[0] for line in first.lines] == [
        *(f"Saved {kind} layer" for kind in kinds),
        "Saved configuration",
        "Saved manifest to storage",
        "Model saved",
    ]
    assert [line.partition(":")[0] for line in second.lines[:3]] == [
        f"Already saved {kind} layer" for kind in kinds
    ]


def test_list_shows_a_row_for_each_tag(kitclient, packed: str):
    result = kitclient("list")

    assert result.lines[0].split() == ["REPOSITORY", "TAG", "MAINTAINER", "NAME", "SIZE", "DIGEST"]
    assert [line.split() for line in result.lines[1:]] == [
        ["reg.example/org/kit", tag, "Ann", "golden", "6.5", "KiB", packed] for tag in ("v1", "v2")
    ]


def test_list_as_json_counts_bytes(kitclient, packed: str):
    assert json.loads(kitclient("list", "--format", "json").out) == [
        {
            "repo": "reg.example/org/kit",
            "digest": packed,
            "tags": ["v1", "v2"],
            "modelName": "golden",
            "size": 6656,
            "author": "Ann",
        }
    ]


def test_an_empty_list_is_a_header_and_an_empty_array(kitclient):
    assert kitclient("list").lines == ["REPOSITORY   TAG   MAINTAINER   NAME   SIZE   DIGEST"]
    assert kitclient("list", "--format", "json").out == "[]\n"


def test_a_kit_without_a_name_or_tag_is_listed_as_none(kitclient, context: Path):
    (context / "Kitfile").write_text("manifestVersion: 1.0.0")
    assert kitclient("pack", context).code == 0

    result = kitclient("list", "--format", "json")

    assert r"\u003cnone\u003e" in result.out
    (kit,) = json.loads(result.out)
    assert (kit["repo"], kit["tags"], kit["modelName"], kit["author"]) == ("<none>", [], "<none>", "<none>")
    assert kitclient("inspect", kit["digest"]).code == 0


def test_inspect_prints_digest_version_kitfile_and_manifest(kitclient, packed: str):
    document = json.loads(kitclient("inspect", "reg.example/org/kit:v1").out)

    assert list(document) == ["digest", "cliVersion", "kitfile", "manifest"]
    assert document["digest"] == packed
    assert document["kitfile"]["model"]["name"] == "m"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (".package.authors", "- Ann\n- Bo\n"),
        ("package.name", "golden\n"),
        ("datasets", "- name: train\n  path: data\n"),
        ("dataSets", "- name: train\n  path: data\n"),
        ("Model", "name: m\npath: w.bin\n"),
        ("code", "[]\n"),
        ("package.license", '""\n'),
    ],
)
def test_info_prints_a_part_whatever_the_case_of_its_name(kitclient, packed: str, path: str, wanted: str):
    assert kitclient("info", "reg.example/org/kit:v1", "--filter", path).out == wanted


@pytest.mark.parametrize("path", ["nope", "package.nope", "model.digest", "datasets.name"])
def test_info_of_what_is_not_there_fails(kitclient, packed: str, path: str):
    result = kitclient("info", "reg.example/org/kit:v1", "-f", path)

    assert (result.code, result.out) == (1, "")
    assert "cannot find required node" in result.err


def test_unpack_says_where_each_part_goes(kitclient, packed: str, tmp_path: Path):
    result = kitclient("unpack", "reg.example/org/kit:v1", "-d", tmp_path / "out")

    out = tmp_path / "out"
    assert result.lines[:2] == [f"Unpacking to {out}", f"Unpacking config to {out / 'Kitfile'}"]
    assert set(result.lines[2:]) == {
        "Unpacking model m to w.bin",
        "Unpacking dataset train to data",
        "Unpacking docs to README.md",
    }
    assert (out / "data/t.csv").read_bytes() == b"1,2"


def test_unpack_over_existing_files_fails_unless_told_what_to_do(kitclient, packed: str, tmp_path: Path):
    unpack = ("unpack", "reg.example/org/kit:v1", "-d", tmp_path / "out")
    assert kitclient(*unpack).code == 0
    (tmp_path / "out/w.bin").write_bytes(b"mine")

    refused = kitclient(*unpack)
    assert (refused.code, "already exists" in refused.err) == (1, True)
    assert kitclient(*unpack, "-i").code == 0
    assert (tmp_path / "out/w.bin").read_bytes() == b"mine"
    assert kitclient(*unpack, "-o").code == 0
    assert (tmp_path / "out/w.bin").read_bytes() == b"weights"
    assert kitclient(*unpack, "-o", "-i").code == 1


def test_unpack_takes_single_files_by_their_paths(kitclient, packed: str, tmp_path: Path):
    result = kitclient(
        *("unpack", "reg.example/org/kit:v1", "-d", tmp_path / "out"),
        *("--path", "data/*", "--path", "*.md", "--path", "nope", "--verify-layers"),
    )

    assert result.code == 0
    assert set(files_below(tmp_path / "out")) == {"data/t.csv", "README.md"}
    assert result.err.splitlines()[-1] == "[WARN ] Nothing of what is chosen matches nope"


def test_unpack_of_nothing_at_all_fails_and_says_how_to_see_what_there_is(kitclient, packed: str, tmp_path):
    result = kitclient("unpack", "reg.example/org/kit:v1", "-d", tmp_path / "out", "--path", "*.gguf")

    assert result.code == 1
    assert "matches *.gguf; `kitclient files` lists what there is" in result.err
    assert not (tmp_path / "out").exists()


def test_files_shows_a_row_for_each_file(kitclient, packed: str):
    result = kitclient("files", "reg.example/org/kit:v1", "--progress", "none")

    assert result.lines == [
        "MODE   SIZE   DIGEST         PATH",
        "0644   6 B    e3d47bd2d200   README.md",
        "0755   -      -              data/",
        "0644   3 B    17f8af97ad4a   data/t.csv",
        "0644   7 B    9a129038d9a0   w.bin",
    ]
    assert result.err == ""


def test_files_as_json_has_the_form_of_the_registrys_own_list(kitclient, packed: str):
    result = kitclient("files", "reg.example/org/kit:v1", "-f", "datasets:train", "--format", "json")

    document = json.loads(result.out)
    assert document["digest"] == packed
    folder, file = document["files"]
    layer = file.pop("layer")
    assert folder == {
        "path": "data",
        "type": "directory",
        "size": 0,
        "mode": "0755",
        "layer": layer,
        "section": "datasets",
        "entry": "train",
    }
    assert file.pop("digest").startswith("sha256:17f8af97ad4a")
    assert file == {
        "path": "data/t.csv",
        "type": "file",
        "size": 3,
        "mode": "0644",
        "offset": 1024,
        "section": "datasets",
        "entry": "train",
    }


def test_files_by_path_are_those_that_match(kitclient, packed: str):
    assert [
        line.split()[-1] for line in kitclient("files", "reg.example/org/kit:v1", "--path", "*.*").lines
    ] == [
        *("PATH", "README.md", "w.bin"),
    ]


def test_cat_writes_the_file_and_nothing_else(kitclient, packed: str):
    result = kitclient("cat", "reg.example/org/kit:v1:data/t.csv", "--progress", "none")

    assert (result.code, result.out, result.err) == (0, "1,2", "")


def test_the_old_flags_of_unpack_filter_too(kitclient, packed: str, tmp_path: Path):
    assert (
        kitclient("unpack", "reg.example/org/kit:v1", "--model", "--docs", "-d", tmp_path / "out").code == 0
    )

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "w.bin"]


def test_tag_gives_a_second_name(kitclient, packed: str):
    result = kitclient("tag", "reg.example/org/kit:v1", "other")

    assert result.out == "Modelkit reg.example/org/kit:v1 tagged as localhost/other:latest\n"
    assert json.loads(kitclient("inspect", "other:latest").out)["digest"] == packed


def test_remove_by_tag_untags_and_the_last_one_removes(kitclient, packed: str):
    assert kitclient("remove", "reg.example/org/kit:v1").out.startswith("Untagged reg.example/org/kit:v1 (")
    assert (
        kitclient("remove", "reg.example/org/kit:v2").out
        == f"Removed reg.example/org/kit:v2 (digest {packed})\n"
    )
    assert kitclient("list", "--format", "json").out == "[]\n"


def test_remove_of_some_that_are_not_there_removes_the_rest_and_fails(kitclient, packed: str):
    result = kitclient("remove", "reg.example/org/kit:v1,nope")

    assert result.code == 1
    assert result.err == "[ERROR] Failed to remove: model reg.example/org/kit:nope not found\n"
    assert kitclient("inspect", "reg.example/org/kit:v1").code == 1


def test_remove_all_removes_what_has_no_tag_and_with_force_everything(kitclient, packed: str, context: Path):
    (context / "w.bin").write_bytes(b"newer")
    assert kitclient("pack", context).code == 0

    assert len(kitclient("remove", "--all").lines) == 1
    result = kitclient("remove", "--all", "--force")
    assert result.lines == [
        "Untagged reg.example/org/kit:v1",
        "Untagged reg.example/org/kit:v2",
        f"Removed reg.example/org/kit@{packed}",
    ]


def test_diff_of_the_same_kit_says_so(kitclient, packed: str):
    assert (
        kitclient("diff", "reg.example/org/kit:v1", "local://reg.example/org/kit:v2").out
        == "ModelKits are identical\n"
    )


def test_diff_shows_shared_and_unique_layers(kitclient, packed: str, context: Path):
    (context / "w.bin").write_bytes(b"newer")
    kitclient("pack", context, "-t", "new:v1")

    result = kitclient("diff", "reg.example/org/kit:v1", "new:v1")

    assert result.code == 0
    titles = [
        "Configurations:",
        "Annotations:",
        "Shared Layers",
        "Unique Layers to ModelKit1 (reg.example/org/kit:v1)",
        "Unique Layers to ModelKit2 (new:v1)",
    ]
    assert [line for line in result.lines if line in titles] == titles
    assert sum(line.startswith("dataset | sha256:") for line in result.lines) == 1
    assert sum(line.startswith("model   | sha256:") for line in result.lines) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "No such command 'nope'"),
        (["unpack"], "Missing argument 'REFERENCE'"),
        (["unpack", "UPPER/case:v1"], "name must be lowercase"),
        (["unpack", "nope:v9"], "Model nope:v9 not found"),
        (["unpack", "x:v1", "-f", "models"], "Invalid filter type models (must be one of 'kitfile', 'model'"),
        (["unpack", "x:v1", "-f", "model:a:b"], "Invalid filter: should be in format"),
        (["unpack", "x:v1,v2"], "Can not unpack multiple tags"),
        (["push", "x:v1"], "Registry is required when pushing"),
        (["pull", "x:v1"], "names no registry"),
        (["inspect", "x:v1"], "Model x:v1 not found"),
        (["remove"], "One of a reference and --all is wanted"),
        (["pack", "/nonexistent"], "does not exist"),
        (["unpack", "x:v1", "--max-unpacked", "much"], "is not a size"),
        (["files", "x:v1"], "Model x:v1 not found"),
        (["files", "x:v1,v2"], "One tag or digest is wanted, not several"),
        (["cat", "x:v1:a"], "Model x:v1 not found"),
        (["cat", "x:v1,v2:a"], "One tag or digest is wanted, not several"),
        (["cat", "x:v1"], "wanted REFERENCE:PATH"),
        (["cat", "localhost:5000/x:a"], "wanted REFERENCE:PATH"),
        (["cat", "x:v1:../a"], "leads out of its place"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_on_stderr_and_exit_1(
    kitclient, arguments: list[str], words: str
):
    result = kitclient(*arguments)

    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("[ERROR] ")
    assert words in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("kitfile", "words"),
    [
        (None, "No Kitfile found in"),
        ("", "empty"),
        ("foo: 1", "foo"),
        ("model: {path: nothere.bin}", "Error processing model: path nothere.bin does not exist"),
        ("model: {path: /etc}", "absolute paths are not supported"),
    ],
)
def test_pack_says_what_is_wrong_with_a_kitfile(kitclient, context: Path, kitfile: str | None, words: str):
    (context / "Kitfile").unlink()
    if kitfile is not None:
        (context / "Kitfile").write_text(kitfile)

    result = kitclient("pack", context)

    assert result.code == 1
    assert words in result.err


def test_a_warning_goes_to_stderr_and_stops_nothing(kitclient, context: Path):
    (context / "Kitfile").write_text("manifestVersion: 2\ncode: [{path: link}]")
    (context / "link").symlink_to("w.bin")

    result = kitclient("pack", context)

    assert result.code == 0
    assert "[WARN ] Skipping symlink link (symlinks are not supported)" in result.err
    assert "Unrecognized manifestVersion" in result.err
    assert "WARN" not in result.out


def test_U_30_nothing_that_moves_a_cursor_is_printed(kitclient, context: Path):
    (context / "Kitfile").write_text('package: {name: "a\\e[31mb\\u202ec\\nd", authors: ["\\u009b2J"]}')
    kitclient("pack", context, "-t", "evil:v1")

    for command in (
        ("list",),
        ("info", "evil:v1"),
        ("inspect", "evil:v1"),
        ("info", "evil:v1", "-f", "package.name"),
    ):
        printed = kitclient(*command).out
        assert all(character.isprintable() or character == "\n" for character in printed), printed
    assert len(kitclient("list").lines) == 2


def test_global_options_stand_before_or_behind_the_command(kitclient, context: Path, tmp_path: Path):
    assert kitclient("--config", tmp_path / "elsewhere", "pack", context, "-t", "kit:v1").code == 0
    assert kitclient("inspect", "kit:v1", "--config", tmp_path / "elsewhere").code == 0
    assert kitclient("inspect", "kit:v1").code == 1


def test_log_level_error_says_nothing_but_answers(kitclient, context: Path):
    assert kitclient("pack", context, "-t", "kit:v1", "--log-level", "error").out == ""
    assert kitclient("list", "--log-level", "error").out != ""


def test_a_kitfile_comes_from_stdin_or_a_file_here_or_there(
    kitclient, context: Path, tmp_path: Path, monkeypatch
):
    (context / "other").write_text("model: {path: w.bin}")
    assert kitclient("pack", context, "-f", "other", "-t", "a:v1").code == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("docs: [{path: README.md}]")
    assert kitclient("pack", context, "-f", "mine", "-t", "b:v1").lines[0].startswith("Saved docs layer")


def test_version_and_completion(kitclient):
    from importlib.metadata import version

    assert kitclient("version").lines[0] == f"Version: {version('modelkit-registry')}"
    for shell in ("bash", "zsh", "fish"):
        assert "_KITCLIENT_COMPLETE" in kitclient("completion", shell).out


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"KITCLIENT_HOME": str(tmp_path / "home")}


def test_version_starts_without_what_it_does_not_need(tmp_path: Path):
    script = "import sys; from kitclient.cli import main\ntry: main(['version'])\nexcept SystemExit: pass\nprint(*sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment(tmp_path)
    )

    loaded = done.stdout.split()
    assert not {"aiohttp", "yaml", "tqdm", "zstandard", "tenacity", "filelock"} & set(loaded)


def big_kit(tmp_path: Path, context: Path) -> list[str]:
    """A packed kit of many files, and the command that unpacks it."""
    for number in range(400):
        (context / f"data/{number}.csv").write_bytes(b"%d" % number * 1000)
    (context / "w.bin").write_bytes(b"w" * 3_000_000)
    command = [sys.executable, "-m", "kitclient.cli"]
    subprocess.run(
        [*command, "pack", context, "-t", "kit:v1"],
        check=True,
        capture_output=True,
        env=environment(tmp_path),
    )
    return [*command, "unpack", "kit:v1", "-d", str(tmp_path / "here" / "out")]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_INV_C2_an_unpack_killed_at_any_moment_completes_at_the_next_try(tmp_path: Path, context: Path):
    command = big_kit(tmp_path, context)
    out = tmp_path / "here" / "out"
    killed = 0
    for step in range(12):
        process = subprocess.Popen(
            command, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        # From the moment that something is in the folder: before it there is nothing to break.
        while process.poll() is None and not _has_begun(out) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(step * 0.004)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for path, content in files_below(out).items() if out.exists() else ():
            assert path == "Kitfile" or content == (context / path).read_bytes()

        done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
        # A run that was over before the kill has left its files: they exist, then, as they ought to.
        assert done.returncode == 0 or "already exists" in done.stderr
        unpacked = files_below(out)
        unpacked.pop("Kitfile")
        assert unpacked == {
            path: content for path, content in files_below(context).items() if path != "Kitfile"
        }
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        subprocess.run(["rm", "-rf", str(out.parent)], check=True)
    assert killed


def _has_begun(out: Path) -> bool:
    return out.parent.exists() and any(
        path.name.startswith(".out.kitclient") for path in out.parent.iterdir()
    )


def test_an_interrupt_leaves_nothing_and_exits_130(tmp_path: Path, context: Path):
    command = big_kit(tmp_path, context)
    out = tmp_path / "here" / "out"
    process = subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not _has_begun(out):
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert process.returncode in {130, 0}
    if process.returncode == 130:
        assert "Interrupted" in err
        assert "Traceback" not in err
        assert not out.parent.exists() or not list(out.parent.iterdir())


def test_cat_into_a_pipe_that_closes_ends_without_a_word(tmp_path: Path, context: Path):
    big_kit(tmp_path, context)
    process = subprocess.Popen(
        [sys.executable, "-m", "kitclient.cli", "cat", "kit:v1:w.bin", "--progress", "none"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(10) == b"wwwwwwwwww"
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()

    assert (process.wait(timeout=30), err) == (1, b"")


def test_INV_C4_two_clients_on_one_store_do_not_disturb_each_other(tmp_path: Path, context: Path):
    command = [sys.executable, "-m", "kitclient.cli"]
    processes = [
        subprocess.Popen(
            [*command, "pack", context, "-t", f"kit{number}:v1"],
            env=environment(tmp_path),
            stdout=subprocess.DEVNULL,
        )
        for number in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4

    done = subprocess.run(
        [*command, "list", "--format", "json"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert [kit["repo"] for kit in json.loads(done.stdout)] == ["kit0", "kit1", "kit2", "kit3"]

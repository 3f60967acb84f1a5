import pytest

from kitspec.errors import KitfileInvalid
from kitspec.kitfile import Code, Dataset, Docs, Kitfile, McpServer, Model, ModelPart, Prompt
from kitspec.kitfile_rules import check_kitfile, clean_path, warnings_of


def problems(kitfile):
    with pytest.raises(KitfileInvalid) as caught:
        check_kitfile(kitfile)
    head, *listed = str(caught.value).split("\n  * ")
    assert head == "errors while validating Kitfile: "
    return listed


def test_a_good_kitfile_passes():
    check_kitfile(
        Kitfile(
            "1.0.0",
            model=Model("m", "a/m.bin", parts=(ModelPart(path="./a/", type="lora-adapter_1.0"),)),
            code=(Code("src/../lib"), Code(".")),
            datasets=(
                Dataset("d", "data", "s3://bucket/key?versionId=1", "etag"),
                Dataset("e", "e", "org/kit:v1"),
            ),
            docs=(Docs("p.md"),),
            prompts=(Prompt("p", "p.md"),),
            mcp_servers=(McpServer("s", "s.mcpb"),),
        )
    )
    check_kitfile(Kitfile("1.0.0", model=Model("m", "org/base:v1")))


def test_entries_do_not_share_a_path_however_it_is_written():
    kitfile = Kitfile(
        model=Model("m", "./a.bin"),
        datasets=(Dataset("d", "a.bin"),),
        code=(Code("x/../a.bin"),),
        docs=(Docs(), Docs(".")),
    )

    assert problems(kitfile) == [
        "docs layer 0 and docs layer 1 use the same path .",
        "model m, code layer 0 and dataset d use the same path a.bin",
    ]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/etc", "absolute paths are not supported in a Kitfile (path /etc in code layer 0)"),
        (
            "..",
            "paths outside the context directory are not supported in a Kitfile (path .. in code layer 0)",
        ),
        (
            "a/../../x",
            "paths outside the context directory are not supported in a Kitfile (path a/../../x in code layer 0)",
        ),
        ("http://x.y/z", "HTTP urls are not supported in paths (http://x.y/z)"),
        ("HTTPS://x.y/z", "HTTP urls are not supported in paths (HTTPS://x.y/z)"),
        ("s3://b/k", "invalid path for code (s3://b/k): only local paths are permitted"),
        ("org/kit:v1", "invalid path for code (org/kit:v1): only local paths are permitted"),
        ("a\nb", "control characters are not supported in a Kitfile (path 'a\\nb' in code layer 0)"),
    ],
)
def test_paths_stay_in_the_context(path, problem):
    assert problems(Kitfile(code=(Code(path),))) == [problem]


@pytest.mark.parametrize("part_type", ["-x", ".x", "a b", "a" * 65, "é", "x\n"])
def test_the_type_of_a_part_is_a_word(part_type):
    (problem,) = problems(Kitfile(model=Model(parts=(ModelPart("p", "p", type=part_type),))))

    assert "for modelpart p: must be" in problem


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        (
            Dataset("d", "p", remote_hash="x"),
            "remote hash is only applicable when remotePath is set (dataset d)",
        ),
        (Dataset("d", "p", "https://x/y"), "HTTP urls are not supported in paths (https://x/y)"),
        (
            Dataset("d", "p", "s3://b/k"),
            "remoteHash is required for s3://b/k (dataset d): the ETag of the object, without quotes",
        ),
        (
            Dataset("d", "p", "elsewhere"),
            "invalid remotePath elsewhere in dataset d: wanted s3://bucket/key or a ModelKit reference",
        ),
        (
            Dataset("", "/p", "org/kit:v1"),
            "absolute paths are not supported in a Kitfile (path /p in dataset layer 0)",
        ),
    ],
)
def test_remote_datasets_say_where_and_what(dataset, problem):
    assert problems(Kitfile(datasets=(dataset,))) == [problem]


@pytest.mark.parametrize(("folder", "path"), [("data", "data/x/y.csv"), (".", "code")])
def test_nothing_lies_inside_what_another_kit_fills(folder, path):
    kitfile = Kitfile(datasets=(Dataset("d", folder, "org/kit:v1"),), code=(Code(path),))

    assert problems(kitfile) == [
        f"path {path} in code layer 0 lies inside {folder}, which dataset d fills from another ModelKit"
    ]


def test_mcp_servers_have_a_bundle_and_a_name_of_their_own():
    servers = (McpServer("a", "a.mcpb"), McpServer("a", "b.mcpb"), McpServer("", "c.zip"))

    assert problems(Kitfile(mcp_servers=servers)) == [
        "mcpServers[0] and mcpServers[1] have the same name a",
        "mcpServers[2] needs a name",
        "mcpServers[2] needs a path that ends in .mcpb (path c.zip)",
    ]


def test_what_stops_nothing_is_a_warning():
    assert list(warnings_of(Kitfile("1.0.0"))) == []
    assert list(warnings_of(Kitfile("1.0", datasets=(Dataset("d", "p", "org/kit:v1", "etag"),)))) == [
        "Unrecognized manifestVersion '1.0': treating Kitfile as 1.0.0",
        "remoteHash is ignored for a ModelKit reference (dataset d)",
    ]


@pytest.mark.parametrize(("path", "clean"), [("", "."), ("./a/", "a"), ("a//b/../c", "a/c"), ("..", "..")])
def test_paths_are_cleaned_as_words(path, clean):
    assert clean_path(path) == clean

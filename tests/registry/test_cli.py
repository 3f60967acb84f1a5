"""`modelkit-registry` from a shell: what it prints, what it refuses and with which status."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import aiohttp
import pytest
from aiohttp import http_parser
from click.testing import CliRunner, Result

from registry import cli

ROOT = Path(__file__).parents[2]
SOON_S = 20.0


def run(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(cli.main, arguments, env=environ)


def test_verify_says_ok_or_every_problem(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yml", tmp_path / "bad.yml"
    good.write_text("version: 0.1")
    bad.write_text("storge: {}\nlog: {levl: info}")

    said_good, said_bad = run("verify", str(good)), run("verify", str(bad))

    assert (said_good.exit_code, said_good.output) == (0, f"{good}: ok\n")
    assert said_bad.exit_code == 1
    assert said_bad.stderr.splitlines() == [
        "log.levl: unknown key; did you mean level?",
        "storge: unknown key; did you mean storage?",
    ]


def test_verify_reads_the_variables_that_serve_will_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("auth: {token: {}, htpasswd: {path: /dev/null}}")

    alone = run("verify", str(file))
    completed = run("verify", str(file), MODELREG_HTTP_HOST="https://registry.example")
    wrong = run("verify", str(file), MODELREG_HTTP_HOST="https://registry.example", MODELREG_NONSENSE="x")
    foreign = run("verify", str(file), REGISTRY_HTTP_HOST="https://registry.example", REGISTRY_REDIS_ADDR="x")

    assert alone.exit_code == 1
    assert (completed.exit_code, completed.output) == (0, f"{file}: ok\n")
    assert (wrong.exit_code, wrong.stderr) == (1, "MODELREG_NONSENSE: unknown key 'nonsense'\n")
    assert (foreign.exit_code, foreign.stdout) == (0, f"{file}: ok\n")
    assert foreign.stderr.startswith("REGISTRY_REDIS_ADDR: ignored: ")


def test_the_schema_is_json() -> None:
    assert json.loads(run("schema").output)["properties"]["storage"]


def test_the_version_is_the_distributions() -> None:
    own = importlib.metadata.version("modelkit-registry")

    assert run("version").output == f"modelkit-registry {own}\n"
    assert (
        json.loads(run("version", "--json").output).items()
        >= {"version": own, "aiohttp": aiohttp.__version__}.items()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--config", "none.yml"], "cannot be read"),
        (["serve", "--listen", "everywhere"], "http.addr: should be an address"),
        (["serve", "--storage", "ftp://x/y"], "is not a folder, file:///FOLDER, s3://BUCKET or memory:"),
        (["serve", "--storage", "s3:///prefix"], "is not a folder, file:///FOLDER, s3://BUCKET or memory:"),
        (["serve", "--workers", "-1"], "--workers"),
        (["serve", "--storage", "memory:", "--workers", "2"], "needs workers: 1"),
        (["serve", "config.yml"], "unexpected extra argument"),
        (["sarve"], "No such command"),
    ],
)
def test_wrong_usage_is_said_with_status_2(arguments: list[str], said: str) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert said in result.stderr


def test_a_wrong_variable_is_status_2() -> None:
    result = run("serve", MODELREG_STORAGE_DURABILITY="half")

    assert result.exit_code == 2
    assert "storage.durability: should be 'full' or 'none', not 'half'" in result.stderr


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("/data", {"storage.filesystem.rootdirectory": "/data"}),
        ("var/x", {"storage.filesystem.rootdirectory": "var/x"}),
        ("file:///data/a%20b", {"storage.filesystem.rootdirectory": "/data/a b"}),
        ("memory:", {"storage.inmemory": {}}),
        ("s3://models", {"storage.s3.bucket": "models"}),
        ("s3://models/a/b", {"storage.s3.bucket": "models", "storage.s3.rootdirectory": "/a/b"}),
    ],
)
def test_storage_is_a_folder_or_a_url(text: str, overrides: dict[str, object]) -> None:
    assert cli.StorageLocation().convert(text, None, None) == overrides


def test_V_62_this_installation_is_sound() -> None:
    assert cli.unsound_installation() is None


def test_V_62_an_old_aiohttp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiohttp, "__version__", "3.14.4")

    assert "known security holes" in str(cli.unsound_installation())
    assert run("serve", "--listen", "127.0.0.1:0").exit_code == 1


def test_V_62_the_parser_in_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)

    assert "without its C parser" in str(cli.unsound_installation())


def test_another_owner_of_our_import_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "packages_distributions", lambda: {"registry": ["registry", "modelkit-registry"]}
    )

    assert "another distribution, registry, also installs 'registry'" in str(cli.unsound_installation())


def test_every_option_is_in_the_manual() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()

    for command in cli.main.commands.values():
        assert f"modelkit-registry {command.name}" in manual
        for parameter in command.params:
            assert all(option in manual for option in parameter.opts if option.startswith("--"))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_says_where_it_serves_and_what_to_try_and_drains(tmp_path: Path, workers: str) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-c",
            "from registry.cli import main; main()",
            "serve",
            "--hints",
            "--listen",
            "127.0.0.1:0",
            "--storage",
            str(tmp_path / "store"),
            "--workers",
            workers,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        match = re.search(r"pack \. -t (127\.0\.0\.1:\d+)/team/demo:v1", lines[2])
        assert match
        with urlopen(f"http://{match[1]}/v2/", timeout=SOON_S) as answer:
            assert answer.status == 200
        process.terminate()
        _, log = process.communicate(timeout=SOON_S)

    assert process.returncode == 0
    assert (
        f" info serving address={match[1]} storage={tmp_path / 'store'} durability=full workers={workers} "
        in log
    )
    assert "unpack" in lines[4]

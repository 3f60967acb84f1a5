"""Credential files and helpers: the right host's, from the right place, and nobody else's."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kitclient.credentials import Credential, CredentialFile, Credentials, canonical_host
from kitclient.errors import CredentialsUnusable


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kit" / "credentials.json"


def given(path: Path, document: Any) -> CredentialFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return CredentialFile(path, environment={"PATH": str(path.parent)})


def helper(path: Path, script: str, name: str = "test") -> None:
    program = path.parent / f"docker-credential-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("reg.example", "reg.example"),
        ("REG.Example", "reg.example"),
        ("reg.example.", "reg.example"),
        ("reg.example:443", "reg.example"),
        ("reg.example:5000", "reg.example:5000"),
        ("reg.example:80", "reg.example:80"),
        ("https://reg.example/v1/", "reg.example"),
        ("http://reg.example:80/", "reg.example"),
        ("http://reg.example:443/", "reg.example:443"),
        ("[::1]:5000", "[::1]:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("docker.io", "docker.io"),
    ],
)
def test_C_31_a_host_has_one_spelling(text, host):
    assert canonical_host(text) == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "a\nb",
        "a\0b",
        "reg.example/team",
        "user@reg.example",
        "a:b",
        "a:123456",
        "ä.example",
        "a\\b",
    ],
)
def test_C_31_what_is_no_host_is_refused(text):
    with pytest.raises(CredentialsUnusable):
        canonical_host(text)


@pytest.mark.parametrize(
    "asked",
    [
        "reg.example.evil.com",
        "evil-reg.example",
        "example",
        "reg.example:5000",
        "sub.reg.example",
        "docker.io",
    ],
)
async def test_C_31_and_C_32_no_other_hosts_credentials_are_used(path, asked):
    store = given(path, {"auths": {"reg.example": {"auth": encoded("u:p")}}})

    assert await store.get(asked) is None


async def test_C_31_an_entry_for_a_part_of_a_host_is_not_the_hosts(path):
    store = given(path, {"auths": {"reg.example/team": {"auth": encoded("u:p")}}})

    assert await store.get("reg.example") is None


@pytest.mark.parametrize(
    "key", ["reg.example", "https://reg.example", "https://reg.example/v1/", "REG.EXAMPLE:443"]
)
async def test_C_31_every_spelling_of_the_host_finds_its_entry(path, key):
    store = given(path, {"auths": {key: {"auth": encoded("u:p:with:colons")}}})

    assert await store.get("reg.example") == Credential("u", "p:with:colons")


@pytest.mark.parametrize(
    ("entry", "credential"),
    [
        ({"auth": encoded("u:p")}, Credential("u", "p")),
        ({"username": "u", "password": "p"}, Credential("u", "p")),
        ({"auth": encoded("a:b"), "username": "u", "password": "p"}, Credential("a", "b")),
        ({"identitytoken": "i"}, Credential(identity_token="i")),
        ({"auth": encoded("u:"), "identitytoken": "i"}, Credential("u", "", "i")),
        ({"registrytoken": "r"}, Credential(registry_token="r")),
        ({}, None),
    ],
    ids=str,
)
async def test_each_form_of_an_entry_is_understood(path, entry, credential):
    assert await given(path, {"auths": {"reg.example": entry}}).get("reg.example") == credential


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        '{"auths": []}',
        '{"auths": {"reg.example": 5}}',
        '{"auths": {"reg.example": {"auth": "canary!"}}}',
        '{"auths": {"reg.example": {"auth": "Y2FuYXJ5"}}}',
        '{"auths": {"reg.example": {"username": 5}}}',
        '{"credHelpers": {"reg.example": "../../bin/sh"}}',
        '{"credHelpers": {"reg.example": 5}}',
        '{"credsStore": "a b"}',
        "[" * 100_000,
        " " * (5 * 1024 * 1024),
    ],
    ids=lambda text: text[:50],
)
async def test_C_35_and_C_36_a_broken_file_is_an_error_and_not_anonymous(path, document):
    with pytest.raises(CredentialsUnusable) as refusal:
        await given(path, document).get("reg.example")

    assert "canary" not in str(refusal.value)


async def test_C_36_a_file_that_is_missing_or_empty_knows_nothing(path):
    assert await CredentialFile(path).get("reg.example") is None
    assert await given(path, "").get("reg.example") is None


async def test_C_36_what_is_stored_is_for_its_owner_only_and_unknown_keys_stay(path):
    store = given(path, {"unknown": [1], "auths": {"b.example": {"auth": encoded("x:y"), "email": "e"}}})
    path.chmod(0o644)

    await store.store("A.example:443", Credential("u", "p"))

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text()) == {
        "unknown": [1],
        "auths": {"b.example": {"auth": encoded("x:y"), "email": "e"}, "a.example": {"auth": encoded("u:p")}},
    }
    assert path.read_text().startswith("{\n\t")
    assert await store.get("a.example") == Credential("u", "p")


async def test_C_36_a_new_file_is_made_in_a_folder_for_its_owner_only(path):
    await CredentialFile(path).store("reg.example", Credential(identity_token="i"))

    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert await CredentialFile(path).get("reg.example") == Credential(identity_token="i")


async def test_C_36_a_linked_file_stays_where_it_is(path, tmp_path):
    real = tmp_path / "real.json"
    real.write_text("{}")
    path.parent.mkdir()
    path.symlink_to(real)

    await CredentialFile(path).store("reg.example", Credential("u", "p"))

    assert path.is_symlink()
    assert "reg.example" in real.read_text()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to itself"])
async def test_C_36_what_is_no_file_is_an_error_and_not_waited_for(path, kind):
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "link to itself" else path.parent / "nowhere" / "file")

    for action in (CredentialFile(path).get, CredentialFile(path).erase):
        if kind == "link to nothing" and action.__name__ == "get":
            assert await action("reg.example") is None
            continue
        with pytest.raises(CredentialsUnusable, match=str(path)):
            await action("reg.example")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
async def test_C_36_another_users_file_is_read_and_becomes_ours_when_it_is_written(path):
    store = given(path, {"auths": {"reg.example": {"auth": encoded("u:p")}}})
    os.chown(path, 12345, 12345)

    assert await store.get("reg.example") == Credential("u", "p")
    await store.store("b.example", Credential("u", "p"))

    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (0, 0o600)


async def test_C_36_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    store = given(path, {"auths": {"reg.example": {"auth": encoded("u:p")}}})
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kitclient.credentials.json.dump", full)
    with pytest.raises(CredentialsUnusable, match="No space"):
        await store.store("b.example", Credential("u", "p"))

    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == [path.name]


async def test_C_36_writers_at_once_lose_nothing(path):
    hosts = [f"host{number}.example" for number in range(20)]

    await asyncio.gather(*(CredentialFile(path).store(host, Credential("u", host)) for host in hosts))

    for host in hosts:
        assert await CredentialFile(path).get(host) == Credential("u", host)


async def test_every_spelling_of_a_host_is_forgotten(path):
    entry = {"auth": encoded("u:p")}
    store = given(
        path, {"auths": {"reg.example": entry, "https://reg.example/v1/": entry, "b.example": entry}}
    )

    await store.erase("reg.example")
    await store.erase("never.example")

    assert json.loads(path.read_text()) == {"auths": {"b.example": entry}}


async def test_docker_hub_is_filed_under_its_old_name(path):
    await CredentialFile(path).store("docker.io", Credential("u", "p"))

    assert list(json.loads(path.read_text())["auths"]) == ["https://index.docker.io/v1/"]
    assert await CredentialFile(path).get("registry-1.docker.io") == Credential("u", "p")


def test_C_37_a_password_in_a_registrys_name_is_not_repeated():
    with pytest.raises(CredentialsUnusable, match=r"reg\.example") as refusal:
        canonical_host("https://user:canary@reg.example/")

    assert "canary" not in str(refusal.value)


async def test_our_own_file_is_asked_first_and_then_dockers(tmp_path):
    docker = tmp_path / "docker"
    given(
        docker / "config.json",
        {"auths": {host: {"auth": encoded("docker:d")} for host in ("a.example", "b.example")}},
    )
    given(tmp_path / "own.json", {"auths": {"a.example": {"auth": encoded("own:o")}}})
    both = Credentials(tmp_path / "own.json", environment={"DOCKER_CONFIG": str(docker)})

    assert await both.get("a.example") == Credential("own", "o")
    assert await both.get("b.example") == Credential("docker", "d")
    assert await both.get("c.example") is None
    await both.erase("b.example")
    assert await both.get("b.example") == Credential("docker", "d")


async def test_an_error_in_our_own_file_stops_the_search(tmp_path):
    docker = tmp_path / "docker"
    given(docker / "config.json", {"auths": {"a.example": {"auth": encoded("docker:d")}}})
    given(tmp_path / "own.json", "{")

    with pytest.raises(CredentialsUnusable):
        await Credentials(tmp_path / "own.json", environment={"DOCKER_CONFIG": str(docker)}).get("a.example")


# ---- helpers


async def test_C_34_a_helper_is_asked_by_its_protocol(path):
    answer = json.dumps({"ServerURL": "reg.example", "Username": "u", "Secret": "s"})
    helper(path, f"""printf '%s %s' "$1" "$(cat)" > {path}.asked; echo '{answer}'""")

    assert await given(path, {"credsStore": "test"}).get("reg.example") == Credential("u", "s")

    assert Path(f"{path}.asked").read_text() == "get reg.example"


async def test_C_34_a_token_user_means_an_identity_token(path):
    helper(path, """cat > /dev/null; echo '{"Username": "<token>", "Secret": "i"}'""")

    assert await given(path, {"credsStore": "test"}).get("reg.example") == Credential(identity_token="i")


async def test_C_34_a_hosts_helper_comes_before_the_store_and_the_store_before_the_file(path):
    helper(path, """cat > /dev/null; echo '{"Username": "hosts", "Secret": "s"}'""", "hosts")
    helper(path, """cat > /dev/null; echo '{"Username": "store", "Secret": "s"}'""", "store")
    document = {
        "credHelpers": {"https://a.example": "hosts"},
        "credsStore": "store",
        "auths": {host: {"auth": encoded("file:p")} for host in ("a.example", "b.example")},
    }
    store = given(path, document)

    assert await store.get("a.example") == Credential("hosts", "s")
    assert await store.get("b.example") == Credential("store", "s")
    del document["credsStore"]
    assert await given(path, document).get("b.example") == Credential("file", "p")


async def test_C_34_a_helper_that_knows_nothing_is_no_error(path):
    helper(path, "cat > /dev/null; echo 'credentials not found in native keychain'; exit 1")

    assert await given(path, {"credsStore": "test"}).get("reg.example") is None


async def test_C_34_helpers_store_and_erase(path):
    helper(path, f"""printf '%s %s\\n' "$1" "$(cat)" >> {path}.asked""")
    store = given(path, {"credsStore": "test"})

    await store.store("reg.example", Credential("u", "p"))
    await store.store("reg.example", Credential(identity_token="i"))
    await store.erase("reg.example")

    first, second, third = Path(f"{path}.asked").read_text().splitlines()
    assert json.loads(first.removeprefix("store ")) == {
        "ServerURL": "reg.example",
        "Username": "u",
        "Secret": "p",
    }
    assert json.loads(second.removeprefix("store "))["Username"] == "<token>"
    assert third == "erase reg.example"
    assert "auth" not in json.loads(path.read_text()).get("auths", {})


async def test_C_37_what_a_helper_has_stored_is_no_longer_in_the_file(path):
    helper(path, "cat > /dev/null")
    entry = {"auth": encoded("u:old-canary")}
    auths = {"reg.example": entry, "https://reg.example/v1/": entry, "b.example": entry}
    store = given(path, {"credsStore": "test", "auths": auths})

    await store.store("reg.example", Credential("u", "new"))

    assert json.loads(path.read_text()) == {"credsStore": "test", "auths": {"b.example": entry}}


async def test_C_37_a_helper_that_fails_to_store_leaves_the_file_as_it_was(path):
    helper(path, "cat > /dev/null; exit 1")
    store = given(path, {"credsStore": "test", "auths": {"reg.example": {"auth": encoded("u:old")}}})
    before = path.read_bytes()

    with pytest.raises(CredentialsUnusable, match="store failed"):
        await store.store("reg.example", Credential("u", "new"))

    assert path.read_bytes() == before


async def test_a_file_that_has_no_password_of_the_host_is_not_written_for_a_helper(path):
    helper(path, "cat > /dev/null")
    store = given(path, {"credsStore": "test", "auths": {"reg.example": {}}})
    before = path.stat()

    await store.store("reg.example", Credential("u", "new"))

    assert path.stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    "words",
    ["credentials not found in native keychain", "The specified item could not be found in the keychain."],
)
async def test_C_34_a_helper_that_has_nothing_to_erase_is_no_error(path, words):
    helper(path, f"cat > /dev/null; echo '{words}'; exit 1")

    await given(path, {"credsStore": "test"}).erase("reg.example")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'keychain is locked'; exit 1", "status 1 and said 'keychain is locked'"),
        ("exit 3", "status 3 and said nothing"),
        ("printf 'a\\033[2Jb'; exit 1", r"said 'a\\x1b\[2Jb'"),
        ("head -c 10000 /dev/zero | tr '\\0' x; exit 1", "said 'x{200}'"),
    ],
)
async def test_C_35_a_helper_that_does_not_erase_is_an_error_and_what_the_file_had_is_gone(
    path, script, words
):
    helper(path, f"cat > /dev/null; {script}")
    entries = {host: {"auth": encoded("u:canary")} for host in ("reg.example", "b.example")}
    store = given(path, {"credsStore": "test", "auths": entries})

    with pytest.raises(CredentialsUnusable, match=words) as refusal:
        await store.erase("reg.example")

    assert "still have the credential of reg.example" in str(refusal.value)
    assert list(json.loads(path.read_text())["auths"]) == ["b.example"]


async def test_where_a_credential_is_found_is_said(tmp_path):
    docker = tmp_path / "docker" / "config.json"
    helper(docker, """cat > /dev/null; echo '{"Username": "u", "Secret": "s"}'""")
    entry = {"auth": encoded("u:p")}
    given(docker, {"credHelpers": {"b.example": "test"}, "auths": {"a.example": entry, "c.example": entry}})
    given(tmp_path / "own.json", {"auths": {"a.example": entry}})
    environment = {"DOCKER_CONFIG": str(docker.parent), "PATH": str(docker.parent)}
    both = Credentials(tmp_path / "own.json", environment=environment)

    assert await both.origin("a.example") == str(tmp_path / "own.json")
    assert await both.origin("b.example") == f"docker-credential-test, which {docker} names"
    assert await both.origin("c.example") == str(docker)
    assert await both.origin("d.example") is None


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "echo no; exit 2",
        "echo '{'",
        "echo '[]'",
        'echo \'{"Username": 1, "Secret": 2}\'',
        "head -c 100000 /dev/zero",
    ],
)
async def test_C_35_a_helper_that_fails_is_an_error(path, script):
    helper(path, f"cat > /dev/null; {script}")

    with pytest.raises(CredentialsUnusable, match="docker-credential-test"):
        await given(path, {"credsStore": "test"}).get("reg.example")


@pytest.mark.parametrize(
    "script", ["exec sleep 60", "exec >&-; exec sleep 60", "echo '{}'; exec >&-; exec sleep 60"]
)
async def test_C_35_a_helper_that_hangs_is_ended(path, monkeypatch, script):
    monkeypatch.setattr("kitclient.credentials._HELPER_TIMEOUT_S", 0.3)
    helper(path, f"echo $$ > {path}.pid; {script}")

    with pytest.raises(CredentialsUnusable, match="no answer"):
        await given(path, {"credsStore": "test"}).get("reg.example")

    with pytest.raises(ProcessLookupError):
        os.kill(int(Path(f"{path}.pid").read_text()), 0)


async def test_C_35_a_helper_is_not_run_from_the_folder_that_we_are_in(path, monkeypatch):
    helper(path, f"touch {path}.ran")
    monkeypatch.chdir(path.parent)
    given(path, {"credsStore": "test"})

    for search in (".", "", "kit"):
        with pytest.raises(CredentialsUnusable, match="not on the PATH"):
            await CredentialFile(path, environment={"PATH": search}).get("reg.example")

    assert not Path(f"{path}.ran").exists()


@pytest.mark.parametrize(
    "name", ["../test", "a/b", "..", "a b", "a;b", "$(id)", "a\nb", "ä", "-test", "x" * 5000], ids=ascii
)
async def test_C_35_a_helper_has_a_plain_name(path, name):
    helper(path, f"touch {path}.ran")

    for document in ({"credsStore": name}, {"credHelpers": {"reg.example": name}}):
        with pytest.raises(CredentialsUnusable):
            await given(path, document).get("reg.example")

    assert not Path(f"{path}.ran").exists()


@pytest.mark.parametrize(
    "host", ["reg.example\nother.example", "reg\rexample", "\0reg.example", "reg.example\0"]
)
async def test_C_35_a_helper_is_asked_for_one_host_only(path, host):
    helper(path, f"cat > {path}.asked; echo '{{}}'")
    store = given(path, {"credsStore": "test"})

    for action in (store.get, store.erase, lambda host: store.store(host, Credential("u", "p"))):
        with pytest.raises(CredentialsUnusable):
            await action(host)

    assert not Path(f"{path}.asked").exists()


async def test_C_35_a_helper_that_reads_nothing_is_not_waited_for(path, monkeypatch):
    monkeypatch.setattr("kitclient.credentials._HELPER_TIMEOUT_S", 0.3)
    helper(path, "exec sleep 60")
    store = given(path, {"credsStore": "test"})

    with pytest.raises(CredentialsUnusable, match="no answer"):
        await store.store("reg.example", Credential("u", "p" * 10_000))
    with pytest.raises(CredentialsUnusable, match="at most"):
        await store.store("reg.example", Credential("u", "p" * 100_000))


async def test_C_37_a_helpers_secret_is_on_no_command_line(path):
    helper(path, f"""printf '%s' "$*" > {path}.arguments; env > {path}.environment; cat > /dev/null""")

    await given(path, {"credsStore": "test"}).store("reg.example", Credential("u", "canary"))

    assert Path(f"{path}.arguments").read_text() == "store"
    assert "canary" not in Path(f"{path}.environment").read_text()


async def test_C_35_a_helper_that_is_missing_is_named(path):
    with pytest.raises(CredentialsUnusable, match="docker-credential-nowhere"):
        await given(path, {"credsStore": "nowhere"}).get("reg.example")


def test_a_secret_is_not_shown():
    credential = Credential("u", "canary-1", "canary-2", "canary-3")

    assert "canary" not in f"{credential} {credential!r}"

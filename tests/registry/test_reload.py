"""A new configuration while the registry serves. The process tests run the real command."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from click.testing import CliRunner

from registry.cli import main
from registry.config import Config
from registry.config_sources import ConfigInvalid, load_config
from registry.reload import ConfigSource, file_problems, followed_files, kept_until_restart, reloaded

SOON_S = 30.0
# Of a blob of four bytes, two.
_BEGUN_UPLOAD = (
    f"POST /v2/team/llm/blobs/uploads/?digest=sha256:{hashlib.sha256(b'abcd').hexdigest()} HTTP/1.1\r\nHost: x\r\n"
    "Content-Length: 4\r\nContent-Type: application/octet-stream\r\n\r\nab"
).encode()


@dataclass
class Registry:
    """The command, with a configuration that a test changes."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    port: int = 0

    def configure(self, **settings: Any) -> None:
        configure(self.folder, **settings)

    def header(self) -> str | None:
        """The value of X-Generation in an answer."""
        with urlopen(f"http://127.0.0.1:{self.port}/v2/", timeout=SOON_S) as answer:
            return answer.headers["X-Generation"]

    def soon_says(self, value: str, times: int) -> bool:
        """Whether so many answers in a row come from a generation: it is the only one that accepts."""
        ends = time.monotonic() + SOON_S
        seen = 0
        while seen < times and time.monotonic() < ends:
            seen = seen + 1 if self.header() == value else 0
        return seen == times

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]

    def logged(self, text: str, count: int = 1) -> bool:
        ends = time.monotonic() + SOON_S
        while time.monotonic() < ends:
            if (self.folder / "log").read_text().count(text) >= count:
                return True
            time.sleep(0.02)
        return False

    def logged_after(self, first: str, pattern: str) -> bool:
        ends = time.monotonic() + SOON_S
        while time.monotonic() < ends:
            _, _, after = (self.folder / "log").read_text().partition(first)
            if re.search(pattern, after, re.MULTILINE):
                return True
            time.sleep(0.02)
        return False


def configure(folder: Path, *, auth: dict[str, Any] | None = None, **http: Any) -> None:
    """Put another file in the place of the configuration, at once."""
    tree = ({} if auth is None else {"auth": auth}) | {
        "storage": {"filesystem": {"rootdirectory": str(folder / "store")}, "durability": "none"},
        "http": {"addr": "127.0.0.1:0", "draintimeout": 5, **http},
    }
    (folder / "next").write_text(json.dumps(tree))
    (folder / "next").replace(folder / "config.yml")


Start = Callable[[int], Registry]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Registry] = []

    def starting(workers: int) -> Registry:
        configure(tmp_path, headers={"X-Generation": "1"})
        with (tmp_path / "log").open("w") as errors:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from registry.cli import main; main()",
                    "serve",
                    "--config",
                    str(tmp_path / "config.yml"),
                    "--workers",
                    str(workers),
                ],
                stderr=errors,
                stdout=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TMPDIR": str(tmp_path)},
            )
        registry = Registry(process, tmp_path)
        running.append(registry)
        assert registry.logged(" serving ")
        match = re.search(r"address=\S*?:(\d+)", (tmp_path / "log").read_text())
        assert match is not None
        registry.port = int(match[1])
        return registry

    yield starting
    for registry in running:
        if registry.process.poll() is None:
            registry.process.terminate()
        try:
            registry.process.wait(SOON_S)
        finally:
            registry.process.kill()


@pytest.mark.parametrize("workers", [1, 2])
def test_hangup_brings_the_new_configuration_to_every_worker(start: Start, workers: int) -> None:
    registry = start(workers)

    registry.configure(headers={"X-Generation": "2"})
    registry.process.send_signal(signal.SIGHUP)

    assert registry.logged("reload.done", workers)
    assert registry.soon_says("2", 20)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changed_is_taken_over_without_a_signal(start: Start, workers: int) -> None:
    registry = start(workers)

    registry.configure(headers={"X-Generation": "2"})

    assert registry.logged("reload.done", workers)
    assert registry.soon_says("2", 20)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_be_used_changes_nothing_and_every_problem_is_logged(
    start: Start, workers: int
) -> None:
    registry = start(workers)

    registry.configure(headers={"X-Generation": "2"}, prefix="no slash", nonsense=1)
    registry.process.send_signal(signal.SIGHUP)

    assert registry.logged("http.prefix: should begin and end with a slash")
    assert registry.logged("http.nonsense: unknown key")
    assert registry.header() == "1"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_was_missing_is_taken_over_when_it_comes(start: Start, workers: int) -> None:
    registry = start(workers)
    users = registry.folder / "htpasswd"

    registry.configure(headers={"X-Generation": "2"}, auth={"htpasswd": {"path": str(users)}})
    assert registry.logged("reload.refused")
    users.touch()

    assert registry.logged("reload.done", workers)
    assert (registry.folder / "log").read_text().count("reload.refused") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_new_application_that_cannot_start_leaves_the_old_one_serving(start: Start, workers: int) -> None:
    registry = start(workers)
    tree = json.loads((registry.folder / "config.yml").read_text())
    (registry.folder / "file").write_text("no folder")
    tree["storage"]["filesystem"]["rootdirectory"] = str(registry.folder / "file")
    tree["http"]["headers"] = {"X-Generation": "2"}
    (registry.folder / "config.yml").write_text(json.dumps(tree))

    registry.process.send_signal(signal.SIGHUP)

    assert registry.logged("reload.failed", workers)
    assert registry.header() == "1"


def test_a_worker_that_crashes_after_that_comes_back_with_what_had_served(start: Start) -> None:
    registry = start(2)
    tree = json.loads((registry.folder / "config.yml").read_text())
    (registry.folder / "file").write_text("no folder")
    tree["storage"]["filesystem"]["rootdirectory"] = str(registry.folder / "file")
    (registry.folder / "config.yml").write_text(json.dumps(tree))
    registry.process.send_signal(signal.SIGHUP)
    assert registry.logged("reload.failed", 2)

    os.kill(registry.workers()[0], signal.SIGKILL)  # number 0, the first that was started

    # The one in its place serves, is told of the new configuration, and goes on with the old.
    assert registry.logged_after("worker.ended number=0", r"reload\.failed .* worker=0$")
    assert registry.header() == "1"
    assert (registry.folder / "log").read_text().count("worker.ended") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_what_only_a_restart_changes_is_said_and_the_rest_taken_over(start: Start, workers: int) -> None:
    registry = start(workers)

    registry.configure(headers={"X-Generation": "2"}, addr="127.0.0.1:1")
    registry.process.send_signal(signal.SIGHUP)

    assert registry.logged("reload.done", workers)
    assert registry.soon_says("2", 5)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_upload_that_is_under_way_is_finished_by_whom_it_began_with(start: Start, workers: int) -> None:
    registry = start(workers)
    with socket.create_connection(("127.0.0.1", registry.port), SOON_S) as peer:
        peer.sendall(_BEGUN_UPLOAD)

        registry.configure(headers={"X-Generation": "2"})
        registry.process.send_signal(signal.SIGHUP)
        assert registry.logged("reload.done", workers)
        assert registry.soon_says("2", 20)
        peer.sendall(b"cd")
        answer = peer.recv(65536)

    assert answer.startswith(b"HTTP/1.1 201 ")
    assert b"X-Generation: 1\r\n" in answer


@pytest.mark.parametrize("workers", [1, 2])
def test_B_209_an_upload_whose_bytes_are_on_their_way_is_finished_before_the_end(
    start: Start, workers: int
) -> None:
    registry = start(workers)
    with socket.create_connection(("127.0.0.1", registry.port), SOON_S) as peer:
        peer.sendall(_BEGUN_UPLOAD)
        assert registry.header() == "1"  # so the upload is being answered

        registry.process.send_signal(signal.SIGTERM)
        assert registry.logged("drain.started", workers)
        peer.sendall(b"cd")

        assert peer.recv(65536).startswith(b"HTTP/1.1 201 ")
    assert registry.process.wait(SOON_S) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_no_request_fails_while_the_configuration_changes_again_and_again(start: Start, workers: int) -> None:
    registry = start(workers)

    for number in range(2, 6):
        registry.configure(headers={"X-Generation": str(number)})
        registry.process.send_signal(signal.SIGHUP)
        assert registry.soon_says(str(number), 20)  # each of these is a connection of its own, and none fails


def test_a_connection_that_has_not_asked_yet_is_still_answered(start: Start) -> None:
    registry = start(1)
    with socket.create_connection(("127.0.0.1", registry.port), SOON_S) as peer:
        peer.sendall(b"GET /v2/ HT")
        registry.configure(headers={"X-Generation": "2"})
        registry.process.send_signal(signal.SIGHUP)
        assert registry.logged("reload.done")
        assert registry.soon_says("2", 20)

        peer.sendall(b"TP/1.1\r\nHost: x\r\n\r\n")

        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_idle_connection_is_closed_at_once(start: Start) -> None:
    registry = start(1)
    with socket.create_connection(("127.0.0.1", registry.port), SOON_S) as peer:
        peer.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")

        registry.configure(headers={"X-Generation": "2"})
        registry.process.send_signal(signal.SIGHUP)
        assert registry.logged("reload.done")

        assert peer.recv(65536) == b""


def test_a_connection_that_always_asks_is_answered_by_the_old_once_more_at_most(start: Start) -> None:
    registry = start(1)
    rest = b"ET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", registry.port), SOON_S) as peer:
        peer.sendall(b"G" + rest)
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
        peer.sendall(b"G")

        registry.configure(headers={"X-Generation": "2"})
        registry.process.send_signal(signal.SIGHUP)
        assert registry.logged("reload.done")
        assert registry.soon_says("2", 20)
        peer.sendall(rest + b"G")
        answer = b"".join(iter(lambda: peer.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close\r\n" in answer


def test_memory_is_not_given_up_for_a_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    running = Config.model_validate({"storage": "inmemory"})
    source = ConfigSource(running, None, environ={}, overrides={})

    assert reloaded(source, running) is None
    assert "reload.skipped" in caplog.text


def test_an_address_and_a_number_of_workers_are_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    running = Config.model_validate({"workers": 2, "http": {"addr": "127.0.0.1:5000"}})
    wanted = Config.model_validate(
        {"workers": 3, "http": {"addr": "127.0.0.1:6000", "relativeurls": True}, "log": {"level": "debug"}}
    )

    kept = kept_until_restart(running, wanted)

    assert (kept.worker_count, kept.http.addr) == (2, "127.0.0.1:5000")
    assert kept.http.relativeurls
    assert kept.log.level == "debug"
    assert caplog.text.count("reload.needs_restart") == 2


def test_a_secret_in_a_file_is_followed_by_its_content_also_through_a_symlink(tmp_path: Path) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "secret").write_text(version)
    (tmp_path / "data").symlink_to("one")
    config_file = tmp_path / "config.yml"
    config_file.write_text(json.dumps({"http": {"secret_file": str(tmp_path / "data" / "secret")}}))
    running = load_config(config_file).config
    source = ConfigSource(running, config_file, environ={}, overrides={})
    before = source.has_changed(running)

    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "data")

    looks = [source.has_changed(running) for _ in range(3)]
    assert (before, *looks) == (False, False, True, False)
    secret = source.load(running).http.secret
    assert secret is not None
    assert secret.get_secret_value() == "two"


def test_a_file_that_is_being_written_is_read_when_it_has_come_to_rest(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("log: {level: info}")
    running = load_config(file).config
    source = ConfigSource(running, file, environ={}, overrides={})

    looks = []
    for text in ("", "log:", "log: {level: ", "log: {level: warn}", "log: {level: warn}"):
        if file.read_text() != text:
            file.write_text(text)
        looks.append(source.has_changed(running))

    assert looks == [False, False, False, False, True]


_GUARDED: dict[str, Any] = {
    "auth": {"apikeys": {}, "htpasswd": {"path": "{}"}},
    "http": {
        "accessControl": {"repositories": {"**": {"policies": [{"users": ["ann"], "actions": ["read"]}]}}}
    },
}


@pytest.mark.parametrize(
    ("left", "problems"),
    [
        ({}, ["auth", "http.accessControl"]),
        (
            {
                "http": _GUARDED["http"]
                | {"accessControl": {"repositories": {"**": {"anonymousPolicy": ["read"]}}}}
            },
            ["auth"],
        ),
        ({"auth": _GUARDED["auth"]}, ["http.accessControl"]),
    ],
)
def test_a_reload_opens_the_registry_to_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: dict[str, Any], problems: list[str]
) -> None:
    htpasswd, file = tmp_path / "htpasswd", tmp_path / "config.yml"
    htpasswd.write_text("")
    file.write_text(json.dumps(_GUARDED).replace('"{}"', json.dumps(str(htpasswd))))
    running = load_config(file).config
    source = ConfigSource(running, file, environ={}, overrides={})
    file.write_text(json.dumps(left).replace('"{}"', json.dumps(str(htpasswd))))

    assert reloaded(source, running) is None
    assert [record.fields["problem"].partition(": ")[0] for record in caplog.records] == problems  # type: ignore[attr-defined]

    file.write_text(json.dumps(_GUARDED).replace('"{}"', json.dumps(str(htpasswd))))
    assert reloaded(source, running) is not None


def test_files_that_something_else_follows_reload_nothing() -> None:
    config = Config.model_validate(
        {
            "auth": {"htpasswd": {"path": "/h"}},
            "http": {"tls": {"certificate": "/c", "key": "/k", "clientcas": ["/ca"]}},
        }
    )

    assert list(followed_files(config)) == [Path("/ca")]


def test_verify_opens_what_the_file_names_and_tells_every_problem_with_its_key(tmp_path: Path) -> None:
    htpasswd, jwks = tmp_path / "htpasswd", tmp_path / "jwks"
    htpasswd.write_text("alice:plain\n")
    jwks.write_text("[]")
    tree = {
        "auth": {
            "htpasswd": {"path": str(htpasswd)},
            "oidc": [{"issuer": "https://ci.example", "audiences": ["registry"], "jwks": str(jwks)}],
        },
        "http": {"tls": {"certificate": str(tmp_path / "absent"), "key": str(tmp_path / "absent")}},
    }
    file = tmp_path / "config.yml"
    file.write_text(json.dumps(tree))

    result = CliRunner().invoke(main, ["verify", str(file)])

    assert result.exit_code == 1
    assert {line.partition(": ")[0] for line in result.output.splitlines()} == {
        "http.tls.certificate",
        "http.tls.key",
        "auth.htpasswd.path",
        "auth.oidc.0.jwks",
    }


@pytest.mark.parametrize(
    "path", ["absent/audit.log", "file/audit.log", "folder", "locked/audit.log", "read-only", "x" * 300]
)
def test_an_audit_log_that_could_not_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for folder in ("folder", "locked"):
        (tmp_path / folder).mkdir()
    for file in ("file", "read-only"):
        (tmp_path / file).touch()
    # As root every folder can be written.
    locked = {tmp_path / "locked", tmp_path / "read-only"}
    monkeypatch.setattr("registry.reload.os.access", lambda path, _: path not in locked)
    before = sorted(tmp_path.rglob("*"))

    (problem,) = file_problems(Config.model_validate({"log": {"audit": str(tmp_path / path)}}))

    assert problem.startswith("log.audit: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["stdout", "/dev/null", "{}/audit.log", "{}/file"])
def test_an_audit_log_that_can_be_written_is_none_and_not_made_yet(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()

    assert file_problems(Config.model_validate({"log": {"audit": path.format(tmp_path)}})) == ()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_reload_refuses_what_verify_refuses(tmp_path: Path) -> None:
    running = Config()
    file = tmp_path / "config.yml"
    file.write_text(json.dumps({"auth": {"htpasswd": {"path": str(tmp_path / "absent")}}}))
    source = ConfigSource(running, file, environ={}, overrides={})

    with pytest.raises(ConfigInvalid, match=r"auth\.htpasswd\.path: .* cannot be read"):
        source.load(running)


def refused_for(tmp_path: Path, tree: dict[str, Any]) -> tuple[ConfigSource, Path]:
    """A source that was refused, and the configuration file."""
    file = tmp_path / "config.yml"
    file.write_text(json.dumps(tree))
    source = ConfigSource(Config(), file, environ={}, overrides={})
    assert reloaded(source, Config()) is None
    return source, file


def until_still(source: ConfigSource) -> None:
    """Look, and try again where something has changed, as the loop does; a refusal is tried once more and no oftener."""
    for _ in range(4):
        if source.has_changed(Config()):
            assert reloaded(source, Config()) is None
    assert not source.has_changed(Config())


@pytest.mark.parametrize(
    ("key", "tree"),
    [
        ("auth.htpasswd.path", {"auth": {"htpasswd": {"path": "{}"}}}),
        ("http.secret_file", {"http": {"secret_file": "{}"}}),
        ("log.audit", {"log": {"audit": "{}/audit.log"}}),
    ],
)
def test_files_of_a_configuration_that_was_refused_are_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, tree: dict[str, Any]
) -> None:
    missing = tmp_path / "missing"
    source, _ = refused_for(tmp_path, json.loads(json.dumps(tree).replace("{}", str(missing))))
    until_still(source)
    assert [record.fields["problem"].partition(": ")[0] for record in caplog.records] == [key]  # type: ignore[attr-defined]

    if key == "log.audit":
        missing.mkdir()
    else:
        missing.write_text("" if key == "auth.htpasswd.path" else "a secret of some length")

    assert [source.has_changed(Config()) for _ in range(2)] == [False, True]
    assert reloaded(source, Config()) is not None


def test_a_problem_is_told_once_until_somebody_asks_or_the_file_is_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users = tmp_path / "users"
    tree = {"auth": {"htpasswd": {"path": str(users)}}, "log": {"audit": str(tmp_path / "absent" / "a")}}
    source, file = refused_for(tmp_path, tree)

    def told() -> int:
        count = caplog.text.count("reload.refused")
        caplog.clear()
        return count

    assert told() == 2
    until_still(source)
    assert told() == 0
    users.write_text("alice:plain\n")  # another problem of the same file
    until_still(source)
    assert told() == 1
    source.tell_again()
    until_still(source)
    assert reloaded(source, Config()) is None
    assert told() == 2
    file.write_text(json.dumps(tree | {"http": {"relativeurls": True}}))
    until_still(source)
    assert told() == 2


def test_a_name_that_no_file_can_have_is_a_problem_and_no_more(tmp_path: Path) -> None:
    source, _ = refused_for(tmp_path, {"http": {"secret_file": "a\0b"}})

    until_still(source)


@pytest.mark.parametrize("content", [b"", b"\r\n", b"x" * 5000], ids=["nothing", "newline", "too much"])
def test_a_secret_that_nothing_could_be_signed_with_is_a_problem(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(content)
    endpoint = {"name": "ci", "url": "https://ci.example/", "secret_file": str(tmp_path / "secret")}
    config = Config.model_validate({"notifications": {"endpoints": [endpoint]}})

    (problem,) = file_problems(config)

    assert problem.startswith("notifications.endpoints.0.secret_file: ")
    assert problem.endswith("should hold 1 to 4096 bytes")


def test_a_configuration_without_files_has_no_problem_with_them() -> None:
    assert file_problems(Config()) == ()

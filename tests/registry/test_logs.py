"""Log lines: one each, bounded, harmless to read and harmless to lose."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp.http_exceptions import (
    BadHttpMessage,
    BadHttpMethod,
    BadStatusLine,
    HttpProcessingError,
    InvalidHeader,
    LineTooLong,
)

from registry import logs
from registry.config import Log
from registry.logs import AccessLog, RateGate, configure_logging, log_event, request_id
from tests.registry.conftest import configured, served
from tests.registry.wire import Wire

LOGGER = logging.getLogger("registry.test")
EVIL = 'a\r\nb\x1b[31m\x00\x7f\u202e\x85"=x'


@pytest.fixture
def kept_logging() -> Iterator[None]:
    root, server = logging.getLogger(), logging.getLogger("aiohttp.server")
    kept = root.handlers[:], root.level, server.filters[:]
    yield
    root.handlers[:], level, server.filters[:] = kept
    root.setLevel(level)
    for name in logs._CLIENTS_OF_THE_STORE:
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    logs._access_log = None


class Written:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    @property
    def lines(self) -> list[str]:
        return self._path.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def written(tmp_path: Path, kept_logging: None) -> Iterator[Written]:
    written = Written(tmp_path / "log")
    yield written
    os.close(written.descriptor)


def test_a_text_line_is_time_level_event_and_fields(written: Written) -> None:
    configure_logging(Log(fields={"zone": "eu"}), worker=3, descriptor=written.descriptor)
    token = request_id.set("abc")

    log_event(
        LOGGER,
        logging.INFO,
        "upload.committed",
        repository="team/demo",
        size=5,
        seconds=0.25,
        new=True,
        said="a b",
    )
    request_id.reset(token)

    (line,) = written.lines
    time, _, rest = line.partition(" ")
    assert time.endswith("Z")
    assert rest == (
        "info upload.committed request=abc repository=team/demo size=5 seconds=0.250000 new=true "
        'said="a b" zone=eu worker=3'
    )


def test_a_json_line_says_the_same(written: Written) -> None:
    configure_logging(Log(formatter="json"), descriptor=written.descriptor)

    log_event(LOGGER, logging.WARNING, "disk.full", free=5, path=EVIL)

    content = json.loads(written.lines[0])
    assert content.pop("time")
    assert content == {"level": "warn", "event": "disk.full", "free": 5, "path": EVIL}


@pytest.mark.parametrize("formatter", ["text", "json"])
def test_L_27_U_30_nothing_a_client_sends_makes_a_line_or_a_colour(written: Written, formatter: str) -> None:
    access = configure_logging(Log.model_validate({"formatter": formatter}), descriptor=written.descriptor)
    assert access is not None

    log_event(LOGGER, logging.INFO, "push", name=EVIL)
    LOGGER.info("a sentence about %s", EVIL)
    log_event(LOGGER, logging.ERROR, "broken", error=ValueError(EVIL))
    access.record(
        remote=EVIL,
        method=EVIL,
        path=EVIL,
        status=200,
        seconds=0,
        received=0,
        sent=0,
        agent=EVIL,
        identity=EVIL,
    )

    text = "\n".join(written.lines)
    assert len(written.lines) == 4 or formatter == "text"
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert all(line.startswith(("2", "{", "  | ")) for line in written.lines)


@pytest.mark.parametrize("formatter", ["text", "json"])
def test_L_27_a_line_has_at_most_8_kib(written: Written, formatter: str) -> None:
    configure_logging(Log.model_validate({"formatter": formatter}), descriptor=written.descriptor)

    log_event(LOGGER, logging.INFO, "many", **{f"field{number}": "\u20ac" * 1000 for number in range(20)})
    log_event(LOGGER, logging.INFO, "long", one="x" * 100_000)

    assert all(len(line) <= 8192 for line in written.lines)
    if formatter == "json":
        assert [json.loads(line)["event"] for line in written.lines] == ["many", "long"]


def test_L_27_a_flood_of_refusals_is_sampled_and_counted(written: Written) -> None:
    access = configure_logging(Log(), descriptor=written.descriptor)
    assert access is not None

    for status in [404] * 5000 + [200] * 10:
        access.record(
            remote="r",
            method="GET",
            path="/",
            status=status,
            seconds=0,
            received=0,
            sent=0,
            agent="",
            identity="i",
        )
    access.flush()

    refusals = sum("status=404" in line for line in written.lines)
    held = sum(int(line.rpartition("=")[2]) for line in written.lines if "access.suppressed" in line)
    assert refusals <= 3 * AccessLog.REFUSALS_PER_SECOND
    assert refusals + held == 5000
    assert sum("status=200" in line for line in written.lines) == 10


def test_a_gate_opens_again_each_second() -> None:
    gate = RateGate(2)

    assert [gate.admit(now) for now in (1.0, 1.1, 1.2, 2.0)] == [True, True, False, True]
    assert gate.take_held() == 1
    assert gate.take_held() == 0


@pytest.mark.parametrize(("level", "logged"), [("info", True), ("warn", False)])
def test_the_access_log_can_be_off(kept_logging: None, level: str, logged: bool) -> None:
    assert (configure_logging(Log.model_validate({"level": level})) is not None) is logged
    assert configure_logging(Log.model_validate({"level": level, "accesslog": {"disabled": True}})) is None


async def test_what_was_answered_last_is_logged_before_the_end(written: Written) -> None:
    configure_logging(Log(), descriptor=written.descriptor)

    async with served(configured({"inmemory": {}}, log={"accesslog": {"disabled": False}})) as url:
        await Wire(url)("GET", "/v2/")

    assert any(" path=/v2/ status=200 " in line for line in written.lines)


def test_a_request_that_cannot_be_parsed_is_one_line_without_a_stack(written: Written) -> None:
    configure_logging(Log(), descriptor=written.descriptor)

    for _ in range(100):
        error = BadStatusLine("GET / \r\nevil")
        logging.getLogger("aiohttp.server").error(
            "Error handling request from %s", "192.0.2.1", exc_info=error
        )

    assert 1 <= len(written.lines) <= 30
    assert all(" info request.malformed remote=192.0.2.1 " in line for line in written.lines)


@pytest.mark.parametrize(
    "error",
    [
        BadStatusLine("GET /?token=s3cret HTTP/9"),
        BadHttpMethod("s3cret / HTTP/1.1"),
        InvalidHeader(b"Authorization: Bearer s3cret\0"),
        InvalidHeader("Authorization: 's3cret'"),
        LineTooLong(bytearray(b"GET /?token=s3cret"), 8190),
        LineTooLong(b"Authorization: Bearer s3cret", 8190),
        BadHttpMessage("Invalid header value char:\n\n  b'Authorization: Bearer s3cret'\n  ^"),
    ],
    ids=lambda error: type(error).__name__ + str(error.args[:1])[:20],
)
def test_V_15_what_the_parser_quotes_is_not_logged(written: Written, error: HttpProcessingError) -> None:
    configure_logging(Log(), descriptor=written.descriptor)

    logging.getLogger("aiohttp.server").error("Error from %s", "192.0.2.1", exc_info=error)

    (line,) = written.lines
    assert "s3cret" not in line
    assert len(line.partition("problem=")[2]) > len('"Bad" suppressed=0')


@pytest.mark.parametrize(
    "name", ["botocore.auth", "botocore.endpoint", "urllib3.connectionpool", "boto3.resources"]
)
def test_V_15_what_is_signed_for_the_store_is_not_logged(written: Written, name: str) -> None:
    configure_logging(Log(level="debug"), descriptor=written.descriptor)

    logging.getLogger(name).debug("Signature:\n%s", "s3cret")
    logging.getLogger(name).warning("no answer")
    LOGGER.debug("said")

    assert [name in line for line in written.lines] == [True, False]
    assert "s3cret" not in "".join(written.lines)


def test_B_211_a_log_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, os, sys\n"
        "from registry.config import Log\n"
        "from registry.logs import configure_logging, log_event\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1); os.dup2(write, 2)\n"
        "access = configure_logging(Log())\n"
        "log_event(logging.getLogger('x'), logging.INFO, 'event')\n"
        "access.record(remote='', method='', path='', status=200, seconds=0, received=0, sent=0, agent='', identity='')\n"
        "logging.getLogger('x').error('a %s of two %s', 1)\n"
    )

    ended = subprocess.run(
        [sys.executable, program], check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )

    assert ended.returncode == 0

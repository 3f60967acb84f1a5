"""Log lines: an event and its fields, as text or JSON, one line each, on standard error.

A line never holds a control character or a newline that a client sent, is at most 8 KiB, and carries the id of the request
it belongs to. Callers pass names, digests, sizes and seconds; never a token, a password or content.
Writing a line cannot fail: when nobody reads the log any more, or its disk is full, the lines are lost and the server lives.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from aiohttp.http_exceptions import HttpProcessingError

from registry.config import Log

LINE_SIZE_MAX: Final = 8192
_VALUE_LENGTH_MAX: Final = 1024
# In JSON every character may become `\\uXXXX`: six bytes.
_TRACEBACK_LENGTH_MAX: Final = 4096
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+", re.ASCII)  # no space, quote, `=`, backslash, nothing outside ASCII
_QUOTED = re.compile(r"(?<![:\s])[:\s]+(?:bytearray\()?b?['\"].*")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_CLIENTS_OF_THE_STORE = ("boto3", "botocore", "s3transfer", "urllib3")
_LEVEL_NAMES = {number: name for name, number in _LEVELS.items()} | {logging.CRITICAL: "fatal"}

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that the current task serves; "" outside of one."""

Field = str | int | float | bool | None


def log_event(
    logger: logging.Logger, level: int, event: str, /, *, error: BaseException | None = None, **fields: Field
) -> None:
    """Log `event` ("upload.committed"), with the stack of `error` when one is given."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"fields": fields}, exc_info=error)


class EventFormatter(logging.Formatter):
    """What both forms share: the order of a line's parts."""

    def __init__(self, constant: dict[str, str]) -> None:
        super().__init__()
        self._constant = constant

    def _event(self, record: logging.LogRecord) -> dict[str, Field]:
        fields: dict[str, Field] = getattr(record, "fields", None) or {}
        # What other libraries log is a sentence: the event is then who said it.
        head: dict[str, Field] = (
            {"event": record.name, "message": record.getMessage()}
            if not hasattr(record, "fields")
            else {"event": record.msg}
        )
        if identity := request_id.get():
            head["request"] = identity
        return {name: _shortened(value) for name, value in {**head, **fields, **self._constant}.items()}

    def _traceback(self, record: logging.LogRecord) -> str:
        text = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        return text if len(text) <= _TRACEBACK_LENGTH_MAX else "…" + text[-_TRACEBACK_LENGTH_MAX:]


class TextFormatter(EventFormatter):
    """`2026-01-31T12:00:00.000Z info upload.committed repository=team/demo size=1024`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = self._event(record)
        line = f"{_timestamp(record.created)} {_level_name(record)} {fields.pop('event')}"
        for name, value in fields.items():
            part = f" {name}={_text(value)}"
            if len(line) + len(part) > LINE_SIZE_MAX - 16:
                line += " truncated=true"
                break
            line += part
        for stack_line in self._traceback(record).splitlines():
            line += f"\n  | {_escaped(stack_line)}"
        return line


class JsonFormatter(EventFormatter):
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Field] = {"time": _timestamp(record.created), "level": _level_name(record)}
        content |= self._event(record)
        if stack := self._traceback(record):
            content["traceback"] = stack
        line = json.dumps(content).replace("\x7f", "\\u007f")
        while (
            len(line) > LINE_SIZE_MAX
        ):  # the longest goes first: time, level and event are always short enough
            longest = max(content, key=lambda name: len(json.dumps(content[name])))
            content[longest] = "(left out: the line would be too long)"
            line = json.dumps(content).replace("\x7f", "\\u007f")
        return line


class DescriptorHandler(logging.Handler):
    """Writes lines to a file descriptor, unbuffered: nothing to flush at exit, and nothing that can fail there.

    Attributes:
        lost: lines that could not be written.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write_lines(self.format(record))
        except Exception:  # noqa: BLE001 - a wrong argument of a log call must not end a request
            self.lost += 1

    def write_lines(self, lines: str) -> None:
        rest = memoryview(lines.encode("utf-8", "backslashreplace") + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:  # closed pipe, full disk, a terminal that went away
            self.lost += 1


class RateGate:
    """Lets `per_second` events through each second and counts the others."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._second = 0
        self._passed = 0
        self._held = 0

    def admit(self, now: float) -> bool:
        second = int(now)
        if second != self._second:
            self._second, self._passed = second, 0
        self._passed += 1
        if self._passed > self._per_second:
            self._held += 1
            return False
        return True

    def take_held(self) -> int:
        held, self._held = self._held, 0
        return held


def parsers_problem(message: str) -> str:
    """What aiohttp's parser says is wrong, without the bytes that it quotes: there may be a secret in them (V-15)."""
    return _QUOTED.sub("", message.partition("\n")[0])[:200]


class OneLinePerBadRequest(logging.Filter):
    """aiohttp logs a stack for each request it cannot parse; this makes it one line, and few of them in a flood."""

    def __init__(self) -> None:
        super().__init__()
        self._gate = RateGate(per_second=10)

    def filter(self, record: logging.LogRecord) -> bool:
        problem = record.exc_info[1] if record.exc_info else None
        if not isinstance(problem, HttpProcessingError):
            return True
        if not self._gate.admit(record.created):
            return False
        remote = record.args[0] if isinstance(record.args, tuple) and record.args else None
        first_line = parsers_problem(str(problem.message))
        record.msg, record.args, record.exc_info = "request.malformed", (), None
        record.fields = {"remote": str(remote), "problem": first_line, "suppressed": self._gate.take_held()}
        record.levelno, record.levelname = logging.INFO, "INFO"
        return True


class AccessLog:
    """One `access` line for each answered request; refusals (4xx) are sampled when they flood.

    Lines are gathered for up to half a second and written at once: a manifest GET must not pay a system call for its line.

    Attributes:
        user: the name of whoever the current task answers; "" for nobody in particular. Set by who knows (`app.py`).
    """

    REFUSALS_PER_SECOND = 50
    _GATHER_S = 0.5
    _GATHER_LINES = 500

    def __init__(self, handler: DescriptorHandler, *, as_json: bool, constant: dict[str, str]) -> None:
        self._handler = handler
        self._as_json = as_json
        self._constant = "".join(
            f", {json.dumps(name)}: {json.dumps(value)}" if as_json else f" {name}={_text(value)}"
            for name, value in constant.items()
        )
        self._gate = RateGate(self.REFUSALS_PER_SECOND)
        self._lines: list[str] = []
        self._second = (0, "")
        self.user: Callable[[], str] = str

    def record(
        self,
        *,
        remote: str,
        method: str,
        path: str,
        status: int,
        seconds: float,
        received: int,
        sent: int,
        agent: str,
        identity: str,
    ) -> None:
        """Note one answered request.

        Args:
            path: as the client wrote it, without the query: that may hold a secret.
            identity: the request's id.
        """
        now = time.time()
        if 400 <= status < 500 and not self._gate.admit(now):
            return
        user = self.user()
        if self._as_json:
            who = f'"user": {_json(user)}, ' if user else ""
            line = (
                f'{{"time": "{self._timestamp(now)}", "level": "info", "event": "access", "request": {_json(identity)}, '
                f'"remote": {_json(remote)}, {who}"method": {_json(method)}, "path": {_json(path)}, "status": {status}, '
                f'"seconds": {seconds:.6f}, "received": {received}, "sent": {sent}, "agent": {_json(agent)}{self._constant}}}'
            )
        else:
            who = f"user={_text(user)} " if user else ""
            line = (
                f"{self._timestamp(now)} info access request={_text(identity)} remote={_text(remote)} "
                f"{who}method={_text(method)} path={_text(path)} status={status} seconds={seconds:.6f} "
                f"received={received} sent={sent} agent={_text(agent)}{self._constant}"
            )
        self._lines.append(line)
        if len(self._lines) == 1:
            self._flush_soon()
        elif len(self._lines) >= self._GATHER_LINES:
            self.flush()

    def flush(self) -> None:
        if held := self._gate.take_held():
            now = self._timestamp(time.time())
            self._lines.append(
                f'{{"time": "{now}", "level": "info", "event": "access.suppressed", "count": {held}{self._constant}}}'
                if self._as_json
                else f"{now} info access.suppressed count={held}{self._constant}"
            )
        if self._lines:
            lines, self._lines = self._lines, []
            self._handler.write_lines("\n".join(lines))

    def _flush_soon(self) -> None:
        try:
            asyncio.get_running_loop().call_later(self._GATHER_S, self.flush)
        except RuntimeError:  # no loop: nobody would come back
            self.flush()

    def _timestamp(self, now: float) -> str:
        second = int(now)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        return f"{self._second[1]}.{int((now - second) * 1000):03}Z"


_access_log: AccessLog | None = None


def access_log() -> AccessLog | None:
    """Where answered requests are noted; None when they are not. A fifth of what `log_event` costs, and sampled."""
    return _access_log


def configure_logging(log: Log, *, worker: int | None = None, descriptor: int = 2) -> AccessLog | None:
    """Send everything that is logged in this process to `descriptor`, as configured; answer the access log, if there is one.

    Args:
        worker: number of this worker, when there are several.
    """
    constant = dict(log.fields) | ({} if worker is None else {"worker": str(worker)})
    handler = DescriptorHandler(descriptor)
    handler.setFormatter(JsonFormatter(constant) if log.formatter == "json" else TextFormatter(constant))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[log.level])
    for name in _CLIENTS_OF_THE_STORE:
        # What they say at debug are requests as they are sent: whoever reads a signature may send it, too (V-15).
        logging.getLogger(name).setLevel(max(_LEVELS[log.level], logging.INFO))
    server_logger = logging.getLogger("aiohttp.server")
    server_logger.filters[:] = [OneLinePerBadRequest()]
    logging.captureWarnings(True)
    global _access_log  # noqa: PLW0603 - as the root logger, it is the process's
    is_off = log.accesslog.disabled or log.level in {"warn", "error"}
    _access_log = None if is_off else AccessLog(handler, as_json=log.formatter == "json", constant=constant)
    return _access_log


def _timestamp(created: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(created))}.{int(created % 1 * 1000):03}Z"


def _level_name(record: logging.LogRecord) -> str:
    return _LEVEL_NAMES.get(record.levelno, record.levelname.lower())


def _shortened(value: Field) -> Field:
    if isinstance(value, str) and len(value) > _VALUE_LENGTH_MAX:
        return value[:_VALUE_LENGTH_MAX] + "…"
    return value


def _text(value: Field) -> str:
    if isinstance(value, str):
        return value if len(value) <= _VALUE_LENGTH_MAX and _PLAIN.fullmatch(value) else _json(value)
    if isinstance(value, float):
        return f"{value:.6f}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _json(text: str) -> str:
    return json.dumps(_shortened(text)).replace("\x7f", "\\u007f")


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")[:_VALUE_LENGTH_MAX]

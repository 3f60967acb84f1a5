"""oras-py, by the tests it carries in its wheel."""

from __future__ import annotations

import os
import re

from conformance import toolbox
from conformance.clients.lab import Client, Lab, check, operation

_MODULES = ("test_oras", "test_provider", "test_layout", "test_oci", "test_utils")
# They push a thousand tags, ask for TLS, or for chunks of 16 MB.
_LEFT_OUT = "not many_tags and not ssl and not chunked_push"
_PASSING = 63


class OrasPy(Client):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.python = toolbox.python_with_packages("oras-py")
        self.host, _, self.port = self.lab.host.partition(":")

    @operation(f"its own {_PASSING} tests")
    def own_tests(self) -> None:
        modules = [f"oras.tests.{module}" for module in _MODULES]
        # Its own configuration: pytest would look for one in the folders above.
        options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "-k", _LEFT_OUT]
        said = self.lab.run(
            self.python,
            "-m",
            "pytest",
            *options,
            "--pyargs",
            *modules,
            cwd=self.python.parent.parent,  # they push their own files, which must lie below the working folder
            ORAS_HOST=self.host,
            ORAS_PORT=self.port,
        )
        passed = re.search(r"(\d+) passed", said)
        check(passed and int(passed[1]) == _PASSING and " failed" not in said, said[-300:])

"""The alert rules, read by Prometheus' own tool, and tried on series of numbers (alerts_test.yml)."""

from __future__ import annotations

import shutil
from pathlib import Path

from conformance import toolbox
from conformance.clients.lab import Client, Lab, operation

_ALERTS = toolbox.HERE.parent / "deploy" / "monitoring" / "alerts.yml"
_TESTS = Path(__file__).with_name("alerts_test.yml")


class Monitoring(Client):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.promtool = toolbox.debian_command("promtool")
        for file in (_ALERTS, _TESTS):
            shutil.copy(file, lab.folder)

    @operation("promtool check rules")
    def rules(self) -> None:
        self.lab.run(self.promtool, "check", "rules", _ALERTS.name)

    @operation("promtool test rules: each alert when it should, none when not")
    def alerts(self) -> None:
        self.lab.run(self.promtool, "test", "rules", _TESTS.name)

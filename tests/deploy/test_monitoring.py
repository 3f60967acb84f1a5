"""What the dashboard and the alerts ask Prometheus for, /metrics has."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from registry.metrics import ACTIONS, FAMILIES, HANDLERS, KINDS, METHODS, Family

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
# Prometheus' own.
OF_EVERY_TARGET = {"up"}
LABELS_OF_EVERY_TARGET = {"instance", "job"}
VALUES = {
    "action": ACTIONS,
    "code": {str(code) for code in range(100, 600)},
    "handler": HANDLERS,
    "kind": KINDS,
    "method": METHODS,
    "result": {"good", "hit", "miss", "refused"},
}
LABEL_MATCH = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
SELECTOR = re.compile(r"\b((?:registry|modelreg|process|up)(?:_\w+)?)\b(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


def alert_expressions() -> Iterator[str]:
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def panels() -> list[dict]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]


def families() -> dict[str, Family]:
    """By the name of each series that /metrics has."""
    found = {}
    for name, family in FAMILIES.items():
        for suffix in ("_bucket", "_count", "_sum") if family.bounds else ("",):
            found[name + suffix] = family
    return found


EXPRESSIONS = sorted({*alert_expressions(), *dashboard_expressions()})


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_and_label_that_is_asked_for_is_there(expression: str) -> None:
    known = families()
    selectors = SELECTOR.findall(expression)
    labels = set(LABELS_OF_EVERY_TARGET)

    assert selectors
    for name, matchers in selectors:
        family = known[name] if name not in OF_EVERY_TARGET else Family("")
        own = {*family.labels, *LABELS_OF_EVERY_TARGET, *(["le"] if family.bounds else [])}
        labels |= own
        asked = LABEL_MATCH.findall(matchers)
        assert {label for label, _, _ in asked} <= own, name
        for label, operator, value in asked:
            if label in VALUES:
                matches = re.compile(value if "~" in operator else re.escape(value)).fullmatch
                assert any(matches(known_value) for known_value in VALUES[label]), (name, label, value)
    for grouping in GROUPED.findall(expression):
        assert set(re.split(r",\s*", grouping)) <= labels


@pytest.mark.parametrize("name", ["modelreg_requests_refused_total", "registry_notifications_pending_total"])
def test_what_is_turned_away_and_what_waits_has_a_panel_and_an_alert(name: str) -> None:
    assert any(name in expression for expression in dashboard_expressions())
    assert any(name in expression for expression in alert_expressions())


def test_panels_do_not_lie_on_one_another() -> None:
    taken: set[tuple[int, int]] = set()

    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_alert_says_how_bad_it_is_and_what_was_seen() -> None:
    rules = [
        rule
        for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]

    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert "{{" in rule["annotations"]["summary"]

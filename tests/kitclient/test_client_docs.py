"""docs/client.md names every command and every option, and only those."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from kitclient.cli import cli

DOCUMENT = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
CONTEXT = click.Context(cli)
COMMANDS = cli.list_commands(CONTEXT)
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", DOCUMENT, re.MULTILINE | re.DOTALL))
COMMON = DOCUMENT.partition("## Commands")[2].partition("###")[0]


def options_of(name: str) -> list[click.Option]:
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    return [
        parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
    ]


def test_every_command_has_a_section_and_every_section_a_command():
    assert list(SECTIONS) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described(name: str):
    for option in options_of(name):
        for text in option.opts:
            if text.startswith("--") or option.name != "verbose":
                assert text in SECTIONS[name] + COMMON, f"{name} {text}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_is_described_exists(name: str):
    known = {text for option in options_of(name) for text in option.opts + option.secondary_opts}

    described = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"`kitclient [^`]*`", "", SECTIONS[name])))

    assert described <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str):
    command = cli.get_command(CONTEXT, name)
    assert command is not None

    with click.Context(command, info_name=f"kitclient {name}") as context:
        page = command.get_help(context)

    assert command.help
    assert name == "version" or f"kitclient {name}" in page.partition("Usage:")[2].partition("\n")[2]
    assert all(option.help for option in options_of(name) if option.name != "help")

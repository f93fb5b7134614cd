"""What the documentation says can be followed: links lead somewhere, commands are ones that the programs take."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdecode.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `fastdecode` of each command in the page's shell blocks, as far as one program is given them."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r"\$\([^)]*\)", "$", block.replace("\\\n", " ")).splitlines():
            for words in re.findall(r"\bfastdecode ((?:[a-z-]+)\b(?:[^;&|:#'\n]|:(?! ))*)", line.replace('"', "")):
                yield shlex.split(words)


ALL_COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_commands_are_there(page: Path) -> None:
    """Of this repository: scripts, tests and measurements that a shell block names."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL))
    named = re.findall(r"(?<![\w/.])(?:scripts|bench|tests)/[\w/]+\.(?:sh|py|yaml)\b", blocks)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())}
    assert {*PAGES, ROOT / "LICENSE"} - linked == {ROOT / "README.md"}


def test_the_pages_have_commands() -> None:
    assert {page for page, _ in ALL_COMMANDS} >= {"README.md", "launch.md", "command_line.md", "server.md"}


@pytest.mark.parametrize(
    ("page", "words"), ALL_COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_commands_are_understood(page: str, words: list[str]) -> None:
    name, *rest = words
    assert name in COMMANDS
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"fastdecode.commands.{name.replace('-', '_')}").add_arguments(parser)
    known = {flag for one in parsers(parser) for flag in one._option_string_actions}
    flags = [word for word in rest if re.match(r"--?[a-z]", word)]
    assert not [flag for flag in flags if flag.partition("=")[0] not in known]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """It and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from parsers(one)


def test_the_readme_is_a_newcomers() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160

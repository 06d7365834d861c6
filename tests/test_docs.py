"""The documentation names what exists: links with their anchors, paths, tests, make targets, commands and options."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from ldm.cli.main import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = r"(?:autoencoder|benchmarks|docs|examples|ldm|scripts|tests|configs/(?!photos))"


def commands(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands, by name."""
    return {k: v for a in top._actions if isinstance(a, argparse._SubParsersAction) for k, v in a.choices.items()}


COMMANDS = commands(parser())


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8").replace("\\\n", " ")


def code(page: Path) -> list[str]:
    """Spans of code, and the lines of indented and fenced blocks."""
    blocks = re.findall(r"^    (.*)$|^((?:\$ )?ldm .*)$", text(page), re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text(page)) + [one or two for one, two in blocks]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        place, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = page.parent / place if place else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_tests_exist(page: Path) -> None:
    for span in code(page):
        for path, test in re.findall(rf"(?<![\w/.-])({FOLDERS}/[\w/.-]*\w)(?:::(test_\w+))?", span):
            found = ROOT / path
            assert found.exists() or "NAME" in path or "hashes" in path, span
            assert not test or f"def {test}(" in found.read_text(encoding="utf-8"), span
        for file, test in re.findall(r"(?<![\w/])(test_\w+\.py)(?:::(test_\w+))?", span):
            files = list((ROOT / "tests").rglob(file))
            assert files and (not test or f"def {test}(" in files[0].read_text(encoding="utf-8")), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for span in code(page):
        if match := re.match(r"make ([a-z-]+)", span):
            assert match[1] in targets, span
        if match := re.match(r"(?:\$ )?ldm ([a-z][a-z-]+)(.*)", span):
            command, rest = match[1], match[2].partition("   ")[0].partition(" #")[0]
            assert command in COMMANDS, span
            below = commands(COMMANDS[command]).get(rest.split()[0] if rest.split() else "", COMMANDS[command])
            options = re.findall(r"(?<![\w-])--[a-z][\w-]+", rest)
            assert set(options) <= set(below._option_string_actions), span


def test_a_wrong_option_would_be_found(tmp_path: Path) -> None:
    """The checks above read this page's one span of code and fail on it."""
    (tmp_path / "page.md").write_text("`ldm sample RUN --prompts a`", encoding="utf-8")
    with pytest.raises(AssertionError, match="--prompts"):
        test_commands_options_and_targets_exist(tmp_path / "page.md")

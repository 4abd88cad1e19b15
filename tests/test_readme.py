"""What the README prints is what the code prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from slimconv_lit.analysis.paper import paper_rows, paper_table
from slimconv_lit.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shows(printed, block):
    """Whether the lines of `block` appear in `printed` in order, "..." standing for any lines."""
    lines = iter(line.rstrip() for line in printed.splitlines())
    return all(any(line == wanted for line in lines) for wanted in block.splitlines() if wanted and wanted != "...")


def test_the_snippet_prints_what_stands_below_it():
    code, block = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", README, re.S).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert shows(out.getvalue(), block), out.getvalue()


@pytest.mark.parametrize("verb", [verb for verb in ("models", "profile", "paper") if f"slimconv_lit {verb} " in README])
def test_tool_commands_print_what_stands_below_them(verb, capsys):
    for command, block in re.findall(rf"\$ python -m slimconv_lit ({verb} .*?)\n(.*?)```", README, re.S):
        assert main(command.split()) == 0
        assert shows(capsys.readouterr().out, block)


def test_the_papers_table_is_the_one_that_is_made():
    table = re.search(r"<!-- made by: .*? -->\n(.*?)\n<!-- end", README, re.S).group(1)
    assert table.strip() == paper_table(paper_rows(), "md").strip(), "run: python -m slimconv_lit paper --format md"


def test_every_link_and_config_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for config in re.findall(r"\b[a-z_0-9]+\.yaml\b", README):
        places = [ROOT / "configs", *(ROOT / "configs").glob("*/"), ROOT / "slimconv_lit" / "analysis"]
        assert any((place / config).exists() for place in places), config


@pytest.mark.parametrize("path", sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")}), ids=lambda path: path.name)
def test_nothing_is_left_to_be_filled_in(path):
    assert "@@" not in path.read_text(encoding="utf-8")

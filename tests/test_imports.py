"""Imports point one way (design: ops <- surgery <- backbones <- heads <- tasks <- cli)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slimconv_lit"
ORDER = ["ops", "surgery", "backbones", "heads", "tasks", "callbacks", "cli"]
# Modules at the top of the package that only the command line uses.
CLI = {
    "cli",
    "checkpoint_files",
    "distributed",
    "experiments",
    "config_files",
    "errors",
    "lightning_cli",
    "plain",
    "preemption",
    "quiet",
    "results",
    "tool_verbs",
    "trust",
    "usage",
    "__main__",
}


def imports_of(path):
    """The parts of the package that a file imports, at any depth of it, but not for type checkers."""
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {inner for node in typing_only for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from slimconv_lit import ops` imports a part too.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1:] for name in names if name.startswith("slimconv_lit."))


def part_of(name):
    return "cli" if name in CLI else name


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = part_of(path.relative_to(PACKAGE).with_suffix("").parts[0])
    for imported in imports_of(path):
        part = part_of(imported[0])
        if own in ORDER and part in ORDER:
            assert ORDER.index(part) <= ORDER.index(own), f"{own} imports {part}"
        if own in ("data", "analysis", "slimming", "tables"):
            assert part not in ("tasks", "callbacks", "cli"), f"{own} imports {part}"
        assert imported[:2] != ["callbacks", "bolts"], "nothing imports the frozen package's shim"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["fti"]], ids=str)
def test_help_answers_without_torch(words):
    code = f"import sys; from slimconv_lit.cli import main; print(main({words})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    *_, status, has_torch = done.stdout.split()
    assert (status, has_torch) == ("2" if words == ["fti"] else "0", "False")
    assert "predict" in done.stdout + done.stderr
    assert "did you mean 'fit'" in done.stderr or words != ["fti"]

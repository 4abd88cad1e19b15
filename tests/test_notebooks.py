"""Every notebook runs from top to bottom, on embedded data, and is committed without its outputs."""

import ast
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# A root folder, a home folder or a drive; not the end of an address or of a fraction.
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=\[])(?:/[A-Za-z]\w*/|~/|[A-Za-z]:\\)""", re.MULTILINE)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_runs_in_a_fresh_kernel(path, in_tmp):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(in_tmp)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    # A notebook that shows nothing is no notebook.
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output.get("name") == "stdout" for output in outputs)
    assert not list(in_tmp.iterdir()), "it writes into the folder that it runs in"


def test_is_committed_without_what_a_run_leaves(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells), (
        "clear the outputs before committing"
    )
    assert not set(notebook.metadata) - {"kernelspec", "language_info"}
    found = [match.group() for cell in notebook.cells for match in ABSOLUTE.finditer(cell.source)]
    assert not found, "absolute paths"


def test_has_one_cell_of_parameters_near_the_top(path):
    cells = nbformat.read(path, as_version=4).cells
    marked = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert marked == [1], "the second cell, below the title, is the one with the tag `parameters`"
    statements = ast.parse(cells[1].source).body
    assert statements
    for statement in statements:
        assert isinstance(statement, ast.Assign | ast.AugAssign), "nothing but assignments"
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        assert all(target.id.isupper() for target in targets)

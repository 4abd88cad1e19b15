"""Every notebook runs from top to bottom, on embedded data, and is committed with what it showed."""

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


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def kind(output):
    """The name of a stream, the types of a picture or a table, or "error"."""
    return output.get("name") or sorted(output.get("data", [output.output_type]))


def text(output):
    """What there is to read in it, pictures aside."""
    data = sorted(output.get("data", {}).items())
    return output.get("text") or "\n".join(words for name, words in data if name.startswith("text/"))


def test_runs_in_a_fresh_kernel_and_shows_what_is_stored(path, in_tmp):
    stored, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    trains = "EPOCHS =" in notebook.cells[1].source
    # Enough to see that it runs; the stored one was trained for as long as it says.
    notebook.cells[1].source += "\nEPOCHS = FINETUNE = 1"
    place = {"metadata": {"path": str(in_tmp)}}
    nbclient.NotebookClient(notebook, timeout=180, coalesce_streams=True, resources=place).execute()
    assert not list(in_tmp.iterdir()), "it writes into the folder that it runs in"
    assert [*map(kind, outputs(notebook))] == [*map(kind, outputs(stored))], "run `make notebooks`"
    if not trains:
        assert [*map(text, outputs(notebook))] == [*map(text, outputs(stored))], "run `make notebooks`"


def test_is_committed_as_a_whole_run_left_it(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 600_000
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"
    kinds = [*map(kind, outputs(notebook))]
    # A notebook that shows nothing is no notebook; errors, warnings and progress bars are nothing to show.
    assert "stdout" in kinds
    assert any("image/png" in found for found in kinds)
    assert "stderr" not in kinds
    assert ["error"] not in kinds


def test_says_nothing_of_the_machine_that_it_ran_on(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    texts = [cell.source for cell in notebook.cells] + [*map(text, outputs(notebook))]
    assert not [found.group() for words in texts for found in ABSOLUTE.finditer(words)], "absolute paths"
    assert not [words for words in texts if "\r" in words], "a progress bar"


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

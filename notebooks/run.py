"""Runs notebooks from top to bottom, and stores each with what it showed: `make notebooks`.

python notebooks/run.py [NOTEBOOK ...]
"""

import sys
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent

for path in sys.argv[1:] or sorted(HERE.glob("*.ipynb")):
    print(path, flush=True)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(HERE)}}
    # When each cell ran and on which Python would change with every run, and says nothing to a reader.
    nbclient.NotebookClient(notebook, record_timing=False, coalesce_streams=True, resources=place).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)

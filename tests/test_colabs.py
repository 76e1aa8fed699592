"""Every notebook in colabs/ runs from top to bottom, and is kept without outputs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.common import ENVIRONMENT

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  """On a fresh kernel in the project's folder, with the environment (CPU, compilation cache) of the tests."""
  notebook = nbformat.read(path, as_version=4)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert not any(cell.outputs or cell.execution_count for cell in code), "clear the outputs before committing"
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
  )
  client.execute(env=ENVIRONMENT)
  assert all(cell.execution_count for cell in code)

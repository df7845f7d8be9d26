"""Runs the notebooks from top to bottom and writes them with what they print and draw.

`python notebooks/run.py` runs all of them in place, with names some of them. What
differs from one run to the next, such as times, is not written. With `--library` the
library comes from another address than the install cells say, into the environment in
which this runs: that tries the cells before there is a release.
"""

import argparse
import hashlib
import pathlib
import re
import sys
import tempfile
from datetime import datetime

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parent
LONGEST = 60  # seconds of a cell on two idle cores; CI is allowed four times as many
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def run(notebook, library=None):
    """Executes the cells in an empty folder; returns the seconds of each code cell."""
    written = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if library is not None:
            cell.source = re.sub(r"git\+https://[^\"\s]+", library, cell.source)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook,
            timeout=4 * LONGEST,
            coalesce_streams=True,  # of a line of progress, the last state
            resources=resources,
        ).execute()
    for cell, source in zip(notebook.cells, written):
        cell.source = source
    return [seconds(cell) for cell in notebook.cells if cell.cell_type == "code"]


def seconds(cell):
    """How long a cell ran, by the messages of its kernel."""
    times = cell.metadata["execution"]
    begin, end = times["iopub.execute_input"], times["shell.execute_reply"]
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def clean(notebook):
    """Removes what a run leaves beside outputs, and notes of which code they are."""
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = output.text.replace("\r", "")  # at the ends of lines
    notebook.metadata = METADATA | {"cage_jax": {"outputs_of": code_hash(notebook)}}


def code_hash(notebook):
    """The SHA-256 of all code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def main():
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="such as 01_quickstart; by default all"
    )
    parser.add_argument(
        "--library", help="such as git+file://localhost/path/of/a/clone"
    )
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="a folder")
    options = parser.parse_args()
    for path in sorted(FOLDER.glob("*.ipynb")):
        if options.names and path.stem not in options.names:
            continue
        notebook = nbformat.read(path, 4)
        times = run(notebook, options.library)
        clean(notebook)
        nbformat.write(notebook, options.out / path.name)
        long = {f"[{n}]": round(s) for n, s in enumerate(times, 1) if s > 10}
        print(
            f"{path.stem}: {sum(times):.0f} s; seconds of its long cells: {long}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs a part of a test in a process of its own."""

import os
import subprocess
import sys


def run(function, path):
    """Calls a function of a test's file with a path; it has to end well.

    Where Orbax fails it leaves reads and an event loop behind, which complain at any
    time after, in the middle of another test.
    """
    module = function.__module__
    code = (
        "import pathlib, sys\n"
        f"import {module}\n"
        f"{module}.{function.__name__}(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path), "XLA_FLAGS": ""},
    )

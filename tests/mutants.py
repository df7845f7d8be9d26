"""Small faults put into the library, one at a time: do the tests notice?

    make mutants                     all of them
    python tests/mutants.py scales   those whose name contains a word
    python tests/mutants.py --tests tests/test_scales.py scales

Each fault is one replacement in one file, in a copy of the repository. It is judged by
the test files of the module and of its users, stopping at the first failure. The exit
code is 1 if a fault is not caught.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Fault(NamedTuple):
    """A replacement in a file of the library, and the test files that judge it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: list[str]


def faults() -> list[Fault]:
    """Reads faults.toml."""
    groups = tomllib.loads((ROOT / "tests/faults.toml").read_text())
    shared, found = groups.pop("tests"), []
    for group, entries in groups.items():
        for entry in entries:
            names = f"{entry.pop('tests', '')} {shared[group]}".split()
            name = f"{group}: {entry.pop('name')}"
            files = [f"tests/test_{name}.py" for name in names]
            found.append(Fault(name, **entry, tests=files))
    return found


def judge(fault: Fault, tests: list[str], copy: pathlib.Path) -> tuple[str, float]:
    """The first test that fails with the fault, or "", and the seconds it took."""
    file = copy / "cage_jax" / fault.file
    text = file.read_text()
    if fault.right not in text:
        raise SystemExit(f"{fault.name}: {fault.file} has no line {fault.right!r}")
    began = time.monotonic()
    file.write_text(text.replace(fault.right, fault.wrong))
    try:
        for test in tests:  # one process each, so that the first failure comes soon
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-ra", test],
                cwd=copy,
                capture_output=True,
                text=True,
                check=False,
                env={
                    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
                    **os.environ,
                    "PYTHONPATH": str(copy),
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
            )
            if run.returncode not in (0, 5):
                lines = run.stdout.splitlines()
                failed = [s for s in lines if s.startswith(("FAILED ", "ERROR "))]
                found = failed[0].split(" - ")[0] if failed else f"ERROR in {test}"
                return found, time.monotonic() - began
    finally:
        file.write_text(text)
    return "", time.monotonic() - began


def main() -> None:
    """Judges the faults that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of faults")
    parser.add_argument("--tests", nargs="+", help="test files, in place of each own")
    given = parser.parse_args()
    chosen = [f for f in faults() if all(word in f.name for word in given.words)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "cage_jax"
        keep_out = shutil.ignore_patterns(
            ".git", ".venv*", ".*_cache", "runs", "_build"
        )
        shutil.copytree(ROOT, copy, ignore=keep_out)
        for number, fault in enumerate(chosen, 1):
            tests = given.tests or [t for t in fault.tests if (copy / t).exists()]
            caught, seconds = judge(fault, tests, copy)
            missed += not caught
            print(
                f"[{number}/{len(chosen)}] {fault.name}: {caught or 'NOT CAUGHT'} "
                f"({seconds:.0f} s)",
                flush=True,
            )
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    raise SystemExit(missed > 0)


if __name__ == "__main__":
    main()

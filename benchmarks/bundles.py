"""Cycles of TPU kernels, counted in the compiler's schedule of their instructions.

Every bundle of instructions takes a cycle, and results of a matrix unit are waited for
in empty ones; waiting for memory is not in it. So this is the time that a kernel takes
where memory is faster than that.
"""

import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

_FILE = re.compile(r"-(cage_\w+?)(?:\.\d+)?-\d+-final_bundles\.txt$")
# Its address, what begins there (LB: the body of a loop), and in how many loops it is.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2}\s?)*):\s*([> ]*)")
_TRIPS = re.compile(r", (\d+) /\* loop exit test \*/")


class Loop(NamedTuple):
    """One over the strips of a block.

    Attributes:
      bundles: of its body.
      trips: how often it turns.
    """

    bundles: int
    trips: int


class Schedule(NamedTuple):
    """Of a kernel that loops over the strips of each block.

    Attributes:
      steps: blocks times passes.
      block: the bundles of a step that are in no loop over strips.
      loops: those over strips, as they stand.
    """

    steps: int
    block: int
    loops: tuple[Loop, ...]

    def cycles(self, branches: int = 1) -> float:
        """Of the whole kernel: each of its passes runs one of the loops.

        Args:
          branches: how many there are to choose from; the first one is counted.
        """
        run = self.loops[: len(self.loops) // branches]
        strips = sum(bundles * trips for bundles, trips in run) / len(run)
        return self.steps * (self.block + strips)


def schedules(compiled: Callable, calls: list[tuple]) -> list[dict[str, Schedule]]:
    """Those of the kernels of this package, by their names, for each of several calls.

    In a process of its own: the compiler writes a schedule of all that a process has it
    compile, and of what are no kernels that takes minutes.

    Args:
      compiled: a function of a module, which compiles kernels.
      calls: its arguments.
    """
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=context) as process,
    ):
        return process.submit(_written, Path(folder), compiled, calls).result()


def _written(folder: Path, compiled: Callable, calls: list[tuple[Any, ...]]):
    # Read when libtpu is loaded, by the first of the calls.
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {dump}"
    found = []
    for call in calls:
        compiled(*call)
        found.append({})
        for path in folder.iterdir():
            if match := _FILE.search(path.name):
                found[-1][match[1]] = read(path.read_text())
            path.unlink()
    return found


def read(text: str) -> Schedule:
    """A schedule as the compiler writes it."""
    block, strips, trips, steps = 0, [], [], 0
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        depth = bundle[2].count(">")
        if depth == 1:
            block += 1
        elif depth > 1:
            if "LB" in bundle[1]:
                strips.append(0)
            strips[-1] += 1
        if test := _TRIPS.search(line):
            if depth > 1:
                trips.append(int(test[1]))
            else:
                steps = int(test[1])
    return Schedule(steps, block, tuple(map(Loop, strips, trips)))

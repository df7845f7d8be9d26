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
    """A loop over the strips of a block.

    Attributes:
      bundles: bundles of its body.
      trips: number of iterations.
    """

    bundles: int
    trips: int


class Schedule(NamedTuple):
    """The schedule of a kernel that loops over the strips of each block.

    Attributes:
      steps: blocks times passes.
      block: bundles of a step outside the loops over strips.
      loops: loops over strips, in their order in the program.
    """

    steps: int
    block: int
    loops: tuple[Loop, ...]

    def cycles(self, branches: int = 1) -> float:
        """Computes the cycles of the whole kernel; each pass runs one of the loops.

        Args:
          branches: number of branches of the program; only the first is counted.
        """
        run = self.loops[: len(self.loops) // branches]
        strips = sum(bundles * trips for bundles, trips in run) / len(run)
        return self.steps * (self.block + strips)


def schedules(compiled: Callable, calls: list[tuple]) -> list[dict[str, Schedule]]:
    """Returns the schedules of this package's kernels by name, for each of the calls.

    It runs in a process of its own, because the compiler writes schedules of everything
    that a process compiles, and for programs other than kernels that takes minutes.

    Args:
      compiled: a function of a module that compiles kernels.
      calls: the arguments of each call.
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

"""Times kernels on an H200, or compiles them for one that is not here.

On a machine with an H200 each kernel is first checked, against the form of `jax.numpy`
and against float64 NumPy, and then timed beside the former, a copy of the array on the
device and, where it is installed, PyTorch: two minutes. Elsewhere `--compile` counts
what both forms move to and from memory and what registers the kernels need. Both are
kept in one record.

`--all` runs whatever is worth knowing on a GPU for so many minutes, see `gpu_day.py`:
tests, agreement, this table, train steps, trainings. `--pack` makes the folder that
has to be there.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# From a checkout, where nothing is installed; and with memory left for PyTorch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import cuda_aot
import hlo
import jax
import jax.numpy as jnp
import measurement
import numpy as np
from kernel_cases import CASES_FOR_GPU as CASES
from kernel_cases import Case
from measurement import Rows

import cage_jax as cage
from cage_jax.arrays.adamw import AdamW, Dtypes, StepNumbers
from cage_jax.arrays.factors import Factors
from cage_jax.pallas import gpu, tiling
from cage_jax.quantizers import rounding

SHAPE = (32768, 8192)  # 1 GiB of float32, far above the cache
SMALL = (1024, 512)
ROUNDS, CALLS = 5, 30
ADAMW = AdamW(b1=0.9, b2=0.95, eps=1e-8, eps_root=0.0, weight_decay=0.1)
NUMBERS = StepNumbers(*map(np.float32, (1e-3, -1e-3, 0.5, 0.5)))
# That a kernel is taken by itself for: the time of XLA's form over its own.
GAIN = 1.15


def kernel(case: Case, shape: tuple[int, int], interpret: bool) -> Callable | None:
    """A function of arrays of `shape`, or None where there is no kernel."""
    if (found := cut(case, shape)) is None:
        return None
    run = {"tiling": found, "interpret": interpret}

    def both(x, cotangent):
        value, mask = gpu.fake_quant(x, masked=True, **run)
        return value, gpu.masked_gradient(mask, cotangent, **run)

    def step(first, second, x, gradient):
        numbers = StepNumbers(*map(jnp.asarray, NUMBERS))
        arrays = gradient, first, second, x
        return gpu.adamw_step(
            *arrays, numbers, None, weights(case, shape), adamw=ADAMW, **run
        )

    if case.is_step:
        return step
    if case.what == "forward":
        return lambda x: (gpu.fake_quant(x, masked=False, **run),)
    return both


def weights(case: Case, shape: tuple[int, int]) -> Factors | None:
    """Returns weights of the error for a case that has them."""
    if case.what != "step, weights":
        return None
    column, row = (jnp.linspace(0.5, 2, n) for n in shape)
    pair = column[:, None], row[None]
    return Factors(*(pair if case.quantizer.axis == -2 else pair[::-1]), largest=3.0)


def xla(case: Case) -> Callable:
    """The same of `jax.numpy`."""

    def forward(x):
        return cage.fake_quant(x, case.quantizer, implementation="xla")

    def both(x, cotangent):
        value, back = jax.vjp(forward, x)
        return value, *back(cotangent)

    def step(first, second, x, gradient):
        # As the transformation does, which moves less than `quantization_error`.
        reductions = rounding.error_reductions(x, case.quantizer)
        error = rounding.error_elementwise(x, case.quantizer, reductions)
        if (factors := weights(case, x.shape)) is not None:
            error = factors.product() * error
        dtypes = Dtypes(x.dtype, first.dtype)
        *moments, update = ADAMW.step(gradient, first, second, x, NUMBERS, dtypes)
        return *moments, x + (update + NUMBERS.pull * error)

    if case.is_step:
        return step
    return (lambda x: (forward(x),)) if case.what == "forward" else both


def count(case: Case) -> int:
    """Returns the number of input arrays."""
    return 4 if case.is_step else {"forward": 1, "forward and backward": 2}[case.what]


def donated(case: Case) -> tuple[int, ...]:
    """Returns the arguments that a step overwrites."""
    return (0, 1, 2) if case.is_step else ()


def cut(case: Case, shape: tuple[int, int]) -> tiling.Tiling | None:
    """Returns the tiling of the case's arrays of a shape, None without a kernel."""
    try:
        return tiling.tiling_for_gpu(case.quantizer, shape, jnp.dtype(case.dtype))
    except tiling.NoKernelError:
        return None


def arrays(case: Case, shape: tuple[int, int], seed: int = 0) -> list[jax.Array]:
    """Draws random input arrays; the second moment of a step is positive."""
    keys = jax.random.split(jax.random.key(seed), count(case))
    made = [jax.random.normal(key, shape, case.dtype) for key in keys]
    if case.is_step:
        made[1] = jnp.square(made[1])
    return made


def check(case: Case, interpret: bool) -> None:
    """Raises AssertionError where a kernel is wrong."""
    from kernel_oracle import checked  # not where tables are made

    made = arrays(case, SMALL)
    ours = jax.jit(kernel(case, SMALL, interpret))(*made)
    theirs = jax.jit(xla(case))(*made)
    for one, other in zip(ours, theirs, strict=True):
        one, other = np.float64(one), np.float64(other)
        # One at a tie may go to the other level, with all that it is rotated with.
        near = np.abs(one - other) <= 1e-2 * np.abs(other).max() * 2.0**-7
        assert near.mean() > 0.98, f"{case}: {near.mean():.3f} agree with jax.numpy"
    if case.what == "forward":
        small = cut(case, SMALL)
        found = gpu.fake_quant(*made, tiling=small, masked=True, interpret=interpret)
        checked(*made, case.quantizer, *found)


def milliseconds(functions: dict[str, Callable], make: Callable) -> dict[str, float]:
    """The median over rounds of the mean call, the functions taking turns.

    Args:
      functions: by name; each makes new arrays of those it is given.
      make: the first ones.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(ROUNDS + 1):
        for name, function in functions.items():
            state = jax.block_until_ready(function(make()))
            start = time.perf_counter()
            for _ in range(CALLS):
                state = function(state)
            jax.block_until_ready(state)
            if number:  # the first one compiles
                found[name].append((time.perf_counter() - start) / CALLS * 1e3)
            del state
    return {name: statistics.median(each) for name, each in found.items()}


def again(function: Callable, case: Case) -> Callable:
    """Wraps a function so that its results replace the first arrays of a list."""
    run = jax.jit(function, donate_argnums=donated(case))
    return lambda state: [*(made := run(*state)), *state[len(made) :]]


def timed(case: Case, shape: tuple[int, int], interpret: bool) -> dict[str, float]:
    """Milliseconds of a call, by name."""
    functions = {"XLA": again(xla(case), case)}
    if (ours := kernel(case, shape, interpret)) is not None:
        functions["kernel"] = again(ours, case)
    found = milliseconds(functions, partial(arrays, case, shape))
    if case.dtype == "float32" and importlib.util.find_spec("torch") is not None:
        import gpu_torch

        if gpu_torch.available():
            found |= gpu_torch.timed(case, shape, ADAMW, NUMBERS, ROUNDS, CALLS)
    return found


def copied(shape: tuple[int, int]) -> float:
    """Milliseconds to read an array and to write it, at the speed of a copy."""
    copy = jax.jit(jnp.copy)
    make = partial(jax.random.normal, jax.random.key(0), shape)
    return milliseconds({"copy": copy}, make)["copy"]


def counted(case: Case, usage: Callable[[], dict], jnp_too: bool = True) -> dict:
    """Units moved, and what the kernels use, both compiled for an H200.

    Args:
      case: of arrays of `SHAPE`.
      usage: as `cuda_aot.watched` gives it.
      jnp_too: whether to count for XLA's form, too.
    """
    made = [jax.ShapeDtypeStruct(SHAPE, case.dtype)] * count(case)
    unit = SHAPE[0] * SHAPE[1] * jnp.dtype(case.dtype).itemsize

    def program(function):
        return cuda_aot.compiled(function, *made, donated=donated(case))

    def units(program):
        return hlo.moved(program.as_text()).memory / unit

    found = {"XLA units": units(program(xla(case)))} if jnp_too else {}
    if (ours := kernel(case, SHAPE, False)) is None:
        return found
    usage()
    ready, used = program(ours), usage()
    return found | {
        "kernel units": units(ready),
        # The second pass over a group, where no cache has what the first one read.
        "read again": float(cut(case, SHAPE).group_is_axis),
        "in place": ready.memory_analysis().alias_size_in_bytes / unit,
        "registers": max(each.registers for each in used.values()),
        "spilled": sum(each.spilled for each in used.values()),
        "kernels": sorted(used),
    }


def record(figures: dict, copy: float | None, environment: dict) -> dict[str, Any]:
    """The record of all cases, of which some may lack a count or a time."""
    gains = {
        name: each["ms"]["kernel"] / each["ms"]["XLA"]
        for name, each in figures.items()
        if "kernel" in each.get("ms", {})
    }
    return {
        "name": "gpu",
        "benchmark": "gpu",
        "title": f"Kernels on an H200, {SHAPE[0]} x {SHAPE[1]}: copies of the array "
        f"moved and registers, compiled and not run; milliseconds "
        + ("not measured" if copy is None else f"beside {copy:.3f} of a copy"),
        "environment": environment,
        "settings": {"shape": SHAPE, "rounds": ROUNDS, "calls": CALLS},
        "copy": copy,
        "figures": figures,
        "targets": [
            measurement.target(f"{name}: time to XLA's", gain, 1 / GAIN)
            for name, gain in gains.items()
        ],
    }


_TIMES = ("XLA", "kernel", "PyTorch", "PyTorch compiled")


def table(made: dict[str, Any]) -> Rows:
    """The table of a record."""
    header = ["case", "least", "XLA", "kernel", "registers", "spilled bytes"]
    header += [f"{name}, ms" for name in _TIMES]
    cells = []
    for name, each in made["figures"].items():
        again = each.get("read again")
        units = [
            f"{each[key]:.2f}" if key in each else ""
            for key in ("XLA units", "kernel units")
        ]
        units[1] += f" + {again:.2f}" if again else ""
        used = [str(each.get(key, "")) for key in ("registers", "spilled")]
        times = each.get("ms")
        if times is None:
            shown = ["not measured"] * len(_TIMES)
        else:
            shown = [f"{times[key]:.3f}" if key in times else "" for key in _TIMES]
        cells.append([name, f"{each['least']:.2f}", *units, *used, *shown])
    return Rows(header, cells)


def before() -> dict[str, Any]:
    """Returns the record as it was, with a figure for each case."""
    path = measurement.RESULTS / "gpu.json"
    found = json.loads(path.read_text()) if path.exists() else {"figures": {}}
    figures = {
        str(case): {"least": case.least} | found["figures"].get(str(case), {})
        for case in CASES
    }
    return found | {"figures": figures}


def _settings(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="for an H200, not here")
    parser.add_argument("--tiny", action="store_true", help="one case; nothing is kept")
    parser.add_argument("--all", action="store_true", help="everything; goes on")
    parser.add_argument("--minutes", type=float, default=25.0, help="of --all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="of --all")
    parser.add_argument("--pack", type=Path, help="make this folder for --all")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="of --pack")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of --pack")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status."""
    settings = _settings(arguments)
    if settings.pack or settings.all:
        import gpu_day

        if settings.pack:
            text = settings.text, settings.vocabulary
            print(f"{gpu_day.pack(settings.pack, *text) / 1e6:.1f} MB")
        else:
            gpu_day.run(settings.out, settings.minutes, settings.tiny)
        return 0
    from rich.console import Console

    console = Console()
    if settings.compile or settings.tiny:
        jax.config.update("jax_platforms", "cpu")
    figures, copy = before()["figures"], before().get("copy")
    if settings.tiny:
        (case, *_) = CASES
        check(case, interpret=True)
        made = {"least": case.least, "ms": timed(case, SMALL, interpret=True)}
        found = record({str(case): made}, None, measurement.environment())
        measurement.finish(found, table(found), console, keep=False)
        return 0
    if settings.compile:
        if (why := cuda_aot.missing()) is not None:
            console.print(f"`--compile` needs the plugin for CUDA: {why}.")
            return 1
        with tempfile.TemporaryDirectory() as folder:
            usage = cuda_aot.watched(Path(folder))
            for case in CASES:
                console.print(str(case), highlight=False)
                figures[str(case)] |= counted(case, usage)
    elif jax.default_backend() != "gpu":
        console.print(
            f"`gpu.py` must be run where there is a GPU; got the backend "
            f"{jax.default_backend()!r}. Use --compile to count for one that is not "
            f"here, or --tiny to see that the program works."
        )
        return 1
    else:
        copy = copied(SHAPE)
        for case in CASES:
            console.print(str(case), highlight=False)
            if kernel(case, SHAPE, False) is not None:
                check(case, interpret=False)
            figures[str(case)]["ms"] = timed(case, SHAPE, interpret=False)
    environment = measurement.environment("jax-cuda13-plugin")
    if not settings.compile:
        environment["machine"]["gpu"] = jax.devices()[0].device_kind
    found = record(figures, copy, environment)
    measurement.finish(found, table(found), console, keep=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

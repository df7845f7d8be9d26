"""Times `fake_quant` beside qwix, torchao and PyTorch, all in one process."""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import tyro
from measurement import Rows
from rich.console import Console
from rich.markup import escape

import cage_jax as cage

OURS, QWIX, TORCHAO, TORCH = "cage_jax", "qwix", "torchao", "PyTorch"
OTHERS = (QWIX, TORCHAO, TORCH)
INT4 = "int4, group 128, last axis"


@dataclasses.dataclass(frozen=True)
class Case:
    """One quantizer and what the others call it.

    Attributes:
      quantizer: ours.
      qwix: `qtype` there, or None.
      bits: of PyTorch's symmetric integers, or None; only for groups of the last axis.
    """

    quantizer: cage.Quantizer
    qwix: str | None = None
    bits: int | None = None


CASES = {
    INT4: Case(cage.int4(group_size=128, axis=-1), "int4", 4),
    "int4, group 128, first axis": Case(cage.int4(group_size=128, axis=0), "int4"),
    "int8, group 128, last axis": Case(cage.int8(group_size=128, axis=-1), "int8", 8),
    "int8, rows": Case(cage.int8(axis=-1), "int8"),
    "mxfp4, last axis": Case(cage.mxfp4(axis=-1), "mxfp4"),
    "mxfp8, last axis": Case(cage.mxfp8(axis=-1), "mxfp8"),
    "nvfp4, last axis": Case(cage.nvfp4(axis=-1), "nvfp4"),
    "nf4, last axis": Case(cage.nf4(axis=-1), "nf4"),
    "int4 with a zero point, group 128, last axis": Case(
        cage.int4(group_size=128, axis=-1, symmetric=False)
    ),
    "quest(4), rotated along the first axis": Case(cage.quest(4, axis=0)),
    "quest(4), rotated along the last axis": Case(cage.quest(4, axis=-1)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times fake quantization beside qwix, torchao and PyTorch, in turns."""

    size: int = 4096
    """Rows and columns of the float32 matrix."""
    rounds: int = 15
    """Timed calls of each."""
    tiny: bool = False
    """A small matrix, twice, to see that everything works; nothing is written."""


def ours(case: Case, x: np.ndarray) -> Callable[[], jax.Array]:
    """`fake_quant`, compiled."""
    run = jax.jit(functools.partial(cage.fake_quant, quantizer=case.quantizer))
    array = jnp.asarray(x)
    return lambda: jax.block_until_ready(run(array))


def qwix(case: Case, x: np.ndarray) -> Callable[[], jax.Array]:
    """Qwix's `quantize`, then its `dequantize`, compiled together."""
    from qwix._src.core import qarray

    quantizer = case.quantizer
    axis = quantizer.axis % 2
    how = qarray.HowToQuantize(
        qtype=case.qwix if case.qwix in _QWIX_NAMES else getattr(jnp, case.qwix),
        channelwise_axes=[1 - axis],
        tiled_axes={axis: quantizer.group_size} if quantizer.group_size else {},
    )
    run = jax.jit(lambda array: qarray.dequantize(qarray.quantize(array, how)))
    array = jnp.asarray(x)
    return lambda: jax.block_until_ready(run(array))


_QWIX_NAMES = ("nf4", "mxfp4", "mxfp8", "nvfp4")


def torchao(case: Case, x: np.ndarray) -> Callable[[], Any]:
    """Torchao's fake quantizer for weights, as its QAT uses it."""
    import torch
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    config = IntxFakeQuantizeConfig(
        getattr(torch, f"int{case.bits}"),
        group_size=case.quantizer.group_size,
        is_symmetric=True,
    )
    return _in_torch(IntxFakeQuantizer(config), x)


def torch(case: Case, x: np.ndarray) -> Callable[[], Any]:
    """PyTorch's own operation for channels, on groups as rows, scaled by absmax."""
    import torch

    high = 2 ** (case.bits - 1) - 1
    zero_point = torch.zeros(x.size // case.quantizer.group_size, dtype=torch.int32)

    def run(array):
        rows = array.view(-1, case.quantizer.group_size)
        scale = rows.abs().amax(1) / high
        fake_quant = torch.fake_quantize_per_channel_affine
        return fake_quant(rows, scale, zero_point, 0, -high, high).view(array.shape)

    return _in_torch(run, x)


def _in_torch(run, x):
    import torch

    torch.set_num_threads(measurement.cpus())
    array = torch.from_numpy(x.copy())

    def call():
        with torch.no_grad():
            return run(array)

    return call


def functions_of(case: Case, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """By name, what quantizes and dequantizes `x` as `case` says."""
    functions = {OURS: ours(case, x)}
    if case.qwix:
        functions[QWIX] = qwix(case, x)
    if case.bits:
        functions |= {TORCHAO: torchao(case, x), TORCH: torch(case, x)}
    return functions


def measure(size: int, rounds: int, console: Console, warmup: int = 3):
    """Median times of each, and the ratio of ours to it."""
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    figures, seconds, targets = {}, {}, []
    for number, (name, case) in enumerate(CASES.items(), 1):
        console.print(f"{number}/{len(CASES)} {name}", highlight=False)
        times = measurement.interleaved(functions_of(case, x), rounds, warmup)
        seconds[name] = times
        figures[name] = {
            other: {
                "seconds": statistics.median(each),
                "ratio of cage_jax": measurement.median_ratio(times, OURS, other),
            }
            for other, each in times.items()
        }
        targets += [
            measurement.target(
                f"{name}, time of cage_jax to {other}",
                figures[name][other]["ratio of cage_jax"],
                1.0,
            )
            for other in OTHERS
            if other in times
        ]
    return {
        "name": "quantizers",
        "benchmark": "quantizers",
        "title": f"Quantizing and dequantizing {size} x {size} float32",
        "environment": measurement.environment("qwix", "torchao"),
        "settings": {"size": size, "rounds": rounds, "warmup": warmup},
        "figures": figures,
        "seconds": seconds,
        "targets": targets,
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    cells = []
    for name, each in record["figures"].items():
        row = [name, f"{1e3 * each[OURS]['seconds']:.0f}"]
        for other in OTHERS:
            found = each.get(other)
            row.append(
                f"{1e3 * found['seconds']:.0f} ({found['ratio of cage_jax']:.2f})"
                if found
                else ""
            )
        cells.append(row)
    return Rows(["quantizer", f"{OURS}, ms", *(f"{o}, ms" for o in OTHERS)], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.rounds < 3:
        error = (
            f"`--rounds` must be at least 3, for a median; got {settings.rounds}. Use "
            f"15."
        )
        console.print(f"[red]error[/]: {escape(error)}", soft_wrap=True)
        return 2
    if settings.size < 128 or settings.size % 128:
        error = (
            f"`--size` must be a multiple of 128, the group; got {settings.size}. Use "
            f"4096."
        )
        console.print(f"[red]error[/]: {escape(error)}", soft_wrap=True)
        return 2
    size, rounds = (256, 2) if settings.tiny else (settings.size, settings.rounds)
    console.print("Quantizes by turns: about a minute.", highlight=False)
    try:
        record = measure(size, rounds, console)
    except ModuleNotFoundError as error:
        console.print(
            f"[red]error[/]: {error}. Install what is compared: pip install "
            f"--editable '.\\[test,oracles]'",
            soft_wrap=True,
        )
        return 1
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())

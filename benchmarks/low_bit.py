"""Counts what products with codes move from and to memory, for chips that are not here.

Each case is compiled for one TPU chip in four forms: with weights in bfloat16, with
codes that are dequantized first, and with `low_bit_dot` as XLA makes it and with the
kernel. A unit is the least that the last two have to move: codes, scales, inputs and
outputs, each once. Nothing is run.
"""

import dataclasses
import re
import sys
from typing import Any, Literal, NamedTuple

import bundles
import hlo
import jax
import jax.numpy as jnp
import kernels
import measurement
import tyro
from kernels import EXCESS
from measurement import Rows
from rich.console import Console

import cage_jax as cage

# So wide that no chip fetches all codes ahead, which cycles would not tell.
IN, OUT = 4096, 131072
FORMS = ("bfloat16", "dequantized", "codes", "kernel")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Counts what products with codes move, compiled for TPU."""

    chips: tuple[Literal["v5e", "v6e"], ...] = ("v5e", "v6e")
    """What to compile for."""
    tiny: bool = False
    """One case, to see that it works; nothing is written."""


class Case(NamedTuple):
    """What is multiplied.

    Attributes:
      quantizer: of a kernel (in, out).
      tokens: the rows of the inputs, bfloat16.
      inputs: a quantizer of these, or None.
    """

    quantizer: cage.Quantizer
    tokens: int = 8
    inputs: cage.Quantizer | None = None

    def __str__(self) -> str:
        inputs = "" if self.inputs is None else f", inputs {self.inputs}"
        return f"{self.quantizer}{inputs}, {self.tokens} tokens"


PER_TOKEN = cage.int8(axis=-1)
CASES = [
    Case(cage.int4(axis=-2)),
    Case(cage.int4(group_size=128, axis=-2)),
    Case(cage.int4(group_size=128, axis=-2), 1),
    Case(cage.int4(group_size=32, axis=-2)),
    Case(cage.int8(axis=-2)),
    Case(cage.int2(group_size=64, axis=-2)),
    Case(cage.mxfp4(axis=-2)),
    Case(cage.nvfp4(axis=-2)),
    Case(cage.q4_1(axis=-2)),
    Case(cage.quest(4, axis=-2)),
    Case(cage.int4(group_size=128, axis=-2), 8, PER_TOKEN),
    Case(cage.int4(axis=-2), 4096),
    Case(cage.int4(group_size=128, axis=-2), 4096),
]


def operands(case: Case, chip: str) -> tuple[Any, Any]:
    """Abstract inputs and codes on a chip."""
    x = kernels.array((case.tokens, IN), "bfloat16", chip)
    weights = jax.eval_shape(
        lambda w: cage.quantize(w, case.quantizer),
        jax.ShapeDtypeStruct((IN, OUT), jnp.float32),
    )
    return x, jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=x.sharding), weights
    )


def compiled(case: Case, chip: str, form: str) -> Any:
    """One form of a case."""
    x, weights = operands(case, chip)
    if form == "bfloat16":
        weights = jax.ShapeDtypeStruct((IN, OUT), x.dtype, sharding=x.sharding)
        return jax.jit(_dot).lower(x, weights).compile()
    if form == "dequantized":

        def dequantized(x, weights):
            if case.inputs is not None:
                x = cage.fake_quant(x, case.inputs)
            return _dot(x, cage.dequantize(weights).astype(x.dtype))

        return jax.jit(dequantized).lower(x, weights).compile()

    def codes(x, weights):
        return cage.low_bit_dot(
            x,
            weights,
            inputs_quantizer=case.inputs,
            preferred_element_type=jnp.float32,
            implementation="pallas" if form == "kernel" else "xla",
        )

    return jax.jit(codes).lower(x, weights).compile()


def _dot(x, weights):
    return jnp.dot(x, weights, preferred_element_type=jnp.float32)


def least(case: Case) -> int:
    """Bytes of codes, scales, inputs and outputs."""
    return case.quantizer.storage_bits((IN, OUT)) // 8 + case.tokens * (
        2 * IN + 4 * OUT
    )


def counted(case: Case, chip: str, form: str) -> dict[str, float] | None:
    """Units moved, and thousands of cycles that the compiler expects.

    It expects none of kernels. There is none for inputs that are quantized.
    """
    if form == "kernel" and case.inputs is not None:
        return None
    text = compiled(case, chip, form).as_text()
    moved = hlo.moved(text).memory
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    if form == "kernel":
        # The program does not show what a kernel reads again, but it says so.
        moved = max(moved, *map(int, re.findall(r'"bytes_accessed":"(\d+)"', text)))
    return {"units": moved / least(case), "cycles": cycles / 1e3}


def measure(cases: list[Case], chips: tuple[str, ...]) -> dict[str, Any]:
    """The record of all cases."""
    console, figures = Console(), {}
    console.print("schedules of all kernels", highlight=False)
    calls = [
        (case, chip, "kernel") for case in cases if not case.inputs for chip in chips
    ]
    schedules = iter(bundles.schedules(compiled, calls))
    for number, case in enumerate(cases, 1):
        console.print(f"{number}/{len(cases)} {case}", highlight=False)
        by_chip = {
            chip: {form: counted(case, chip, form) for form in FORMS} for chip in chips
        }
        for forms in by_chip.values():
            if forms["kernel"] is not None:
                whole = sum(each.cycles() for each in next(schedules).values())
                forms["kernel"]["cycles"] += whole / 1e3
        figures[str(case)] = {
            "least": least(case),
            "tokens": case.tokens,
            "chips": by_chip,
        }
    few = [
        min(found[form]["units"] for form in ("codes", "kernel") if found[form])
        for each in figures.values()
        for found in each["chips"].values()
        if each["tokens"] <= 8
    ]
    return {
        "name": "low_bit",
        "benchmark": "low_bit",
        "title": f"Products of {IN} x {OUT} weights, compiled and not run: what they "
        f"move as a multiple of the least, and thousands of cycles",
        "environment": measurement.environment("libtpu"),
        "settings": {"chips": list(chips), "shape": [IN, OUT]},
        "figures": figures,
        "targets": [
            measurement.target(
                "codes or kernel, at most 8 tokens, most of the least",
                max(few),
                EXCESS,
                ".3f",
            )
        ],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    chips = record["settings"]["chips"]
    header = ["case", "least, MiB"]
    header += [f"{chip}, {form}" for chip in chips for form in FORMS]
    cells = []
    for case, each in record["figures"].items():
        found = [each["chips"][chip][form] for chip in chips for form in FORMS]
        cells.append([case, f"{each['least'] / 2**20:.1f}"])
        cells[-1] += [_cell(one) for one in found]
    return Rows(header, cells)


def _cell(found):
    if found is None:
        return ""
    return f"{found['units']:.2f} ({found['cycles']:.0f})"


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    cases = CASES[:1] if settings.tiny else CASES
    chips = settings.chips[:1] if settings.tiny else settings.chips
    record = measure(cases, chips)
    keep = not settings.tiny and settings.chips == Settings.chips
    measurement.finish(record, table(record), console, keep=keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())

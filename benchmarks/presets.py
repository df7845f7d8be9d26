"""Writes the table of presets in docs/quantizers.md, from what the quantizers say."""

import sys
from pathlib import Path

import measurement
import tables

from cage_jax.core.quantize import gaussian_error
from cage_jax.quantizers.registry import PRESETS
from cage_jax.quantizers.scales import FourOverSix

PAGE = Path(__file__).resolve().parent.parent / "docs" / "quantizers.md"
BEGIN, END = "<!-- presets -->\n", "<!-- end of presets -->"
SHAPE = (4096, 64)
OPTIONS = {  # of the rows of a preset that does not have one without options
    "int4": [{"group_size": 128}, {"symmetric": False}],
    "int3": [{"group_size": 64}],
    "int2": [{"group_size": 64}],
    "quest": [{"bits": 4}, {"bits": 2}],
    "seq": [{}, {"levels": 3}],
    "fp8": [{}, {"name": "e5m2"}],
    "mxfp4": [{}, {"rounding": "up"}],
    "nvfp4": [{}, {"scale": FourOverSix()}],
}


def table() -> str:
    """The table, in Markdown."""
    cells = []
    calls = (
        (name, options, preset.make(**options))
        for name, preset in PRESETS.items()
        for options in OPTIONS.get(name, [{}])
    )
    for name, options, quantizer in calls:
        call = ", ".join(f"{key}={value!r}" for key, value in options.items())
        call = call.replace("'", '"')
        bits = quantizer.storage_bits(SHAPE) / (SHAPE[0] * SHAPE[1])
        shared = {None: "tensor"}.get(quantizer.axis, "channel")
        if quantizer.group_size:
            shared = str(quantizer.group_size)
        cells.append(
            [
                f"`{name}({call})`",
                str(quantizer.levels),
                shared,
                f"{bits:.2f}",
                f"{gaussian_error(quantizer):.2g}",
                "yes" if quantizer.idempotent else "no",
                "yes" if quantizer.symmetric else "no",
            ]
        )
    header = [
        "preset",
        "levels",
        "one scale per",
        "bits a weight",
        "error on N(0, 1)",
        "idempotent",
        "symmetric",
    ]
    return tables.markdown(measurement.Rows(header, cells))


def filled(text: str) -> str:
    """`text` with the table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(
            f"`text` must have a place for the table, between {BEGIN!r} and {END!r}."
        )
    return f"{before}{BEGIN}\n{table()}\n\n{END}{after}"


def main() -> int:
    """Runs the program; the exit status."""
    PAGE.write_text(filled(PAGE.read_text()))
    print("docs/quantizers.md: the table of presets agrees.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

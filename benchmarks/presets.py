"""Writes the table of presets in docs/quantizers.md, from what the quantizers say."""

import sys
from pathlib import Path

import measurement
import tables

import cage_jax as cage
from cage_jax.core.quantize import gaussian_error

PAGE = Path(__file__).resolve().parent.parent / "docs" / "quantizers.md"
BEGIN, END = "<!-- presets -->\n", "<!-- end of presets -->"
SHAPE = (4096, 64)
PRESETS = {
    "int8()": cage.int8(),
    "int4(group_size=128)": cage.int4(group_size=128),
    "int3(group_size=64)": cage.int3(group_size=64),
    "int2(group_size=64)": cage.int2(group_size=64),
    "int4(symmetric=False)": cage.int4(symmetric=False),
    "quest(4)": cage.quest(4),
    "quest(2)": cage.quest(2),
    "fp8()": cage.fp8(),
    'fp8("e5m2")': cage.fp8("e5m2"),
    "mxfp8()": cage.mxfp8(),
    "mxfp6()": cage.mxfp6(),
    "mxfp4()": cage.mxfp4(),
    'mxfp4(rounding="up")': cage.mxfp4(rounding="up"),
    "nvfp4()": cage.nvfp4(),
    "nf4()": cage.nf4(),
    "ternary()": cage.ternary(),
    "binary()": cage.binary(),
    "q4_0()": cage.q4_0(),
    "q4_1()": cage.q4_1(),
    "q8_0()": cage.q8_0(),
    "ct_w4a16()": cage.ct_w4a16(),
    "ct_w8a8()": cage.ct_w8a8(),
    "lsq(4)": cage.lsq(4),
}


def table() -> str:
    """The table, in Markdown."""
    cells = []
    for name, quantizer in PRESETS.items():
        bits = quantizer.storage_bits(SHAPE) / (SHAPE[0] * SHAPE[1])
        shared = {None: "tensor"}.get(quantizer.axis, "channel")
        if quantizer.group_size:
            shared = str(quantizer.group_size)
        cells.append(
            [
                f"`{name}`",
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

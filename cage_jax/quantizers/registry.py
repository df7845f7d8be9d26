"""The registry of presets, which files, the command line and the docs read.

A new format is a file in `formats/` and a line here. If its quantizer needs no function
of its own, the line can be, for a format `Logarithmic`::

    "log3": Preset(Logarithmic, partial(Quantizer, Logarithmic(3)), "powers of two"),
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from cage_jax.arrays.names import did_you_mean
from cage_jax.quantizers.file_presets import ct_w4a16, ct_w8a8, q4_0, q4_1, q8_0
from cage_jax.quantizers.formats import Codebook, Float, Format, Integer, MidRise
from cage_jax.quantizers.presets import (
    binary,
    fp8,
    int2,
    int3,
    int4,
    int8,
    lsq,
    mxfp4,
    mxfp6,
    mxfp8,
    nf4,
    nvfp4,
    quest,
    seq,
    ternary,
)
from cage_jax.quantizers.quantizer import Quantizer


class Preset(NamedTuple):
    """A line of the registry.

    Attributes:
      format: class of the quantizer's format, which saved codes name.
      make: makes the quantizer. The command line gives it `axis`, and `group_size` and
        `symmetric` if it takes them.
      summary: its codes, for the command line; "" if it is not offered there.
    """

    format: type[Format]
    make: Callable[..., Quantizer]
    summary: str = ""


PRESETS: dict[str, Preset] = {
    "int8": Preset(Integer, int8, "8 bits, a scale per output or group"),
    "int4": Preset(Integer, int4, "the same with 4 bits"),
    "int3": Preset(Integer, int3, "the same with 3 bits; 4 in the file"),
    "int2": Preset(Integer, int2, "the same with 2 bits; 4 in the file"),
    "fp8": Preset(Float, fp8, "e4m3, a scale per output"),
    "mxfp8": Preset(Float, mxfp8),
    "mxfp6": Preset(Float, mxfp6),
    "mxfp4": Preset(Float, mxfp4, "e2m1, groups of 32"),
    "nvfp4": Preset(Float, nvfp4, "e2m1, groups of 16"),
    "nf4": Preset(Codebook, nf4, "quantiles of a normal distribution, groups of 64"),
    "ternary": Preset(Integer, ternary, "-1, 0 and 1, a scale per output"),
    "binary": Preset(MidRise, binary),
    "quest": Preset(MidRise, quest),
    "lsq": Preset(Integer, lsq),
    "seq": Preset(MidRise, seq),
    "q4_0": Preset(Integer, q4_0, "4 bits, groups of 32, as in llama.cpp"),
    "q4_1": Preset(Integer, q4_1, "the same with an offset"),
    "q8_0": Preset(Integer, q8_0, "8 bits, groups of 32"),
    "ct_w4a16": Preset(Integer, ct_w4a16, "4 bits, groups of 128"),
    "ct_w8a8": Preset(Integer, ct_w8a8, "8 bits, a scale per output"),
}
"""All presets by name, in the order of the command line's help."""


def named(name: str) -> Quantizer:
    """Returns the quantizer of a preset's name, a key of `PRESETS`."""
    if name not in PRESETS:
        raise ValueError(
            f"a preset must be one of {', '.join(PRESETS)}; got {name!r}."
            f"{did_you_mean(name, PRESETS)}"
        )
    make = PRESETS[name].make
    parameters = inspect.signature(make).parameters
    missing = [p.name for p in parameters.values() if p.default is p.empty]
    if missing:
        raise ValueError(
            f"a preset that is given by name must need no settings; got {name!r}, "
            f"which needs `{missing[0]}`. Call it: {name}({missing[0]}=4)."
        )
    return make()


def takes_groups(name: str) -> bool:
    """Tells whether the groups of a preset can have another size than its own."""
    return "group_size" in inspect.signature(PRESETS[name].make).parameters

"""The report of a table of rules: what becomes of each parameter."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding

from cage_jax.arrays.sharding import devices_along
from cage_jax.core.tables import Cells, Shown
from cage_jax.quantizers.quantizer import Quantizer

# A remark is worth it where scales cost more than this share of the codes; the groups
# of common files, such as 32 with 16 bits for a scale and 16 for an offset, cost 1/4.
_MAX_SCALE_SHARE = 1 / 3
_MIN_WEIGHTS = 4096  # and where that is more than a few bytes


class Row(NamedTuple):
    """One parameter of a `Report`.

    Attributes:
      path: the parameter's path, joined by "/".
      shape: the parameter's shape.
      dtype: the parameter's dtype.
      quantizer: its quantizer; None if it is left alone.
      quantized_bits: bits of all codes, scales and zero points; None if left alone.
      reason: why it is left alone; None if it is quantized.
      inputs: the quantizer that its rule has for its input, or None.
      split: why devices send each other weights to quantize it, or None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    quantizer: Quantizer | None
    quantized_bits: int | None
    reason: str | None
    inputs: Quantizer | None = None
    split: str | None = None

    @property
    def size(self) -> int:
        """Number of weights in the parameter."""
        return math.prod(self.shape)

    @property
    def bytes_before(self) -> int:
        """Bytes of the parameter as it is."""
        return self.size * self.dtype.itemsize

    @property
    def bytes_after(self) -> int:
        """Bytes of its codes, packed, with scales and zero points."""
        if self.quantized_bits is None:
            return self.bytes_before
        return -(-self.quantized_bits // 8)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales and zero points included."""
        return 8 * self.bytes_after / self.size if self.size else 0.0

    @property
    def costs(self) -> str | None:
        """What scales cost and what to do, where they cost too much; else None."""
        quantizer, bits = self.quantizer, self.quantized_bits
        if quantizer is None or bits is None or not quantizer.has_codes:
            return None
        scales, codes = (
            quantizer.blocks(self.shape).scale_shape,
            self.size * quantizer.bits,
        )
        allowed, spent = _MAX_SCALE_SHARE * codes, bits - codes
        chosen = quantizer.group_size is not None
        costly = self.size >= _MIN_WEIGHTS and spent > allowed and not chosen
        if not costly and self.bytes_after < self.bytes_before:
            return None
        coarser = spent * self.shape[-1] / math.prod(scales)  # with a scale per output
        if chosen:
            remedy = "Use a larger group_size, or leave it alone by a rule with None."
        elif len(self.shape) > 2 and coarser <= allowed:
            remedy = (
                "Set `axis` to the axes of its inputs, such as axis=0 for (in, heads, "
                "size) and axis=(0, 1, 2) for the kernel of a convolution."
            )
        else:
            remedy = (
                "Leave it alone by a rule with None, or use axis=None for one scale."
            )
        return (
            f"its scales cost {spent / self.size:.1f} bits a weight beside codes of "
            f"{quantizer.bits}, since few weights share one: {scales} scales for "
            f"{self.shape} weights, {self.bytes_before} bytes become "
            f"{self.bytes_after}. {remedy}"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """What a table of rules makes of a tree of parameters, shown as a table.

    Attributes:
      rows: one `Row` for each parameter.
      unused_rules: the patterns that decide nothing.
    """

    rows: tuple[Row, ...]
    unused_rules: tuple[str, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters as they are."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters once quantized."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all parameters."""
        size = sum(row.size for row in self.rows)
        return 8 * self.bytes_after / size if size else 0.0

    @property
    def splits(self) -> tuple[str, ...]:
        """Reasons why devices exchange weights, each once with its first path."""
        return _by_text((row.path, row.split) for row in self.rows)

    @property
    def costs(self) -> tuple[str, ...]:
        """What to do about scales that cost too much, each once with its first path."""
        return _by_text((row.path, row.costs) for row in self.rows)

    def shown(self) -> tuple[Cells, int, Sequence[str]]:
        """Returns the table, and remarks to write below it."""
        cells = [("path", "shape", "quantizer", "bits", "bytes", "becomes")]
        for row in self.rows:
            what = f"- {row.reason}" if row.quantizer is None else str(row.quantizer)
            cells.append((row.path, str(row.shape), what, *_figures(row)))
        size = sum(row.size for row in self.rows)
        cells.append(("total", str(size), "", *_figures(self)))
        notes = []
        if inputs := [row for row in self.rows if row.inputs is not None]:
            notes.append(
                f"inputs of {len(inputs)} parameters, such as {inputs[0].path}: "
                f"{inputs[0].inputs}; quantized only in what "
                f"quantize_activations(model, rules) or "
                f"cage.flax.fake_quant(model, rules) returns"
            )
        notes += [f"unused rule: {pattern!r}" for pattern in self.unused_rules]
        return cells, 3, [*notes, *self.splits, *self.costs]


def _by_text(remarks):
    """Returns each text once, behind the first path that has it."""
    paths: dict[str, list[str]] = {}
    for path, text in remarks:
        if text is not None:
            paths.setdefault(text, []).append(path)
    return tuple(
        f"`{first}`{f' and {len(more)} more' if more else ''}: {text}"
        for text, (first, *more) in paths.items()
    )


def split_text(quantizer: Quantizer, shape: tuple[int, ...], sharding) -> str | None:
    """Explains why devices send each other weights to quantize an array, or gives None.

    A scale that they compute together is no reason: for that each sends one number.
    """
    if not isinstance(sharding, NamedSharding):
        return None
    devices = devices_along(sharding, len(shape))
    for axis, size in quantizer.blocks(shape).by_axis.items():
        here, block = shape[axis] // devices[axis], quantizer.hadamard
        if shape[axis] % devices[axis]:  # no array can be sharded like this
            continue
        if block is not None and here % block:
            name, value = "hadamard", block
        elif here % size and size % here:
            name, value = "group_size", size
        else:
            continue
        fits = math.gcd(here, value)
        remedy = f", or use {name}={fits}" if fits > 1 else ""
        return (
            f"`{name}` should divide what a device has of axis {axis - len(shape)}, or "
            f"devices send each other weights at each step; got {name}={value}, {here} "
            f"of {shape[axis]} on a device. Shard another axis{remedy}."
        )
    return None


def _figures(part: Row | Report) -> tuple[str, str, str]:
    return (
        f"{part.bits_per_weight:.2f}",
        str(part.bytes_before),
        str(part.bytes_after),
    )

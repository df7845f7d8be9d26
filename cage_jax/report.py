"""The report of a table of rules: what becomes of each parameter."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cage_jax.quantizers import Quantizer


class Row(NamedTuple):
    """One parameter of a `Report`.

    Attributes:
      path: joined by "/".
      shape: of the parameter.
      dtype: of the parameter.
      quantizer: None where it is left alone.
      quantized_bits: of all codes, scales and zero points; None where left alone.
      reason: why it is left alone; None where it is quantized.
      inputs: the quantizer that its rule has for what it is multiplied with, or None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    quantizer: Quantizer | None
    quantized_bits: int | None
    reason: str | None
    inputs: Quantizer | None = None

    @property
    def size(self) -> int:
        """How many weights the parameter has."""
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
        """Bits a weight, scales and zero points included."""
        return 8 * self.bytes_after / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What a table of rules makes of a tree of parameters; `print` shows a table.

    Attributes:
      rows: one `Row` a parameter.
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
        """Bits a weight over all parameters."""
        size = sum(row.size for row in self.rows)
        return 8 * self.bytes_after / size if size else 0.0

    def __str__(self) -> str:
        cells = [("path", "shape", "quantizer", "bits", "bytes", "becomes")]
        for row in self.rows:
            what = f"- {row.reason}" if row.quantizer is None else str(row.quantizer)
            cells.append((row.path, str(row.shape), what, *_figures(row)))
        size = sum(row.size for row in self.rows)
        cells.append(("total", str(size), "", *_figures(self)))
        lines = [table(cells, left=3)]
        lines += [f"unused rule: {pattern!r}" for pattern in self.unused_rules]
        return "\n".join(lines)


def table(cells: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells in columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    )


def _figures(part: Row | Report) -> tuple[str, str, str]:
    return (
        f"{part.bits_per_weight:.2f}",
        str(part.bytes_before),
        str(part.bytes_after),
    )

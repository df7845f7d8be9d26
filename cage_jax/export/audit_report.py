"""The result of an audit: what of a file is not what was trained."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from cage_jax.arrays.checks import first_lines
from cage_jax.core.on_grid import OnGrid
from cage_jax.core.tables import Cells, Shown

_LISTED = 40  # findings below a table


class Finding(NamedTuple):
    """A difference between a file and its training.

    Attributes:
      path: the tensor of the file, or a parameter that has none.
      kind: "codes", "scales", "zero points", "offsets", "tensor divisors" and "values"
        for numbers; "shape"; "rotation"; "floats" for what only training quantizes, and
        "quantized" for what only the file does; "missing" for a parameter without a
        tensor, and "extra" for a tensor without a parameter; "layout" for codes that
        files of this kind cannot hold; "config" for what config.json says wrongly.
      text: what differs.
    """

    path: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"`{self.path}`: {self.text}"


class TensorRow(NamedTuple):
    """A tensor of a file beside the parameter from which it was made.

    Attributes:
      path: the name of the tensor.
      shape: its shape.
      trained: its quantizer in training, or its dtype.
      shipped: its quantizer in the file, or its dtype.
      result: what became of it, in words.
      cast: the largest relative change of a float by its rounding to the dtype of the
        file; None if it was not rounded.
      grid: how far the file's floats lie on the grid of training; None for others.
    """

    path: str
    shape: tuple[int, ...]
    trained: str
    shipped: str
    result: str
    cast: float | None = None
    grid: OnGrid | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Audit(Shown):
    """What of a file is not what was trained, shown as a table.

    Attributes:
      file: the file or folder.
      rows: a row for each tensor of the file that has a parameter of its shape.
      findings: the differences.
    """

    file: str
    rows: tuple[TensorRow, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether the file is what was trained: there are no findings."""
        return not self.findings

    def shown(self) -> tuple[Cells, int, Sequence[str]]:
        """Returns the table, and the findings to write below it."""
        cells = [("tensor", "shape", "trained", "in the file", "result")]
        for path, shape, trained, shipped, result, *_ in self.rows:
            held = "the same" if shipped == trained else shipped
            cells.append((path, str(shape), trained, held, result))
        count = f"{len(self.findings)} findings" if self.findings else "as trained"
        cells.append(("total", str(len(self.rows)), "", "", count))
        below = first_lines(list(map(str, self.findings)), _LISTED)
        return cells, 5, below.splitlines()

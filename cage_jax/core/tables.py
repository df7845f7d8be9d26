"""Tables in text and in HTML, and reports that show themselves as one."""

import html
from collections.abc import Sequence

Cells = Sequence[Sequence[str]]


class Shown:
    """A report that a REPL, a notebook and `print` show as a table with notes."""

    def shown(self) -> tuple[Cells, int, Sequence[str]]:
        """Returns the cells, the number of columns on the left, and lines below."""
        raise NotImplementedError

    def __str__(self) -> str:
        cells, left, notes = self.shown()
        return "\n".join([table(cells, left), *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells, left, notes = self.shown()
        below = "".join(f"<p>{html.escape(note)}</p>" for note in notes if note)
        return html_table(cells, left) + below


def table(cells: Cells, left: int) -> str:
    """Formats cells in columns, the first `left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    )


def html_table(cells: Cells, left: int) -> str:
    """Formats the same as HTML; the first line has the heads of the columns."""

    def row(line, tag):
        sides = ("left" if i < left else "right" for i in range(len(line)))
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for side, cell in zip(sides, line)
        )

    head, *lines = cells
    rows = [row(head, "th"), *(row(line, "td") for line in lines)]
    return f"<table>{''.join(f'<tr>{each}</tr>' for each in rows)}</table>"

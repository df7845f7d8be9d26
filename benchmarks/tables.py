"""Writes the tables of README.md from the files in results/, so that both agree.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` and is made from
`results/NAME.json` by the function `table` of the benchmark that wrote it; those of
`quality/README.md`, and the summary in the project's own, by those of
`quality/report.py`. The project's own has the tables alone.
"""

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measurement
import tyro
from measurement import Rows
from rich.console import Console

README = Path(__file__).resolve().parent / "README.md"
QUALITY = README.parent / "quality" / "README.md"
FRONT = README.parents[1] / "README.md"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Writes the tables of every README.md from the results below benchmarks/."""

    check: bool = False
    """Write nothing; exit with 1 where a README.md differs from the files."""


def markdown(rows: Rows) -> str:
    """A table in Markdown, the first column to the left, the others to the right."""

    def line(cells):
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(rows.header) - 1)
    return "\n".join([line(rows.header), rule, *map(line, rows.cells)])


def section(name: str, folder: Path = measurement.RESULTS) -> str | None:
    """Table, targets and origin of one record; None where nothing was measured."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    record: Mapping[str, Any] = json.loads(path.read_text())
    benchmark = importlib.import_module(record["benchmark"])
    parts = [f"{record['title']}.", markdown(benchmark.table(record))]
    targets = "\n".join(f"- {line}" for line in measurement.target_lines(record))
    if targets:
        parts.append(targets)
    parts.append(f"Measured {measurement.environment_line(record)}")
    return "\n\n".join(parts)


def front(name: str) -> str | None:
    """What stands at a place of the project's README."""
    if name == "first_page":
        record = json.loads((measurement.RESULTS / f"{name}.json").read_text())
        page = importlib.import_module(name)
        return f"{markdown(page.table(record))}\n\n{page.sentence(record)}"
    import report

    return report.section(name)


def filled(text: str, section: Callable[[str], str | None] = section) -> str:
    """`text` with every table made anew.

    Args:
      text: Markdown with marked places.
      section: what stands at the place of a name; None says so.

    Returns:
      The text, the same when filled again.
    """

    def fill(place):
        body = section(place[2]) or "Not measured yet."
        return f"{place[1]}\n{body}\n\n{place[3]}"

    return _PLACE.sub(fill, text)


def write(readme: Path, section: Callable[[str], str | None]) -> bool:
    """Fills a file; returns whether that changed it."""
    before = readme.read_text()
    after = filled(before, section)
    if after != before:
        readme.write_text(after)
    return after != before


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    sys.path += [str(QUALITY.parent), str(README.parents[1] / "examples")]
    import report

    sections = {README: section, QUALITY: report.section, FRONT: front}
    if settings.check:
        texts = {readme: readme.read_text() for readme in sections}
        if any(filled(text, sections[place]) != text for place, text in texts.items()):
            console.print(
                "A README.md differs from results/. Run `python benchmarks/tables.py`."
            )
            return 1
    else:
        for readme, of_place in sections.items():
            write(readme, of_place)
    count = sum(len(_PLACE.findall(readme.read_text())) for readme in sections)
    console.print(f"{count} tables agree.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

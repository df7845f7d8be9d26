"""The cells of a table, measured one by one and kept, so that a study can be stopped.

What was measured stands in `results/NAME.json`. Each cell is written as it is done, and
one that is there is not measured again; a file of other settings is refused.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import measurement
from rich.console import Console

RESULTS = Path(__file__).resolve().parent / "results"


class Table:
    """The cells of one table.

    Args:
      name: of the table and its file.
      settings: what all cells share, as JSON has it.
      folder: of the file; None to keep nothing.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], folder: Path | None = RESULTS
    ):
        self.name, self.settings = name, json.loads(json.dumps(settings))
        self._path = None if folder is None else folder / f"{name}.json"
        self.cells: dict[str, Any] = {}
        self._environments: list[dict[str, Any]] = []
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path):
        record = json.loads(path.read_text())
        if record["settings"] != self.settings:
            both = record["settings"].keys() | self.settings.keys()
            changed = sorted(
                key
                for key in both
                if record["settings"].get(key) != self.settings.get(key)
            )
            raise ValueError(
                f"`{path.name}` must be of the same settings; got others for "
                f"{', '.join(changed)}. Give those again, or remove the file."
            )
        self.cells, self._environments = record["cells"], record["environments"]

    def measure(
        self,
        keys: Iterable[str],
        one: Callable[[str], Any],
        console: Console,
    ) -> None:
        """Measures the cells that are not there yet.

        Args:
          keys: of the cells.
          one: what measures a cell, and returns what JSON has.
          console: is told of each.
        """
        keys = list(keys)
        missing = [key for key in keys if key not in self.cells]
        if len(missing) < len(keys):
            console.print(
                f"{len(keys) - len(missing)} of {len(keys)} cells are there already.",
                highlight=False,
            )
        for number, key in enumerate(missing, 1):
            console.print(f"{key} ({number} of {len(missing)})", highlight=False)
            self.cells[key] = one(key)
            self._write()

    def record(self) -> dict[str, Any]:
        """All that was measured, as it is in the file."""
        return {
            "name": self.name,
            "settings": self.settings,
            "environments": self._environments,
            "cells": self.cells,
        }

    def _write(self):
        where = measurement.environment("scikit-learn")
        where["machine"].pop("load")  # of no interest where nothing is timed
        if where not in self._environments:
            self._environments.append(where)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_text(_compact(self.record()))
        os.replace(temporary, self._path)


def _compact(record):
    """JSON of a line for each cell, which differences between versions show."""
    cells = ",\n".join(
        f"    {json.dumps(key)}: {json.dumps(cell)}"
        for key, cell in record["cells"].items()
    )
    head = json.dumps({k: v for k, v in record.items() if k != "cells"}, indent=2)
    return f'{head[:-2]},\n  "cells": {{\n{cells}\n  }}\n}}\n'

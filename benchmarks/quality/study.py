"""Measures the tables of the study, each by one command that can be stopped.

    python benchmarks/quality/study.py quadratics
    python benchmarks/quality/study.py classifiers --only "digits ViT"

Cells that are there are kept; the tables of README.md and the pictures are made anew.
"""

import dataclasses
import inspect
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import classifiers
import equal_bytes
import finetuning
import g2p
import language_models
import minilm
import paper
import pieces
import pitch
import plots
import prose
import quadratics
import report
import tables
import tuned
import tyro
from cells import Table
from rich.console import Console
from rich.markup import escape

TABLES = {
    "quadratics": quadratics,
    "classifiers": classifiers,
    "tuned": tuned,
    "language_models": language_models,
    "equal_bytes": equal_bytes,
    "finetuning": finetuning,
    "g2p": g2p,
    "minilm": minilm,
    "pitch": pitch,
    "pieces": pieces,
    "paper": paper,
}
PLAN = {
    "quadratics": "54 programs of 600 problems and 10 trainings: 25 minutes",
    "classifiers": "24 cells of 10 seeds and 11 trainings: 3 hours",
    "tuned": "3 cells of 7 methods and 8 trainings of 10 seeds: 1 hour",
    "language_models": "36 cells of 3 to 12 trainings of 4000 steps: 3 hours",
    "equal_bytes": "54 trainings of 4000 steps, or 8000: 2 hours",
    "finetuning": "123 trainings of 96 steps, SmolLM2-135M: 8 hours",
    "g2p": "129 cells, most of them trainings of 3000 steps of two GRUs: 6 hours",
    "minilm": "109 cells, most of them trainings of 2000 steps of a BERT: 9 hours",
    "pitch": "193 cells, most of them trainings of 1000 steps of a CNN: 7 hours",
    "pieces": "9 cells of a fine-tuning of SmolLM2-135M: 8 hours",
    "paper": "2 cells of 12 trainings of 1144 steps, for a large GPU",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures a table of the study; what is there already is not measured again."""

    table: Annotated[Literal[tuple(TABLES)], tyro.conf.Positional]  # type: ignore
    """The table to measure."""
    only: tuple[str, ...] = ()
    """Cells whose names begin so, such as "digits ViT"; by default all."""
    data: Path = prose.DATA
    """Folder of texts and images that are downloaded."""
    text: tuple[Path, ...] = ()
    """For the table paper: text files to train on."""
    dataset: str | None = None
    """For the table paper: a Hugging Face dataset, by name or folder, not files."""
    seeds: int | None = None
    """Problems or trainings of each cell; by default the published number."""
    tiny: bool = False
    """The first cell with two seeds and a few steps; nothing is written."""


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    module, name = TABLES[settings.table], settings.table
    seeds = {} if settings.seeds is None else {"seeds": settings.seeds}
    of_one = "seeds" in _arguments(module.names)
    keys = [
        key
        for key in module.names(**seeds if of_one else {})
        if key.startswith(settings.only or "")
    ]
    try:
        if not keys:
            raise ValueError(
                f"`--only` must be how the name of a cell begins; got "
                f"{' '.join(settings.only)!r}. There are {', '.join(module.names())}."
            )
        if seeds and "seeds" not in _arguments(module.measure):
            raise ValueError(
                f"`--seeds` must be left out for {name}, whose cells have one seed; "
                f"got {settings.seeds}."
            )
        if settings.tiny:
            table = Table(name, {}, folder=None)
            with tempfile.TemporaryDirectory() as runs:
                options = _taken(module, settings, runs=Path(runs))
                options |= {"only": keys[:1], "table": table}
                module.measure(console, **options, **module.TINY)
            console.print("A trial: nothing is written.")
            return 0
        if settings.seeds is not None and settings.seeds < 2:
            raise ValueError(
                f"`--seeds` must be at least 2, for a standard error; got "
                f"{settings.seeds}. Leave it out."
            )
        console.print(f"{name}: {PLAN[name]}.", highlight=False)
        options = _taken(module, settings)
        module.measure(console, **seeds, only=keys, **options)
    except KeyboardInterrupt:
        console.print(
            "stopped; all cells so far are kept. Go on with the same command."
        )
        return 130
    except ValueError as error:
        console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 2
    if name in plots.PLOTS:
        plots.draw(name)
    for readme in (report.README, tables.FRONT):
        tables.write(readme, report.section)
    console.print(f"What is known of {name} is in {report.README.parent.name}/.")
    return 0


def _taken(module, settings, **options):
    """What a table's measurement has a use for."""
    flags = {name: getattr(settings, name) for name in ("data", "text", "dataset")}
    options = flags | options
    names = _arguments(module.measure)
    return {name: value for name, value in options.items() if name in names}


def _arguments(function):
    return inspect.signature(function).parameters


if __name__ == "__main__":
    sys.exit(main())

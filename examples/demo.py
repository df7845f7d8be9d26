"""Shows with `make demo` whether CAGE helps on images and text, on this machine."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import program

with program.imports(__name__):
    import tyro
    from rich.console import Console
    from rich.markup import escape

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains two small models at few bits and reports what CAGE gained."""

    out: Path = Path("runs/demo")
    """Folder for plots and results; a run in it is resumed."""


class Part(NamedTuple):
    """A program that the demo runs."""

    name: str
    duration: str
    what: str
    command: list[str]


def parts(out: Path) -> list[Part]:
    """Returns the parts that the demo runs, in order."""
    model = out / "lm"
    resume = ["--resume"] if _has_run(model) else []
    return [
        Part(
            "digits",
            "half a minute",
            "scikit-learn's 8 x 8 digits, 3 widths x 6 arms x 5 seeds, all at once",
            ["digits.py", "--json", str(out / "digits.json")],
        ),
        Part(
            "language model",
            "8 minutes",
            "a small Llama on the sources of Python's standard library, 6 arms, one "
            "seed",
            ["train_lm.py", "--out", str(model), *resume],
        ),
    ]


def _has_run(folder: Path) -> bool:
    return (folder / "settings.json").exists()


def main() -> int:
    """Runs the parts in turn; returns the exit status."""
    settings = tyro.cli(Settings, description=__doc__)
    console = Console(soft_wrap=True)
    out = escape(str(settings.out))
    try:
        program.check(settings, [program.OUT])
    except ValueError as error:
        console.print(f"[red]error[/]: {escape(str(error))}")
        return 2
    console.print("[bold]cage_jax demo[/]: weights and activations at 4 bits and less.")
    console.print(
        "CAGE trains beside full precision, rounding afterwards (PTQ), plain straight-"
        "through training (STE), and STE's free improvements. Times are for 2 cores:"
    )
    jobs = parts(settings.out)
    for name, duration, what, _ in jobs:
        console.print(f"  {name:<15} about {duration}: {what}")
    for name, _, _, command in jobs:
        console.rule(name)
        if "--resume" in command:
            console.print(f"Going on with the run in {out}/lm; remove it to redo it.")
        started = time.monotonic()
        status = _status([sys.executable, str(HERE / command[0]), *command[1:]])
        if status == program.STOPPED:
            console.print(f"{name} stopped. {_again(settings.out)}")
            return status
        if status:
            console.print(f"[red]{name} ended with status {status}.[/]")
            return status
        console.print(f"{name}: {time.monotonic() - started:.0f} s")
    console.rule("done")
    console.print(
        f"Pictures and figures are in {out}. Next: the quick start in README.md, or\n"
        f"  python examples/train_lm.py --w-bits 2 --a-bits 2 --out runs/w2"
    )
    return 0


def _again(out: Path) -> str:
    where = "goes on from there" if _has_run(out / "lm") else "starts again"
    return f"The same command (`make demo`) {where}."


def _status(command: list[str]) -> int:
    """Runs a program and returns its exit status; after Ctrl-C it has time to save."""
    process = subprocess.Popen(command)
    try:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            status = process.wait()
    except KeyboardInterrupt:  # the second Ctrl-C: do not wait for a save
        process.kill()
        process.wait()
        return program.STOPPED
    return status if status >= 0 else 128 - status  # a signal, in a shell's convention


if __name__ == "__main__":
    program.run(main, stopped="`make demo` goes on from what was saved.")

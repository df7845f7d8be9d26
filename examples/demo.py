"""Shows with `make demo` what CAGE buys, on digits at 2 bits and on text at 2 and 4."""

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
# Of the language models: enough for so few weights to arrive. CAGE buys nothing before.
STEPS = 4000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains small models at few bits and reports what CAGE gained."""

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
    return [
        Part(
            "quick start",
            "half a minute",
            "the program of the README's first page, digits at 2 bits",
            ["quickstart.py"],
        ),
        Part(
            "picture",
            "half a minute",
            "where the weights of the quick start end, without CAGE and with it",
            ["picture.py", str(out / "weights.png")],
        ),
        _language_model(out, 2),
        _language_model(out, 4),
    ]


def _language_model(out: Path, bits: int) -> Part:
    folder = out / f"w{bits}"
    flags = f"--size tiny --steps {STEPS} --recommended --w-bits {bits} --a-bits {bits}"
    return Part(
        f"language model at {bits} bits",
        "2 minutes",
        "a small Llama on the sources of Python's standard library, 6 arms, one seed",
        ["train_lm.py", *flags.split(), "--out", str(folder)]
        + ["--resume"] * _has_run(folder),
    )


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
    console.print(
        "[bold]cage_jax demo[/]: CAGE as recommended, with nothing tuned, beside full "
        "precision, rounding afterwards (PTQ), straight-through training (STE) and, on "
        "text, STE's free improvements. Times are for 2 cores:"
    )
    jobs = parts(settings.out)
    for name, duration, what, _ in jobs:
        console.print(f"  {name:<24} about {duration}: {what}")
    for name, _, _, command in jobs:
        console.rule(name)
        if "--resume" in command:
            console.print(f"Going on with the run in {out}; remove it to redo it.")
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
        f"Pictures are in {out}: weights.png, w2/curves.png and w4/curves.png. One "
        f"seed is no more than a hint. Next, a larger model, in 8 minutes:\n"
        f"  python examples/train_lm.py --recommended --out runs/lm"
    )
    return 0


def _again(out: Path) -> str:
    started = any(_has_run(out / name) for name in ("w2", "w4"))
    where = "goes on from there" if started else "starts again"
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
